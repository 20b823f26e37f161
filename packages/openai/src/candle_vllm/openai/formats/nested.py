# SPDX-License-Identifier: MIT
"""Calls whose arguments are nested tags: MiniMax M3's `<invoke name="f"><tags><item>a</item></tags></invoke>`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from candle_vllm.openai.formats.json_calls import skip_closers
from candle_vllm.openai.formats.output import CallSink
from candle_vllm.openai.formats.reader import SPACE, Need, Reader, Sink, markers
from candle_vllm.openai.formats.values import Kinds, escaped, schema_kinds, sub_schema, to_json

_MOST_DEPTH = 64
_EMPTY = {"object": "{}", "array": "[]"}


@dataclasses.dataclass(frozen=True)
class Nested:
    """A name, and values between tags; objects and lists are nested tags.

    Attributes:
        tag: mark before every tag, so that no text can be mistaken for a tag.
        call: tag of a call, which has a name.
        item: tag of a list's item.
        closers: marks that may follow the calls; grammars write the first.
    """

    tag: str
    call: str = "invoke"
    item: str = "item"
    closers: tuple[str, ...] = ()

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        before = calls.count
        while True:
            yield from reader.skip_space()
            if not (yield from reader.take(f'{self.tag}<{self.call} name="')):
                break
            name, mark = yield from reader.name(markers('">'))
            if not mark or not calls.is_name(name):
                if calls.count > before and not reader.cut:
                    reader.put_back(f'{self.tag}<{self.call} name="{name}{mark}')
                break
            calls.begin(name)
            calls.arguments("{")
            calls.end((yield from _Arguments(self, reader, calls, name).entries(calls.tools.get(name, {}), 1)))
        if calls.count == before:
            return False
        yield from skip_closers(reader, self.closers)
        reader.drop_begun(f'{self.tag}<{self.call} name="')
        return True


class _Arguments:
    def __init__(self, shape: Nested, reader: Reader, calls: CallSink, name: str) -> None:
        self._shape = shape
        self._reader = reader
        self._emit: Sink = calls.arguments
        self._schema = calls.tools.get(name, {})

    def entries(self, schema: Mapping[str, Any], depth: int, listed: bool = False, first: str = "") -> Need[bool]:
        """Parse tags up to the one that closes the enclosing tag; `first` is the name of a tag that was already read.

        A repeated member of an object is ignored. Return whether that tag was read, or the model had finished.
        """
        reader, key, keys, emit = self._reader, first, set[str](), self._emit
        while True:
            if not key:
                yield from reader.skip_space()
                if (yield from reader.take(f"{self._shape.tag}<")):
                    name, end = yield from reader.name(markers(">"))
                    key = name if end else ""
            if not key and not (reader.whole and reader.ended and reader.at == len(reader.text)):
                return False
            if not key or key.startswith("/"):
                self._emit("]" if listed else "}")
                return True
            if key in keys and not listed:
                self._emit = lambda _: None
            self._emit((", " if keys else "") + ("" if listed else json.dumps(key, ensure_ascii=False) + ": "))
            within = sub_schema(schema, None if listed else key, self._schema)
            if depth >= _MOST_DEPTH or not (yield from self._value(within, depth + 1)):
                return False
            self._emit = emit
            keys.add(key)
            key = ""

    def _value(self, schema: Mapping[str, Any], depth: int) -> Need[bool]:
        reader = self._reader
        kinds = schema_kinds(schema, self._schema)
        text = kinds.is_string
        if text:
            self._emit('"')
        parts: list[str] = []
        sink = (lambda part: self._emit(escaped(part))) if text else parts.append
        mark = yield from reader.until(markers(f"{self._shape.tag}<"), sink, inside=True)
        name, end = (yield from reader.name(markers(">"))) if mark else ("", "")
        if (mark and not end) or not (mark or reader.whole):
            return False
        if not name or name.startswith("/"):
            self._emit('"' if text else _scalar("".join(parts), kinds))
            return True
        if text:  # a string has no entries
            return False
        listed = name == self._shape.item and "array" in kinds.types
        self._emit("[" if listed else "{")
        return (yield from self.entries(schema, depth, listed, name))


def _scalar(text: str, kinds: Kinds) -> str:
    """Convert a value without tags to JSON; empty text is an empty object or list if the schema names that type."""
    is_text = text.strip(SPACE) or text in kinds.listed or kinds.is_anything
    kind = "" if is_text else next((kind for kind in _EMPTY if kind in kinds.types), "")
    return _EMPTY.get(kind) or to_json(text, kinds)
