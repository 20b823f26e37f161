# SPDX-License-Identifier: MIT
"""Writers of growing output items: each writes its events into the response's log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from msgspec import UNSET, UnsetType

from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.openai.protocol.custom_tools import custom_input
from candle_vllm.openai.protocol.usage import Timings
from candle_vllm.openai.task import Part, TextPart
from candle_vllm.responses.api.call_results import NOT_RUN
from candle_vllm.responses.api.messages import encode_thoughts
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol import response
from candle_vllm.responses.protocol.items import Phase
from candle_vllm.responses.protocol.response import MessageOut, OutputItem, OutputText, ReasoningOut, ReasoningText
from candle_vllm.responses.store.entries import new_id
from candle_vllm.responses.tools.tool import ToolResult

Emit = Callable[..., None]
"""Adds an event: `emit(kind, **fields)`; the log adds the sequence number."""


class ItemWriter:
    """The output item at `index`; its id begins with `prefix`, and `emit` receives its events."""

    def __init__(self, emit: Emit, index: int, prefix: str) -> None:
        self._emit_any = emit
        self.index = index
        self.id = new_id(prefix)
        self.final: OutputItem | None = None  # the item as it ended; None before

    def begin(self) -> None:
        self._emit_any(wire.OutputItemAdded, output_index=self.index, item=self.item("in_progress"))

    def end(self, status: str = "completed") -> None:
        """Write the last events; `status` is "completed" or "incomplete"."""
        self._end_content()
        self.final = self.item(status)
        self._emit_any(wire.OutputItemDone, output_index=self.index, item=self.final)

    def item(self, status: str) -> OutputItem:
        """Return the item in its current state."""
        raise NotImplementedError

    def _end_content(self) -> None:
        """Write the events that precede `output_item.done`."""

    def _emit(self, kind: type[wire.StreamEvent], **fields: Any) -> None:
        self._emit_any(kind, item_id=self.id, output_index=self.index, **fields)


class MessageWriter(ItemWriter):
    """A message of a single text; `phase` can be set until it ends."""

    def __init__(self, emit: Emit, index: int, phase: Phase | UnsetType) -> None:
        super().__init__(emit, index, "msg")
        self.phase: Phase | UnsetType = phase
        self._text: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []

    def begin(self) -> None:
        super().begin()
        self._emit(wire.ContentPartAdded, content_index=0, part=OutputText(text=""))

    def add(self, text: str, logprobs: tuple[ChatTokenLogprob, ...]) -> None:
        self._text.append(text)
        self._logprobs += logprobs
        self._emit(wire.OutputTextDelta, content_index=0, delta=text, logprobs=logprobs)

    def item(self, status: str) -> MessageOut:
        content = () if status == "in_progress" else (self._part(),)
        return MessageOut(id=self.id, status=status, content=content, phase=self.phase)

    def _end_content(self) -> None:
        part = self._part()
        self._emit(wire.OutputTextDone, content_index=0, text=part.text, logprobs=part.logprobs)
        self._emit(wire.ContentPartDone, content_index=0, part=part)

    def _part(self) -> OutputText:
        return OutputText(text="".join(self._text), logprobs=tuple(self._logprobs))


class ReasoningWriter(ItemWriter):
    """Reasoning of the model; with `encoded`, the item has `encrypted_content`, too."""

    def __init__(self, emit: Emit, index: int, *, encoded: bool) -> None:
        super().__init__(emit, index, "rs")
        self._encoded = encoded
        self._text: list[str] = []

    def begin(self) -> None:
        super().begin()
        self._emit(wire.ContentPartAdded, content_index=0, part=ReasoningText(text=""))

    def add(self, text: str) -> None:
        self._text.append(text)
        self._emit(wire.ReasoningTextDelta, content_index=0, delta=text)

    def item(self, status: str) -> ReasoningOut:
        if status == "in_progress":
            return ReasoningOut(id=self.id, status=status, content=())
        text = "".join(self._text)
        encoded = encode_thoughts(text) if self._encoded else None
        return ReasoningOut(id=self.id, status=status, content=(ReasoningText(text=text),), encrypted_content=encoded)

    def _end_content(self) -> None:
        text = "".join(self._text)
        self._emit(wire.ReasoningTextDone, content_index=0, text=text)
        self._emit(wire.ContentPartDone, content_index=0, part=ReasoningText(text=text))


_Writer = TypeVar("_Writer", bound=ItemWriter)


class OutputLog:
    """Events and output of one response, in order; every event gets the current `timings`."""

    def __init__(self) -> None:
        self.timings: Timings | UnsetType = UNSET
        self._number = 0
        self._new: list[wire.StreamEvent] = []
        self._output: list[OutputItem | ItemWriter] = []

    @property
    def next_place(self) -> int:
        """Index of the next output item."""
        return len(self._output)

    @property
    def items(self) -> tuple[OutputItem, ...]:
        """The items that have ended, completed or incomplete."""
        return tuple(item for item in self._output if not isinstance(item, ItemWriter))

    def emit(self, kind: type[wire.StreamEvent], **fields: Any) -> None:
        """Add an event with the next sequence number."""
        self._new.append(kind(sequence_number=self._number, timings=self.timings, **fields))
        self._number += 1

    def take(self) -> list[wire.StreamEvent]:
        """Return the events since the last call."""
        new, self._new = self._new, []
        return new

    def begin(self, writer: _Writer) -> _Writer:
        """Append a new item to the output, and write its first events."""
        self._output.append(writer)
        writer.begin()
        return writer

    def settle(self, writer: ItemWriter) -> None:
        """Replace the writer of an item that has ended by the item."""
        assert writer.final is not None
        self._output[writer.index] = writer.final

    def add(self, begun: OutputItem, ended: OutputItem, *between: type[wire.StreamEvent], **fields: Any) -> None:
        """Add an item that is complete at once: its start, the events in `between` with these fields, and its end."""
        place = self.next_place
        self.emit(wire.OutputItemAdded, output_index=place, item=begun)
        for kind in between:
            self.emit(kind, output_index=place, **fields)
        self.emit(wire.OutputItemDone, output_index=place, item=ended)
        self._output.append(ended)


_CODES, _REFUSED = {"timed_out": -32001, "unavailable": -32000}, -32602  # JSON-RPC's error codes, as MCP uses them


class CallWriter(ItemWriter):
    """A call whose arguments arrive in deltas."""

    def __init__(self, emit: Emit, index: int, prefix: str) -> None:
        super().__init__(emit, index, prefix)
        self._arguments: list[str] = []

    @property
    def arguments(self) -> str:
        return "".join(self._arguments)

    def add(self, delta: str) -> None:
        self._arguments.append(delta)


class _ClientCallWriter(CallWriter):
    """A call that the client runs; its item's id begins with `prefix`."""

    prefix: ClassVar[str]

    def __init__(self, emit: Emit, index: int, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(emit, index, self.prefix)
        self._given: dict[str, Any] = {"call_id": call_id, "name": name, "namespace": namespace or UNSET}


class FunctionWriter(_ClientCallWriter):
    """A call of a function."""

    prefix = "fc"

    def add(self, delta: str) -> None:
        super().add(delta)
        self._emit(wire.FunctionArgumentsDelta, delta=delta)

    def item(self, status: str) -> response.FunctionCallOut:
        return response.FunctionCallOut(id=self.id, status=status, arguments=self.arguments, **self._given)

    def _end_content(self) -> None:
        self._emit(wire.FunctionArgumentsDone, name=self._given["name"], arguments=self.arguments)


class CustomWriter(_ClientCallWriter):
    """A call of a custom tool; its input, which is read from the JSON of the arguments, is sent at the call's end."""

    prefix = "ctc"
    _input = ""

    def item(self, status: str) -> response.CustomToolCallOut:
        return response.CustomToolCallOut(id=self.id, status=status, input=self._input, **self._given)

    def _end_content(self) -> None:
        self._input = custom_input(self.arguments)
        if self._input:
            self._emit(wire.CustomInputDelta, delta=self._input)
        self._emit(wire.CustomInputDone, input=self._input)


class McpCallWriter(CallWriter):
    """A call of an MCP server's tool, which this server runs."""

    def __init__(self, emit: Emit, index: int, server: str, name: str, approval: str | None = None) -> None:
        super().__init__(emit, index, "mcp")
        self._server, self._name, self._approval = server, name, approval
        self._arguments_ended = False
        self._result: ToolResult | None = None
        self._shown: Sequence[Part] = ()

    def begin(self) -> None:
        super().begin()
        self._emit(wire.McpCallInProgress)

    def add(self, delta: str) -> None:
        super().add(delta)
        self._emit(wire.McpArgumentsDelta, delta=delta)

    def end_arguments(self) -> None:
        """Send the event that the arguments are complete; repeated calls have no effect."""
        if not self._arguments_ended:
            self._arguments_ended = True
            self._emit(wire.McpArgumentsDone, arguments=self.arguments)

    def finish(self, result: ToolResult, shown: Sequence[Part] = ()) -> None:
        """Send the last events, with the result; `shown` are its parts in the prompt, if it has images."""
        self._result, self._shown = result, shown
        self.end("completed" if result.status == "completed" else "failed")

    def item(self, status: str) -> response.McpCallOut:
        result = self._result
        return response.McpCallOut(
            id=self.id,
            status=status,
            server_label=self._server,
            name=self._name,
            arguments=self.arguments,
            output=result.text if result is not None and result.status == "completed" else None,
            content=tuple(map(_shown, self._shown)) or UNSET,
            error=None if result is None or result.status == "completed" else _failure(result),
            approval_request_id=self._approval,
        )

    def _end_content(self) -> None:
        self.end_arguments()
        failed = self._result is None or self._result.status != "completed"
        self._emit(wire.McpCallFailed if failed else wire.McpCallCompleted)


def _shown(part: Part) -> response.ShownText | response.ShownImage:
    return (
        response.ShownText(text=part.text) if isinstance(part, TextPart) else response.ShownImage(image_url=part.source)
    )


def _failure(result: ToolResult) -> response.ToolFailure | response.ProtocolFailure:
    if result.status == "failed":
        return response.ToolFailure(content=({"type": "text", "text": result.text},))
    return response.ProtocolFailure(code=_CODES.get(result.status, _REFUSED), message=result.text or NOT_RUN)
