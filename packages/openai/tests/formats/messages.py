# SPDX-License-Identifier: MIT
"""Parsing for tests: texts cut in every way, and the message that the events add up to."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest

from candle_vllm.openai.formats.events import CallArguments, CallEnd, CallStart, Event, TextPiece
from candle_vllm.openai.formats.layout import Layout
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name

REASONING, TOOLS = by_name(REASONING_FORMATS), by_name(TOOL_FORMATS)


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


TIMES, MOST = 4, 7
SMALL = 1 << 12  # characters of the shorter text
STEP = 4  # of a piece


def seconds(make: Callable[[], OutputParser], text: str) -> float:
    engine, feed = make(), text.__getitem__
    pieces = [feed(slice(start, start + STEP)) for start in range(0, len(text), STEP)]
    start = time.process_time()
    for piece in pieces:
        engine.feed(piece)
    engine.finish(True)
    return time.process_time() - start


def check_linear(make: Callable[[], OutputParser], text: Callable[[int], str], size: int = SMALL) -> None:
    """Raises where four times the text takes more than seven times as long in each of three rounds."""
    short, long = text(size), text(TIMES * size)
    ratios = []
    gc.disable()  # what other tests left behind is not this parser's
    try:
        for _ in range(3):
            ratios.append(seconds(make, long) / seconds(make, short))
            if ratios[-1] < MOST:
                return
    finally:
        gc.enable()
    pytest.fail(f"{TIMES} times the text takes {[round(one, 1) for one in ratios]} times as long")


def repeated(text: str) -> Callable[[int], str]:
    return lambda size: text * (size // len(text))
