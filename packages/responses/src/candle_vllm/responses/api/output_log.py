"""OutputLog: the events of one response with their numbers, and the items that they tell of at their places."""

from __future__ import annotations

from typing import Any, TypeVar

from candle_vllm.responses.api.item_writers import ItemWriter
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.response import OutputItem

_Writer = TypeVar("_Writer", bound=ItemWriter)


class OutputLog:
    """Events and output of one response, in order."""

    def __init__(self) -> None:
        self._number = 0
        self._new: list[wire.StreamEvent] = []
        self._output: list[OutputItem | ItemWriter] = []

    @property
    def next_place(self) -> int:
        """The place of the next item."""
        return len(self._output)

    @property
    def items(self) -> tuple[OutputItem, ...]:
        """Those that are complete."""
        return tuple(item for item in self._output if not isinstance(item, ItemWriter))

    def emit(self, kind: type[wire.StreamEvent], **fields: Any) -> None:
        """Adds an event with the next number."""
        self._new.append(kind(sequence_number=self._number, **fields))
        self._number += 1

    def take(self) -> list[wire.StreamEvent]:
        """The events since the last time."""
        new, self._new = self._new, []
        return new

    def begin(self, writer: _Writer) -> _Writer:
        """Gives a new item its place, and tells that it begins."""
        self._output.append(writer)
        writer.begin()
        return writer

    def settle(self, writer: ItemWriter) -> None:
        """An item has ended, and stays as it is."""
        assert writer.final is not None
        self._output[writer.index] = writer.final

    def add(self, begun: OutputItem, ended: OutputItem, *between: type[wire.StreamEvent], **fields: Any) -> None:
        """An item that is there all at once: as it begins, events of its own with these fields, and as it ends."""
        place = self.next_place
        self.emit(wire.OutputItemAdded, output_index=place, item=begun)
        for kind in between:
            self.emit(kind, output_index=place, **fields)
        self.emit(wire.OutputItemDone, output_index=place, item=ended)
        self._output.append(ended)
