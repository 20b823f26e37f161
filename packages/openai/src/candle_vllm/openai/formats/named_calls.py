# SPDX-License-Identifier: MIT
"""Calls whose name precedes the arguments: `[TOOL_CALLS]f[ARGS]{...}`, `<function=f>{...}</function>`, or code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from candle_vllm.openai.formats.json_calls import skip_closers
from candle_vllm.openai.formats.json_text import read_text_of_string
from candle_vllm.openai.formats.json_value import read_value
from candle_vllm.openai.formats.output import CallSink
from candle_vllm.openai.formats.reader import SPACE, Markers, Need, Reader, markers, nowhere
from candle_vllm.openai.formats.values import argument_kinds, escaped


@dataclasses.dataclass(frozen=True)
class NamedJson:
    """Calls that are a name, a mark, and arguments as JSON.

    Attributes:
        before_name: texts that may precede the name (DeepSeek's type, Kimi's name space); grammars write the first.
        name_end: the mark between name and arguments; "" if the arguments' bracket follows the name.
        between: marks that may follow `name_end`, before the arguments.
        id_mark: the mark between the name and an id before `name_end` (Mistral).
        id_end: the mark between an id and the name after it (Solar).
        counted: whether a number follows the name, and both are the call's id: `functions.f:0` (Kimi).
        fenced: whether arguments are in a fenced code block (DeepSeek V3).
        closers: marks after the arguments.
        closed: number of `closers` that `grammar` writes.
    """

    before_name: tuple[str, ...] = ()
    name_end: str = ""
    between: tuple[str, ...] = ()
    id_mark: str = ""
    id_end: str = ""
    counted: bool = False
    fenced: bool = False
    closers: tuple[str, ...] = ()
    closed: int = 1

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        yield from reader.skip_space()
        first_id = prefix = ""
        if self.id_end:
            first_id, mark = yield from reader.name(markers(self.id_end))
            if not mark:
                return False
        if self.before_name:
            prefix = yield from reader.take(*self.before_name)
        head = yield from self._head(reader)
        if head is None:
            return False
        name, given_id = head[0], head[1] or first_id
        if self.counted:
            match = _COUNTED.fullmatch(name)
            given_id = prefix + name if match else ""
            name = match[1] if match else name
        if not calls.is_name(name) or not (yield from self._arguments(reader, calls, name, given_id)):
            return False
        yield from skip_closers(reader, self.closers)
        return True

    def _head(self, reader: Reader) -> Need[tuple[str, str] | None]:
        """Return name and id if `name_end`, "{" or a closer follows; only `name_end` is consumed. Otherwise None."""
        name, mark = yield from reader.name(markers(self.name_end, self.id_mark, "{", *self.closers))
        given_id = ""
        if self.id_mark and mark == self.id_mark:
            given_id, mark = yield from reader.name(markers(self.name_end, "{"))
        if mark == "{" or mark in self.closers:
            reader.put_back(mark)
        return (name.strip(SPACE), given_id.strip(SPACE)) if mark else None

    def _arguments(self, reader: Reader, calls: CallSink, name: str, given_id: str) -> Need[bool]:
        yield from reader.skip_space()
        while self.between and (yield from reader.take(*self.between)):
            yield from reader.skip_space()
        fence = self.fenced and bool((yield from reader.take(*_FENCES)))
        if fence:
            yield from reader.skip_space()
        certain = fence or self.name_end not in _COMMON  # what follows is arguments, even if it is a list or null
        mark = yield from reader.peek()
        if mark == '"':
            calls.begin(name, given_id)
            calls.end((yield from read_text_of_string(reader, calls.arguments)))
        elif mark == "{" or (mark == "[" and certain):
            calls.begin(name, given_id)
            calls.end((yield from read_value(reader, calls.arguments, markers(*self.closers))))
        elif (yield from self._nothing(reader, certain, fence)):
            calls.begin(name, given_id)
            calls.arguments("{}")
            calls.end()
        else:
            reader.drop_begun(*(("json", *_FENCES) if self.fenced else ()), *self.between)
            return False
        if fence:
            yield from skip_closers(reader, ("```",))
        return True

    def _nothing(self, reader: Reader, certain: bool, fence: bool) -> Need[bool]:
        """Whether there are no arguments, or null in their place, which is consumed."""
        word = (yield from reader.take("null")) if certain else ""
        yield from reader.skip_space()
        ends = (*self.closers, *(("```",) if fence else ()))
        end = (yield from reader.take(*ends)) if ends else ""
        reader.put_back(end)
        if end:
            return True
        following = yield from reader.peek()
        return reader.whole if not following else bool(word) and not ends and not _WORD.match(following)


_FENCES = ("```json", "```")
_COMMON = ("", ">", "\n")  # marks that may also follow a word that is not a call
_WORD = re.compile(r"\w")
_COUNTED = re.compile(r"([\w.\-:/]+):\d+")


CODE_TOOLS = ("python", "ipython", "code_interpreter")


class RawArgument:
    """Converts a call's text that is not a JSON object to arguments.

    The text is the value of the argument that `text_argument` names. Without such an argument, the text is passed on
    unchanged, so that the caller sees what the model wrote. Without text there are no arguments.
    """

    def __init__(self, calls: CallSink, key: str) -> None:
        self._emit = calls.arguments
        self._key = key
        self._empty = True

    def add(self, text: str) -> None:
        if self._empty and self._key:
            self._emit("{" + json.dumps(self._key, ensure_ascii=False) + ': "')
        self._empty = False
        self._emit(escaped(text) if self._key else text)

    def end(self) -> None:
        if self._empty:
            self._emit("{}")
        elif self._key:
            self._emit('"}')


def text_argument(name: str, schema: Mapping[str, Any]) -> str:
    """Return the name of a tool's only argument if it may be a string; else "code" for `CODE_TOOLS`, "" for others."""
    properties = schema.get("properties")
    keys = list(properties) if isinstance(properties, Mapping) else []
    if len(keys) == 1 and ((kinds := argument_kinds(schema, keys[0])).text or kinds.listed):
        return keys[0]
    return "code" if name in CODE_TOOLS else ""


