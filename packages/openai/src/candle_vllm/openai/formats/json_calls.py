# SPDX-License-Identifier: MIT
"""Calls that are JSON objects: `{"name": "f", "arguments": {...}}`, a single one, several, or in a list."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

from candle_vllm.openai.formats.json_text import read_text_of_string
from candle_vllm.openai.formats.json_value import read_string, read_value
from candle_vllm.openai.formats.output import CallSink, call_id
from candle_vllm.openai.formats.reader import SPACE, Markers, Need, Reader, markers, nowhere

NAME_KEYS = ("name", "tool_name", "function", "function_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_IDS = ("id", "tool_call_id", "call_id")
_HARMLESS = ("type", "index", *_IDS)
_MOST_KEY = 1 << 10
_MOST_DEPTH = 4  # nesting of `{"function": {...}}`
_FENCE = "```"
_BRACKETS = re.compile(r"[ \t\r\n}\])]*")


@dataclasses.dataclass(frozen=True)
class JsonCalls:
    """One or more objects, each a call.

    Attributes:
        closers: marks that may follow the calls, and that end unclosed arguments; grammars write the first.
        known_only: whether a call must have an offered tool's name, and arguments; for calls without marks or in code.
        offered_only: whether a call must have the name of a tool of the request or a `silent` name, and an empty list
            is text; for a mark that is a common word.
        silent: names of calls that are parsed, but not emitted, unless the request has such a tool.
        keyed: whether the object has one entry, the tool's name with its arguments (Apertus).
        listed: whether `grammar` writes calls in a list.
        name_key, arguments_key: the keys that this model was trained to write.
        id_key: the key of the call's id, if the model was trained to write one.
        fenced: whether `grammar` writes the objects in a fenced code block.
    """

    closers: tuple[str, ...] = ()
    known_only: bool = False
    offered_only: bool = False
    silent: tuple[str, ...] = ()
    keyed: bool = False
    listed: bool = False
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    fenced: bool = False

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        """See `layout.Body.read`; an empty list, or a call of a `silent` name, may give True without any event."""
        before, found = calls.count, False
        yield from reader.skip_space()
        fence = "" if self.known_only else (yield from reader.take("```json", _FENCE))
        yield from reader.skip_space()
        ends = dict.fromkeys(((_FENCE,) if fence else self.closers, self.closers))
        stops = markers(*itertools.chain(*ends))
        listed = (yield from reader.peek()) == "["
        if listed:
            reader.at += 1
        while True:
            yield from reader.skip_space()
            if (yield from reader.peek()) != "{":
                break
            one = _ObjectReader(self, reader, calls, stops).read()
            if not (yield from reader.attempt(one, back=calls.count > before)):
                if calls.count == before or reader.cut or self.known_only:
                    return calls.count > before
                start = len(reader.since_mark())
                yield from read_value(reader, nowhere, stops)
                calls.between(reader.since_mark()[start:])
            found = True
            yield from reader.skip_space()
            while listed and (yield from reader.take("}")):  # a surplus bracket
                yield from reader.skip_space()
            yield from reader.take(",", ";")
        if not found:
            words = self.known_only or self.offered_only
            if not listed or words or not (yield from reader.take("]")):
                return False
            yield from skip_closers(reader, self.closers)
            return True
        if listed:
            yield from reader.take("]")
        for closers in ends:
            yield from skip_closers(reader, closers)
        return True


def skip_closers(reader: Reader, closers: tuple[str, ...]) -> Need[None]:
    """Skip closing marks, white space between them, and the beginning of a mark at the end of truncated text.

    Surplus closing brackets before a mark or at the end are skipped, too.
    """
    if not any(closer.startswith(tuple("}])")) for closer in closers):
        yield from _skip_brackets(reader, closers)
    while closers:
        yield from reader.skip_space()
        if (yield from reader.take(*closers)) in ("", _FENCE):  # after a fence, another fence opens the next block
            break
    reader.drop_begun(*closers)


def _skip_brackets(reader: Reader, closers: tuple[str, ...]) -> Need[None]:
    parts: list[str] = []
    yield from reader.match(_BRACKETS, parts.append)
    text = "".join(parts)
    closer = (yield from reader.take(*closers)) if closers and text.strip(SPACE) else ""
    reader.put_back(closer)
    rest = reader.text[reader.at :]
    begun = reader.ended and any(one.startswith(rest) for one in closers)
    if not (text.strip(SPACE) and (closer or begun or not (yield from reader.peek()))):
        reader.put_back(text)


class _ObjectReader:
    def __init__(self, shape: JsonCalls, reader: Reader, calls: CallSink, stops: Markers) -> None:
        self._shape = shape
        self._reader = reader
        self._calls = calls
        self._stops = stops
        self._name = ""
        self._id = ""
        self._early: list[str] | None = None  # arguments that precede the name
        self._begun = False
        self._whole = True
        self._closed = False  # whether the object's last bracket was read

    def read(self) -> Need[bool]:
        reader = self._reader
        reader.at += 1
        yield from reader.skip_space()
        doubled = yield from reader.take("{")  # as in the example in Qwen2.5's template
        sound = yield from self._entries()
        if doubled and sound:
            yield from reader.skip_space()
            yield from reader.take("}")
        if not self._begun and sound and self._name and (self._early is not None or not self._shape.known_only):
            yield from self._begin(None)
        if self._begun:
            self._calls.end(self._whole and (self._closed or reader.lenient))
        return self._begun

    def _entries(self, depth: int = 1) -> Need[bool]:
        """Parse the entries; return whether they end with the closing bracket, or with the text if a call has begun."""
        reader = self._reader
        while True:
            yield from reader.skip_space()
            mark = yield from reader.peek()
            if mark == "}":
                reader.at += 1
                self._closed = depth == 1
                return True
            if mark == ",":
                reader.at += 1
                continue
            if not mark or mark not in "\"'":
                return self._begun and not mark
            key = yield from read_string(reader, _MOST_KEY)
            yield from reader.skip_space()
            if key is None or not (yield from reader.take(":")):
                return False
            yield from reader.skip_space()
            if not (yield from self._entry(key, depth)):
                return False

    def _entry(self, key: str, depth: int) -> Need[bool]:
        reader, shape = self._reader, self._shape
        if shape.keyed and not self._name:
            self._name = key
            return self._may_call() and (yield from self._arguments())
        mark = yield from reader.peek()
        if key in NAME_KEYS and not self._name and not self._begun:
            if mark == "{" and key == "function" and depth < _MOST_DEPTH:  # in OpenAI's form the call is one level down
                reader.at += 1
                return (yield from self._entries(depth + 1))
            self._name = ((yield from read_string(reader, _MOST_KEY)) or "").strip()
            return self._may_call()
        if key in ARGUMENT_KEYS and not self._begun and self._early is None:
            return (yield from self._arguments())
        if key in _IDS and mark and mark in "\"'" and not self._begun:
            self._id = (yield from read_string(reader, _MOST_KEY)) or ""
            return True
        if shape.known_only and not self._begun and key not in _HARMLESS:
            return False
        if mark in (",", "}"):
            return True
        return (yield from read_value(reader, nowhere, self._stops))

    def _may_call(self) -> bool:
        """Whether the object may be a call by its name; a call of a `silent` name is parsed without events."""
        shape, calls = self._shape, self._calls
        if self._name in calls.tools:
            return True
        if self._name in shape.silent:
            self._calls = CallSink(nowhere, calls.tools, call_id)
            return True
        return not (shape.known_only or shape.offered_only) and calls.is_name(self._name)

    def _arguments(self) -> Need[bool]:
        if self._name:
            return (yield from self._begin(self._calls.arguments))
        self._early = []
        self._whole = yield from self._value(self._early.append)
        return self._whole

    def _begin(self, sink: Callable[[str], object] | None) -> Need[bool]:
        """Begin the call; its arguments were read before, or are passed to `sink`."""
        mark = yield from self._reader.peek()
        if sink is not None and not mark:  # truncated before the arguments
            return False
        self._begun = True
        self._calls.begin(self._name, self._id if self._shape.id_key else "")
        if sink is None:
            self._calls.arguments("".join(self._early or ["{}"]))
            return True
        self._whole = yield from self._value(sink)
        return self._whole

    def _value(self, sink: Callable[[str], object]) -> Need[bool]:
        reader = self._reader
        mark = yield from reader.peek()
        if mark and mark in "\"'":
            return (yield from read_text_of_string(reader, sink))
        if mark in ("{", "["):
            doubled = yield from reader.take("{{")
            reader.put_back(doubled[1:])
            whole = yield from read_value(reader, sink, self._stops)
            if doubled and whole:
                yield from reader.skip_space()
                yield from reader.take("}")
            return whole
        if mark in (",", "}"):
            sink("{}")
            return True
        scalar: list[str] = []
        whole = yield from read_value(reader, scalar.append, self._stops)
        text = "".join(scalar)
        sink("{}" if text in ("null", "") else text)
        return whole
