# SPDX-License-Identifier: MIT
"""Calls in Gemma's form: `call:get_weather{city:<escape>Paris<escape>,days:2}`."""

from __future__ import annotations

import dataclasses
import json
import re

from candle_vllm.openai.formats.json_calls import skip_closers
from candle_vllm.openai.formats.json_value import read_value
from candle_vllm.openai.formats.output import CallSink
from candle_vllm.openai.formats.reader import SPACE, Need, Reader, markers
from candle_vllm.openai.formats.values import ANYTHING, Kinds, argument_kinds, escaped, to_json

_BARE = re.compile(r"[^,{}\[\]\ud800-\udfff]*")
_MOST_DEPTH = 64


@dataclasses.dataclass(frozen=True)
class Gemma:
    """A name and an object, with unquoted keys and numbers, and strings between `quote`s.

    Attributes:
        quote: the mark around a string.
        closers: marks that may follow the call, and that end unclosed arguments; grammars write the first.
        prefix: text before the name.
        known_only: whether a call must have the name of a tool of the request; for calls without an opening mark.
    """

    quote: str
    closers: tuple[str, ...] = ()
    prefix: str = "call:"
    known_only: bool = False

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        before = calls.count
        while True:
            yield from reader.skip_space()
            if not (prefix := (yield from reader.take(self.prefix, ":" + self.prefix))):
                reader.drop_begun(self.prefix)
                break
            text, mark = yield from reader.name(markers("{"))
            name = text.strip(SPACE)
            if not mark or not calls.is_name(name) or (self.known_only and name not in calls.tools):
                if calls.count > before and not reader.cut:
                    reader.put_back(prefix + text + mark)
                break
            calls.begin(name)
            calls.arguments("{")
            calls.end((yield from _Object(self, reader, calls, name).members("}", 1)))
            yield from reader.skip_space()
            yield from reader.take(",")
        if calls.count == before:
            return False
        yield from skip_closers(reader, self.closers)
        return True


class _Object:
    """Parser of one call's arguments, after the opening bracket."""

    def __init__(self, shape: Gemma, reader: Reader, calls: CallSink, name: str) -> None:
        self._quote, self._closers = shape.quote, shape.closers
        self._reader = reader
        self._emit = calls.arguments
        self._schema = calls.tools.get(name, {})

    def members(self, close: str, depth: int) -> Need[bool]:
        """Parse the entries of an object, or the items of a list; return whether `close` or a closer ended them.

        True also if the model had finished.
        """
        reader, between = self._reader, ""
        while True:
            yield from reader.skip_space()
            mark = yield from reader.take(close, ",", *self._closers)
            if mark == ",":
                continue
            found = mark or (yield from reader.peek())
            if mark or (not found and reader.whole):
                reader.put_back(mark if mark != close else "")
                self._emit(close)
                return True
            if not found or (close == "]" and found == "}"):
                return False
            kinds = ANYTHING
            if close == "}":
                key = yield from self._key()
                if key is None:
                    if (yield from self._ends()):  # a key without a value
                        continue
                    return False
                between += json.dumps(key, ensure_ascii=False) + ": "
                kinds = argument_kinds(self._schema, key) if depth == 1 else kinds
            self._emit(between)
            between = ", "
            if not (yield from self._value(depth, kinds)):
                return False

    def _key(self) -> Need[str | None]:
        reader = self._reader
        if (yield from reader.take(self._quote)):
            key, mark = yield from reader.name(markers(self._quote))
            yield from reader.skip_space()
            return key if mark and (yield from reader.take(":")) else None
        key, mark = yield from reader.name(markers(":", ",", "}", *self._closers))
        reader.put_back(mark if mark != ":" else "")
        return key.strip(SPACE).strip("\"'") if mark == ":" else None

    def _ends(self) -> Need[bool]:
        """Whether a comma, a closing bracket or a closer follows; it is not consumed."""
        mark = yield from self._reader.take(",", "}", "]", *self._closers)
        self._reader.put_back(mark)
        return bool(mark)

    def _value(self, depth: int, kinds: Kinds) -> Need[bool]:
        reader = self._reader
        yield from reader.skip_space()
        if (yield from reader.take(self._quote)):
            self._emit('"')
            mark = yield from reader.until(markers(self._quote), lambda text: self._emit(escaped(text)), inside=True)
            if not mark and not reader.whole:
                return False
            self._emit('"')
            return True
        mark = yield from reader.peek()
        if mark == '"':
            return (yield from read_value(reader, self._emit))
        if mark in ("{", "[") and depth < _MOST_DEPTH:
            reader.at += 1
            self._emit(mark)
            return (yield from self.members("}" if mark == "{" else "]", depth + 1))
        parts: list[str] = []
        yield from reader.match(_BARE, parts.append)
        if not (yield from self._ends()) and ((yield from reader.peek()) or not reader.whole):
            return False
        self._emit(to_json("".join(parts).strip(SPACE), kinds._replace(marked=True)))
        return True
