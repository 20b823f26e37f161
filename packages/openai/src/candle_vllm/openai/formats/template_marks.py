"""The row of the table that a chat template writes: found by reading back what it writes, or by marks in its text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from candle_vllm.openai.formats.events import CallArguments, CallStart, TextPiece
from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.layout import Body, Layout, ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.named_json import NamedJson
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS
from candle_vllm.openai.formats.tagged import Tagged
from candle_vllm.openai.formats.template_needs import reasoning_is_open
from candle_vllm.openai.formats.template_probe import ARGUMENTS, NAME, SCHEMA, THOUGHTS, TemplateProbe, Written

_COMMON = frozenset({"```json", "functools"})  # too common in texts to tell of a format
_SHORT = 3


def writer_of_calls(probe: TemplateProbe, *, as_text: bool) -> ToolFormat | None:
    """The first row that reads the call back which the template writes; those before that are made for it."""
    written = probe.calls(as_text=as_text)
    if written is None:
        return None
    places = {row.name: _first_mark(row, written.text) for row in TOOL_FORMATS}
    marked = sorted((row for row in TOOL_FORMATS if places[row.name] >= 0), key=lambda row: places[row.name])
    flows = [row for row in TOOL_FORMATS if row.flow is not None]
    bare = [row for row in TOOL_FORMATS if row.bare is not None]
    first = [dataclasses.replace(row, bodies=row.bodies[:1], bare=None) for row in marked]
    unmarked = [
        row for row in bare if not isinstance(row.bare, JsonCalls) or f'"{row.bare.arguments_key}"' in written.text
    ]
    for row in (*first, *marked, *flows, *unmarked):
        if _calls(row, written) == [(NAME, ARGUMENTS)]:
            return next(own for own in TOOL_FORMATS if own.name == row.name)
    return None


def writer_of_thoughts(probe: TemplateProbe) -> ReasoningFormat | None:
    """The first row that reads the thoughts back which the template writes, beside calls or content."""
    calling = (probe.calls(as_text=as_text, thoughts=THOUGHTS) for as_text in (False, True))
    for written in filter(None, itertools.chain(calling, (probe.thinking(),))):
        if THOUGHTS not in written.text:
            continue
        for row in _own_first(REASONING_FORMATS):
            if _thoughts(row, written) == THOUGHTS:
                return next(own for own in REASONING_FORMATS if own.name == row.name)
    return None


def marked_tools(text: str) -> ToolFormat | None:
    """The row with the most marks in the text of a template."""
    sizes = {row.name: _tool_marks(row, text) for row in TOOL_FORMATS}
    best = max(TOOL_FORMATS, key=lambda row: sizes[row.name])
    return best if sizes[best.name] else None


def marked_reasoning(text: str) -> ReasoningFormat | None:
    """The row with both its marks in the text of a template, or one of them where that is enough to know it by."""
    for row in _own_first(REASONING_FORMATS):
        for opening, closing in row.pairs.items():
            if (opening in text and closing in text) or ("/" in closing and (opening in text or closing in text)):
                return next(own for own in REASONING_FORMATS if own.name == row.name)
    return next((row for row in REASONING_FORMATS if any(hint in text for hint in row.hints)), None)


def _own_first(rows: Iterable[ReasoningFormat]) -> Iterator[ReasoningFormat]:
    """Every row with its own marks alone, then with the others."""
    listed = list(rows)
    yield from (dataclasses.replace(row, others=()) for row in listed)
    yield from (row for row in listed if row.others)


def _first_mark(row: ToolFormat, text: str) -> int:
    """Where the first mark of a row stands; -1 where none does. What stands outside begins first."""
    return min((text.find(mark) for mark in (*row.opens, *row.names) if mark in text), default=-1)


def _tool_marks(row: ToolFormat, text: str) -> int:
    """Characters of the marks of a row that a text has; 0 where it lacks one that calls cannot do without."""
    opens = [mark for mark in (*row.opens, *row.names, *row.hints) if mark in text and mark not in _COMMON]
    needed = list(_literals(row.bodies[0])) if row.bodies else []
    if any(hint in text for hint in row.hints):
        needed = []
    if not opens or any(one not in text for one in needed):
        return 0
    return max(map(len, opens)) + sum(map(len, needed))


def _literals(body: Body) -> Iterator[str]:
    """What stands in every text that has such a call and tells it from others."""
    found: tuple[str, ...] = ()
    if isinstance(body, Tagged):
        found = (body.name_open, body.name_end, body.key_open)
    elif isinstance(body, NamedJson):
        kinds = (re.sub(r"^\w+", "", name) for name in body.before_name)
        found = (*kinds, body.name_end, body.id_mark, body.id_end, "```json" if body.fenced else "")
    elif isinstance(body, Gemma):
        found = (body.prefix, body.quote)
    elif isinstance(body, JsonCalls) and body.name_key != "name":
        found = (body.name_key,)
    return (one for one in found if len(one) >= _SHORT)


def _calls(row: ToolFormat, written: Written) -> list[tuple[str, Any]]:
    """The calls that a row reads in what a template wrote."""
    parser = OutputParser(Layout(None, row), tools={NAME: SCHEMA}, make_id=str)
    texts: list[list[str]] = []
    for event in (*parser.feed(written.text), *parser.finish(True)):
        if isinstance(event, CallStart):
            texts.append([event.name, ""])
        elif isinstance(event, CallArguments):
            texts[event.index][1] += event.text
    try:
        return [(name, json.loads(text)) for name, text in texts]
    except ValueError:
        return []


def _thoughts(row: ReasoningFormat, written: Written) -> str:
    """The thoughts that a row reads in what a template wrote."""
    parser = OutputParser(Layout(row, None), in_reasoning=reasoning_is_open(written.head, row))
    events = (*parser.feed(written.text), *parser.finish(True))
    return "".join(event.text for event in events if isinstance(event, TextPiece) and event.kind == "reasoning")
