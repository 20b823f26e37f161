# SPDX-License-Identifier: MIT
"""Calls whose arguments are tagged texts: `<function=f><parameter=a>1</parameter></function>` and similar formats."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

from candle_vllm.openai.formats.json_calls import ARGUMENT_KEYS, skip_closers
from candle_vllm.openai.formats.json_value import read_value
from candle_vllm.openai.formats.output import CallSink
from candle_vllm.openai.formats.reader import SPACE, SPACES, SPECIAL, Need, Reader, Sink, markers, nowhere
from candle_vllm.openai.formats.values import JSON_TYPES, Kinds, argument_kinds, escaped, kinds_of, to_json

_SHORT = frozenset({"integer", "number", "boolean", "null"})


@dataclasses.dataclass(frozen=True)
class Tagged:
    """A function name and tagged arguments, whose types the tool's schema determines.

    Attributes:
        name_open, name_end: marks around the name; if `name_open` is "", the name follows the opening mark.
        name_head: pattern of the attributes in the name's tag; its group `name` is the name.
        key_open, key_end: marks around the key.
        value_open: mark between key and value.
        type_open, type_end: marks around the value's JSON type, which may precede `value_open`.
        value_end: mark after the value; valid only before another key, the end of the call, or the end of the text.
        call_end: mark after the last value.
        closers: marks that may follow the calls; grammars write the first.
        head: pattern of the attributes in the key's tag; its groups are `key` and either `text` ("true" for a string,
            "false" for JSON) or `type` (a JSON type).
        newlines: whether the line breaks around a value are removed: the first, and the last if there was a first.
        text_open, text_end: marks around a text that may contain tags (XML's CDATA).
        tight: spellings of `name_open` (the first) and `key_open` without a space, which models also write.
        known_only: whether a call must name an offered tool, and arguments or the end of the call must follow. This is
            for formats without an opening mark; `std::function<function=f>` is text.
    """

    name_open: str
    name_end: str
    key_open: str
    key_end: str
    value_end: str
    call_end: str
    closers: tuple[str, ...] = ()
    value_open: str = ""
    type_open: str = ""
    type_end: str = ""
    name_head: str = ""
    head: str = ""
    newlines: bool = False
    text_open: str = ""
    text_end: str = ""
    tight: tuple[str, ...] = ()
    known_only: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Marks that begin a call."""
        return (self.name_open, *self.tight[:1]) if self.name_open else ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Marks that begin an argument."""
        return (self.key_open, *self.tight[1:])

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        before = calls.count
        while (yield from reader.attempt(self._call(reader, calls), back=calls.count > before)):
            yield from reader.skip_space()
            if not self.name_open or self.known_only:
                break
        if calls.count == before:
            return False
        if self.closers:
            yield from skip_closers(reader, (*self.closers, self.value_end))
        reader.drop_begun(*self.names, *self.keys, self.value_end, self.call_end, *self.closers)
        return True

    def _call(self, reader: Reader, calls: CallSink) -> Need[bool]:
        yield from reader.skip_space()
        if self.names and not (yield from reader.take(*self.names)):
            reader.drop_begun(*self.names)
            return False
        first = "" if self.name_open else self.key_open
        name, mark = yield from reader.name(markers(self.name_end, first, self.call_end, "" if self.name_open else "{"))
        name = name.strip(SPACE)
        if self.name_head and (match := re.fullmatch(self.name_head, name)):
            name = match["name"]
        if not calls.is_name(name) or not (mark or (reader.whole and not self.name_open)):
            return False
        if mark in (first, self.call_end, "{"):
            reader.put_back(mark)
        if self.known_only and (name not in calls.tools or not (yield from self._goes_on(reader))):
            return False
        calls.begin(name)
        calls.end((yield from _Arguments(self, reader, calls, name).read()))
        return True

    def _goes_on(self, reader: Reader) -> Need[bool]:
        yield from reader.skip_space()
        found = yield from reader.take(*self.keys, self.call_end, "{")
        reader.put_back(found)
        reader.drop_begun(*self.keys, self.call_end)
        return bool(found)


class _Arguments:
    def __init__(self, shape: Tagged, reader: Reader, calls: CallSink, name: str) -> None:
        self._shape = shape
        self._reader = reader
        self._calls = calls
        self._schema = calls.tools.get(name, {})
        self._keys: set[str] = set()

    def read(self) -> Need[bool]:
        shape, reader, emit = self._shape, self._reader, self._calls.arguments
        yield from reader.skip_space()
        if (yield from reader.peek()) == "{":  # models write all arguments as one JSON object by mistake
            closed = yield from read_value(reader, emit, markers(shape.call_end, *shape.closers))
            if closed:
                yield from reader.skip_space()
                yield from reader.take(shape.call_end)
            return closed
        closed = True
        while closed:
            yield from reader.skip_space()
            mark = yield from reader.take(*shape.keys, shape.value_end, shape.call_end, *shape.closers)
            if mark == shape.value_end:  # a stray mark
                continue
            if mark not in shape.keys:
                closed = bool(mark) or reader.whole or not reader.ended
                break
            closed = yield from self._argument()
        if closed:
            emit("}" if self._keys else "{}")
        return closed

    def _argument(self) -> Need[bool]:
        """Parse one key and its value; False if the text was truncated inside, or the key is too long."""
        shape, reader = self._shape, self._reader
        head, mark = yield from reader.name(markers(shape.key_end))
        declared = ""
        if mark and shape.value_open:
            yield from reader.skip_space()
            if shape.type_open and (yield from reader.take(shape.type_open)):
                declared, _ = yield from reader.name(markers(shape.type_end))
                yield from reader.skip_space()
            if not (yield from reader.take(shape.value_open)):
                return (yield from self._unopened(head))
        if not mark:
            return reader.whole
        key, kinds = self._key(head)
        kinds = kinds_of(declared) if declared in JSON_TYPES else kinds
        if not kinds.is_string and self._may_wrap(key):
            return (yield from self._wrapped(key, kinds))
        sink = self._begin(key)
        if shape.text_open:
            if (yield from reader.take(shape.text_open)):
                return (yield from self._plain_text(sink))
            if reader.drop_begun(shape.text_open) or reader.cut:
                return False
        return (yield from self._text(sink) if kinds.is_string else self._other(sink, kinds))

    def _may_wrap(self, key: str) -> bool:
        """Whether the argument `key`, which the tool does not have, may be an object of all of the tool's arguments."""
        properties = self._schema.get("properties")
        return key in ARGUMENT_KEYS and isinstance(properties, Mapping) and bool(properties) and key not in properties

    def _wrapped(self, key: str, kinds: Kinds) -> Need[bool]:
        """Parse a value that may be an object of the tool's arguments; False if the text was truncated inside."""
        parts: list[str] = []
        if (yield from self._value(_Inner(parts.append, self._shape), short=False)):
            value = to_json("".join(parts), kinds)
            found = json.loads(value)
            if isinstance(found, dict) and found.keys() <= self._schema["properties"].keys():
                for own, one in found.items():
                    self._begin(own)(_quoted(one))
            else:
                self._begin(key)(value)
            return True
        return False

    def _unopened(self, head: str) -> Need[bool]:
        """Parse a value without `value_open`; a key without a value is omitted. False if the text was truncated."""
        shape, reader, parts = self._shape, self._reader, list[str]()
        ends = markers(shape.value_end, *shape.keys, shape.call_end, *shape.closers)
        mark = yield from reader.until(ends, parts.append, inside=True)
        if mark == shape.value_end:
            key, kinds = self._key(head)
            self._begin(key)(to_json("".join(parts), kinds))
        else:
            reader.put_back(mark)
        return bool(mark) or reader.whole

    def _begin(self, key: str) -> Sink:
        """Begin an argument and return the sink of its value; a repeated argument is ignored."""
        if key in self._keys:
            return nowhere
        self._calls.arguments((", " if self._keys else "{") + json.dumps(key, ensure_ascii=False) + ": ")
        self._keys.add(key)
        return self._calls.arguments

    def _key(self, head: str) -> tuple[str, Kinds]:
        match = re.fullmatch(self._shape.head, head.strip(SPACE)) if self._shape.head else None
        if match is None:
            key = head.strip(SPACE)
            return key, argument_kinds(self._schema, key)
        groups = match.groupdict()
        key, is_text, kind = groups["key"], groups.get("text"), groups.get("type")
        if is_text == "true" or kind:
            return key, kinds_of(kind or "string")
        return key, argument_kinds(self._schema, key)._replace(marked=is_text == "false")

    def _text(self, sink: Sink) -> Need[bool]:
        """Parse a string and pass it to the sink as it arrives."""
        sink('"')
        closed = yield from self._value(_Inner(lambda text: sink(escaped(text)), self._shape), short=False)
        if closed:
            sink('"')
        return closed

    def _plain_text(self, sink: Sink) -> Need[bool]:
        sink('"')
        ends = markers(self._shape.text_end)
        mark = yield from self._reader.until(ends, lambda text: sink(escaped(text)), inside=True)
        if mark or self._reader.whole:
            sink('"')
            yield from self._reader.skip_space()
            yield from self._reader.take(self._shape.value_end)
        return bool(mark) or self._reader.whole

    def _other(self, sink: Sink, kinds: Kinds) -> Need[bool]:
        """Parse a value that can only be interpreted when it is complete."""
        parts: list[str] = []
        inner = _Inner(parts.append, self._shape)
        closed = yield from self._value(inner, short=not (kinds.text or kinds.listed) and kinds.types <= _SHORT)
        text = "".join(parts)
        plain = SPECIAL.sub("", text)
        value = to_json(plain, kinds)
        is_text = value == _quoted(plain)
        if closed or (inner.ended and not is_text):  # a number before an incomplete mark is complete
            sink(_quoted(text) if is_text else value)
        return closed

    def _value(self, inner: _Inner, *, short: bool) -> Need[bool]:
        """Parse text up to the end of the value; False if the text was truncated inside.

        A text may contain tags, so an end mark counts only before a possible next mark; a `short` value has no tags.
        """
        marked = yield from self._until_end(inner, short)
        if marked is None:
            return False
        inner.end(marked)
        return True

    def _until_end(self, inner: _Inner, short: bool) -> Need[bool | None]:
        """Return whether the value ended with its mark; None if the text was truncated inside."""
        shape, reader = self._shape, self._reader
        outer = [closer for closer in shape.closers if closer != shape.call_end]
        ends = markers(
            shape.value_end,
            shape.call_end if outer or short else "",
            *(shape.keys if shape.newlines or short else ()),
            *(outer if short else ()),
        )
        last = ""

        def text(part: str) -> None:
            nonlocal last
            last = part[-1:]
            inner.add(part)

        while True:
            mark = yield from reader.until(ends, text, inside=True)
            if not mark:
                inner.ended = bool(reader.begun)
                return False if reader.whole else None
            if mark != shape.value_end and short:
                reader.put_back(mark)
                return False
            if mark in shape.keys:
                if last == "\n" and (yield from self._new_key()):
                    reader.put_back(mark)
                    return False
                if reader.cut:
                    return None
                text(mark)
                continue
            spaces: list[str] = []
            yield from reader.match(SPACES, spaces.append)
            next_ones = (*shape.keys, shape.call_end, *shape.closers) if mark == shape.value_end else outer
            following = yield from reader.take(*next_ones)
            reader.put_back(following)
            rest = reader.text[reader.at : reader.at + max(map(len, next_ones))] if next_ones else ""
            if following or (not rest and reader.whole):
                return mark == shape.value_end
            if reader.ended and not reader.whole and any(one.startswith(rest) for one in next_ones):
                inner.ended = True
                return None
            text(mark + "".join(spaces))

    def _new_key(self) -> Need[bool]:
        """Whether the key of another argument follows; a complete key is not consumed."""
        reader = self._reader
        head, mark = yield from reader.name(markers(self._shape.key_end))
        if not mark and reader.cut:
            return False
        reader.put_back(head + mark)
        key, properties = self._key(head)[0], self._schema.get("properties")
        return bool(mark) and key not in self._keys and isinstance(properties, Mapping) and key in properties


class _Inner:
    """A value without the line breaks around it.

    Attributes:
        ended: whether the text was truncated after what is probably the whole value.
    """

    def __init__(self, sink: Sink, shape: Tagged) -> None:
        self._sink = sink
        self._newlines = self._first = shape.newlines
        self._paired = False  # whether a line break precedes the value
        self._held = ""
        self.ended = False

    def add(self, text: str) -> None:
        if self._first:
            self._first = False
            self._paired = text.startswith("\n")
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if self._newlines and text.endswith("\n") else ""
        if text := text.removesuffix(self._held):
            self._sink(text)

    def end(self, marked: bool) -> None:
        """End the value. Without its end mark (not `marked`), a line break after it belongs to the next mark."""
        if self._held and marked and not self._paired:
            self._sink(self._held)


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
