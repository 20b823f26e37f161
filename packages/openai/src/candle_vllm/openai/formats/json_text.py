# SPDX-License-Identifier: MIT
"""Repair of JSON in complete texts, and parsing of JSON inside a JSON string (step 10 of a request's life)."""

from __future__ import annotations

import json
import re

from candle_vllm.openai.formats.json_value import read_quoted, read_value
from candle_vllm.openai.formats.reader import SPACE, SPECIAL, Markers, Need, Reader, Sink, nowhere

_NOTHING = Markers(())
_FIRST_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")  # the escape of a surrogate pair's first half


def mended(text: str) -> str | None:
    """Repair a text that is one JSON object, list or string, but add no brackets; return None for any other text."""
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
    """Whether a text is one JSON value, without NaN and Infinity."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(name)


def read_text_of_string(reader: Reader, sink: Sink) -> Need[bool]:
    """Parse a quoted string, and emit the arguments in it, which are JSON inside JSON; return whether both are closed.

    Empty text and null mean no arguments. Text after an object is left out; text without one is emitted left-stripped.
    """
    inner, held = Reader(), ""
    run = _read_inner(inner, sink)
    next(run)

    def decoded(text: str) -> None:
        nonlocal held  # `text` is a run of characters or one whole escape
        special = text if SPECIAL.fullmatch(text) else ""  # a special token, which is plain text here
        if special or text == '"':  # one of the outer quotes: inner ones are escaped
            whole, held = held, ""
        else:
            whole, held = (held, text) if _FIRST_HALF.fullmatch(text) else (held + text, "")
        if whole or special:
            inner.feed(SPECIAL.sub("\ufffd", json.loads(f'"{whole}"')) + special)
            next(run)

    closed = yield from read_quoted(reader, decoded)
    inner.end(closed)
    try:
        while True:
            next(run)
    except StopIteration as stop:
        return closed and bool(stop.value)


def _read_inner(reader: Reader, sink: Sink) -> Need[bool]:
    """Parse the text of a string that contains arguments."""
    yield
    yield from reader.skip_space()
    if (yield from reader.peek()) == "{":
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
