"""Parsing for tests: texts cut in every way, and the message that the events add up to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from candle_vllm.openai.formats.events import CallArguments, CallEnd, CallStart, Event, TextPiece
from candle_vllm.openai.formats.layout import Layout
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.table import reasoning_names, tool_names

REASONING, TOOLS = reasoning_names(), tool_names()


class Parsed(NamedTuple):
    """A message: calls are (id, name, text of the arguments, closed)."""

    content: str
    thoughts: str
    calls: tuple[tuple[str, str, str, bool], ...]

    @property
    def values(self) -> list[tuple[str, Any]]:
        """Names and arguments."""
        return [(name, json.loads(text)) for _, name, text, _ in self.calls]


def parser(
    tools: str | None, schemas: dict[str, dict[str, Any]] | None, reasoning: str | None = "think", **options: Any
) -> OutputParser:
    """A parser by names of formats, with ids that say the number of the call."""
    layout = Layout(REASONING[reasoning] if reasoning else None, TOOLS[tools] if tools else None)
    return OutputParser(layout, tools=schemas, make_id=lambda index: f"id{index}", **options)


def parse(engine: OutputParser, pieces: Iterable[str], whole: bool = True) -> Parsed:
    """The message in a text that comes in these pieces; checks the order of its events."""
    events: list[Event] = []
    for piece in pieces:
        events += engine.feed(piece)
    events += engine.finish(whole)
    return add_up(events)


def add_up(events: Sequence[Event]) -> Parsed:
    """The events as a message."""
    texts = {"content": "", "reasoning": ""}
    calls: list[list[Any]] = []
    open_call = False
    for event in events:
        if isinstance(event, TextPiece):
            assert event.text
            texts[event.kind] += event.text
        elif isinstance(event, CallStart):
            assert not open_call
            assert event.index == len(calls)
            calls.append([event.id, event.name, "", False])
            open_call = True
        elif isinstance(event, CallArguments):
            assert open_call
            assert event.text
            assert event.index == len(calls) - 1
            calls[-1][2] += event.text
        else:
            assert isinstance(event, CallEnd)
            assert open_call
            calls[-1][3] = event.whole
            open_call = False
    assert not open_call
    return Parsed(texts["content"], texts["reasoning"], tuple(map(tuple, calls)))