def read_arguments(reader: Reader, calls: CallSink, name: str, stops: Markers) -> Need[None]:
    """Parse a call's arguments up to one of the marks, which is not consumed; an invalid name gives no call."""
    yield from reader.skip_space()
    start = yield from reader.peek()
    if calls.is_name(name) and (start or reader.whole):
        calls.begin(name)
        if start == "{":
            calls.end((yield from read_value(reader, calls.arguments, stops)))
        else:
            calls.end((yield from _read_raw(reader, calls, text_argument(name, calls.tools.get(name, {})), stops)))
    reader.put_back((yield from reader.until(stops, nowhere)))


def _read_raw(reader: Reader, calls: CallSink, key: str, stops: Markers) -> Need[bool]:
    """Parse text up to one of the marks, which is not consumed; return False if the text was truncated."""
    raw = RawArgument(calls, key)
    mark = yield from reader.until(stops, raw.add, inside=True)
    reader.put_back(mark)
    closed = bool(mark) or reader.whole
    if closed:
        raw.end()
    return closed


@dataclasses.dataclass(frozen=True)
class RawCode:
    """Calls of a tool that runs code, written as the code alone: Llama 3's `<|python_tag|>print(1)`.

    Attributes:
        names: names of such tools; the first one that the request offers is called.
        closers: marks that end the code.
    """

    names: tuple[str, ...] = CODE_TOOLS
    closers: tuple[str, ...] = ()

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        """Parse code after the opening mark; return False if no such tool is offered, or if the text is not code.

        Truncated text that may be the beginning of a call in another format is no call.
        """
        name = next((name for name in self.names if name in calls.tools), "")
        unclear = reader.ended and not reader.whole
        yield from reader.skip_space()
        start = yield from reader.peek()
        if not name or unclear or not start or start in "{<":
            return False
        calls.begin(name)
        key = text_argument(name, calls.tools[name]) or "code"
        calls.end((yield from _read_raw(reader, calls, key, markers(*self.closers))))
        yield from skip_closers(reader, self.closers)
        return True
