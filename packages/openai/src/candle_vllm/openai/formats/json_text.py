# SPDX-License-Identifier: MIT
"""JSON in texts that are there, and JSON inside of a string of JSON (step 10)."""

from __future__ import annotations

import json
import re

from candle_vllm.openai.formats.json_value import read_quoted, read_value
from candle_vllm.openai.formats.reader import SPACE, Markers, Need, Reader, Sink, nowhere

_NOTHING = Markers(())
_LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair
_FIRST_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")  # of a pair that is one character


def mended(text: str) -> str | None:
    """A text that is one value, as JSON; None for any other text."""
    reader, parts = Reader(), list[str]()
    reader.feed(text)
    reader.end(False)
    try:
        next(read_value(reader, parts.append))
    except StopIteration as stop:
        closed = bool(stop.value)
    else:
        raise AssertionError("a text that has ended is read without waiting")
    value = "".join(parts)
    return value if closed and not reader.text[reader.at :].strip(SPACE) and is_json(value) else None


def is_json(text: str) -> bool:
    """Whether a text is one value of JSON, which knows no NaN."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(name)


def read_text_of_string(reader: Reader, sink: Sink) -> Need[bool]:
    """Reads a quoted string and hands on the arguments that it means: JSON inside of JSON. True when both are closed.

    Nothing, and null, are no arguments. What is no object is handed on as it is.
    """
    inner, held = Reader(), ""
    run = _read_inner(inner, sink)
    next(run)

    def decoded(text: str) -> None:
        nonlocal held  # runs of characters and whole escapes come, one at a time
        if _LONE.fullmatch(text):  # a special token, which is plain text in here
            whole, held = held, ""
            inner.feed((_LONE.sub("\ufffd", json.loads(f'"{whole}"')) if whole else "") + text)
            next(run)
            return
        if text == '"':  # one of the quotes around it: those inside are escaped
            whole, held = held, ""
        elif _FIRST_HALF.fullmatch(text):
            whole, held = held, text
        else:
            whole, held = held + text, ""
        if whole:
            inner.feed(_LONE.sub("\ufffd", json.loads(f'"{whole}"')))
            next(run)

    closed = yield from read_quoted(reader, decoded)
    inner.end(closed)
    try:
        while True:
            next(run)
    except StopIteration as stop:
        return closed and bool(stop.value)


def _read_inner(reader: Reader, sink: Sink) -> Need[bool]:
    """The text of a string that holds arguments."""
    yield
    yield from reader.skip_space()
    mark = yield from reader.peek()
    if mark == "{":
        closed = yield from read_value(reader, sink)
        yield from reader.until(_NOTHING, nowhere)
        return closed
    word = yield from reader.take("null")
    rest = yield from reader.peek()
    if not rest and reader.whole:
        sink("{}")
        return True
    if reader.ended and not reader.whole and "null".startswith(word + reader.text[reader.at :]):
        return False
    sink(word)
    yield from reader.until(_NOTHING, sink)
    return reader.whole
