# SPDX-License-Identifier: MIT
"""Calls written as Python: `[get_weather(city="Paris", days=2), get_time()]`."""

from __future__ import annotations

import dataclasses
import json
import re

from candle_vllm.openai.formats.json_calls import skip_closers
from candle_vllm.openai.formats.json_text import is_json
from candle_vllm.openai.formats.output import CallSink
from candle_vllm.openai.formats.reader import SPACE, SPACES, Need, Reader
from candle_vllm.openai.formats.values import python_value

_NAMES = re.compile(r"[\w.\-:/]*")
_KEY = re.compile(r"[A-Za-z_]\w{0,255}")
_PLAIN = re.compile(r"[^\"'()\[\]{},=\ud800-\udfff]*")
_STRING = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_SUM = re.compile(rf"{_STRING}(?:\s*\+\s*{_STRING})+", re.DOTALL)
_ONE = re.compile(_STRING, re.DOTALL)
_IN_STRING = {quote: re.compile(rf"[^\\{quote}]*") for quote in "\"'"}
_OPEN, _CLOSE = "([{", ")]}"
_BEHIND, _INSIDE = ",)+", ",)]}:+"  # what may follow a keyword argument's string, and any other string
_KEYS = re.compile(r"[^\s\"'()\[\]{},=\ud800-\udfff]*")
_WORDS = {"true": "true", "false": "false", "null": "null"}
_METHOD = ".call"  # Llama 3.1 calls its built-in tools `brave_search.call(...)`


@dataclasses.dataclass(frozen=True)
class Pythonic:
    """Calls with keyword arguments, in a list or on separate lines.

    Attributes:
        closers: marks that may follow the calls; grammars write the first.
        known_only: whether a call must have the name of a tool of the request; for calls without an opening mark.
        listed: whether the grammar writes calls in a list, and the parser requires it with `known_only`.
    """

    closers: tuple[str, ...] = ()
    known_only: bool = False
    listed: bool = True

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        before = calls.count
        yield from reader.skip_space()
        listed = bool((yield from reader.take("[")))
        if self.known_only and self.listed and not listed:
            return False
        while (yield from reader.attempt(self._call(reader, calls), back=calls.count > before)):
            yield from reader.skip_space()
            yield from reader.take(",", ";")
        if calls.count == before:
            return False
        if listed:
            yield from reader.take("]")
        yield from skip_closers(reader, self.closers)
        return True

    def _call(self, reader: Reader, calls: CallSink) -> Need[bool]:
        yield from reader.skip_space()
        read: list[str] = []
        yield from reader.match(_NAMES, read.append)
        mark = yield from reader.take("(")
        name = "".join(read).removesuffix(_METHOD)
        if not mark or not calls.is_name(name) or (self.known_only and name not in calls.tools):
            return False
        calls.begin(name)
        calls.end((yield from _Arguments(reader, calls, name).read()))
        return True


class _Arguments:
    def __init__(self, reader: Reader, calls: CallSink, name: str) -> None:
        self._reader = reader
        self._calls = calls
        properties = calls.tools.get(name, {}).get("properties")
        self._order = list(properties) if isinstance(properties, dict) else []
        self._keys: set[str] = set()

    def read(self) -> Need[bool]:
        """Parse the arguments up to a bracket, a special token or the end; return False if they were truncated."""
        while True:
            text, end = yield from self._piece()
            key = ""
            if end == "=" and (_KEY.fullmatch(text) or text in self._order):
                key = text
                text, end = yield from self._piece(inside=True)
            if not end and not self._reader.whole:
                return False
            if text:
                place = f"argument_{len(self._keys)}"  # of a positional argument that the tool does not have
                key = key or next((one for one in self._order if one not in self._keys), place)
            if text and key not in self._keys:
                self._calls.arguments((", " if self._keys else "{") + json.dumps(key, ensure_ascii=False) + ": ")
                self._keys.add(key)
                self._calls.arguments(_to_json(text))
            if end not in (",", "="):
                break
        self._calls.arguments("}" if self._keys else "{}")
        return True

    def _piece(self, inside: bool = False) -> Need[tuple[str, str]]:
        """Return text and the mark after it: ",", ")", "=" unless `inside` a value, an unread special token, or ""."""
        reader, parts, stack = self._reader, list[str](), list[str]()
        while True:
            yield from reader.match(_PLAIN, parts.append)
            mark = yield from reader.peek()
            if not mark:
                return "".join(parts).strip(SPACE), ""
            if not stack and (mark in ",)" or (mark == "=" and not inside)):
                reader.at += 1
                return "".join(parts).strip(SPACE), mark
            if mark in "\"'":
                yield from self._string(mark, parts, keyed=inside and not stack)
                continue
            if "\ud800" <= mark <= "\udfff":  # a special token: the call has ended
                return "".join([*parts, *reversed(stack)]).strip(SPACE), mark
            reader.at += 1
            parts.append(mark)
            if mark in _OPEN:
                stack.append(_CLOSE[_OPEN.index(mark)])
            elif mark in _CLOSE and stack:
                stack.pop()

    def _string(self, quote: str, parts: list[str], *, keyed: bool) -> Need[None]:
        """Parse a string in single or triple quotes; escape the quotes in it that the model did not escape."""
        reader = self._reader
        mark = yield from reader.take(quote * 3, quote)
        parts.append(mark)
        while True:
            yield from reader.match(_IN_STRING[quote], parts.append)
            found = yield from reader.peek()
            if not found:
                return
            if found == "\\":
                while len(reader.text) - reader.at < 2 and not reader.ended:
                    yield
                parts.append(reader.text[reader.at : reader.at + 2])
                reader.at = min(reader.at + 2, len(reader.text))
            elif not (yield from reader.take(mark)):
                reader.at += 1
                parts.append(found)
            elif len(mark) > 1 or (yield from self._closes(keyed)):
                parts.append(mark)
                return
            else:
                parts.append("\\" + mark)

    def _closes(self, keyed: bool) -> Need[bool]:
        """Whether a quote ends a string, by the text after it; more text is examined in a keyword argument's value."""
        reader, read = self._reader, list[str]()
        yield from reader.match(SPACES, read.append)
        following = yield from reader.peek()
        closes = not following or following in (_BEHIND if keyed else _INSIDE) or "\ud800" <= following <= "\udfff"
        closes = closes or (bool(read) and following in "\"'")
        if keyed and following and following in ",)":
            read.append(reader.next(1))
            yield from reader.match(SPACES, read.append)
            if following == ",":
                yield from reader.match(_KEYS, read.append)
                yield from reader.match(SPACES, read.append)
                closes = (yield from reader.peek()) in ("=", ")", "")
            else:
                closes = (yield from reader.peek()) not in ('"', "'")
        if reader.cut:  # too little text to decide
            return True
        reader.put_back("".join(read))
        return closes


def _to_json(text: str) -> str:
    """Convert a text to JSON: a value of Python or JSON, or else a string."""
    word = _WORDS.get(text)
    if word is not None:
        return word
    value = python_value(text)
    if value is None and _SUM.fullmatch(text):
        return json.dumps("".join(json.loads(_to_json(one)) for one in _ONE.findall(text)), ensure_ascii=False)
    if value is None and len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":  # a string with raw line breaks
        value = python_value(text.replace("\n", "\\n")) or json.dumps(text[1:-1], ensure_ascii=False)
    if value is not None:
        return value
    return text if is_json(text) else json.dumps(text, ensure_ascii=False)
