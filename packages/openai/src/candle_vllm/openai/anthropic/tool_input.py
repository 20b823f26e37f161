# SPDX-License-Identifier: MIT
"""Streamed arguments of a call -> JSON text of an object that is never invalid (step 10 of a request's life).

Anthropic's clients parse a call's input while it streams, and fail on invalid JSON, which models may generate. So a
string at the top level of the object is sent as it arrives, with control characters and wrong escapes repaired; any
other value is sent when it is complete, and a name with its value. A comma before the closing brace and text after it
are left out. If the text is otherwise no JSON object, all of it becomes a member `INVALID_JSON`, which no tool's schema
has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from candle_vllm.core.text.template_needs import INVALID
from candle_vllm.openai.json_body import MAX_DEPTH, is_deeper

_SPACE = " \t\r\n"
_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')
_STRUCTURE = re.compile(r'["\[\]{}]')
_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)  # a string's rest, or the part that has arrived
_SCALAR_END = re.compile(r"[,}\s]")
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_UNIT = re.compile(r"\\u[0-9a-fA-F]{4}")
_ESCAPES = '"\\/bfnrt'
_REPLACED = "\\ufffd"  # replaces half of a surrogate pair


class _Broken(Exception):
    """The text is not a JSON object."""


class ToolInput:
    """Converts the arguments of one call."""

    def __init__(self) -> None:
        self._raw: list[str] = []
        self._text = ""  # text that has arrived and is not consumed
        self._held = ""  # text before the next value, which is returned together with that value
        self._scan = _Scan()
        self._has_members = self._begun = self._complete = self._in_text = self._broken = False
        self._state: Callable[[list[str]], bool] = self._begin

    def feed(self, text: str) -> str:
        """Add a delta of the arguments; return the text that can be sent."""
        self._raw.append(text)
        if self._broken or self._complete:
            return ""
        self._text += text
        parts: list[str] = []
        try:
            while not self._complete and (self._in_text or self._skip()) and self._state(parts):
                pass
        except _Broken:
            self._broken = True
        return "".join(parts)

    def finish(self, *, cut: bool) -> str:
        """End the call, and return the rest of its text. A call that was `cut` while valid stays incomplete."""
        raw = "".join(self._raw)
        if self._complete or (not self._broken and (cut or not raw.strip())):
            return ""
        bridge = '"' if self._in_text else ""
        bridge += ", " if self._has_members or self._in_text else ""
        readable = raw.encode(errors="replace").decode()  # halves of surrogate pairs cannot be sent
        member = f"{json.dumps(INVALID)}: {json.dumps(readable)}"
        return f"{bridge if self._begun else '{'}{member}}}"

    # Each state consumes what it can of the text; it returns False if it needs more text, or the object is complete.
    # Outside of strings, the text is not empty and does not begin with white space.

    def _begin(self, parts: list[str]) -> bool:
        self._take("{")
        parts.append("{")
        self._begun = True
        self._state = self._name
        return True

    def _name(self, parts: list[str]) -> bool:
        if self._text[0] == "}":
            return self._close(parts)
        if self._text[0] != '"':
            raise _Broken
        end = self._scan.end(self._text)
        if end is None:
            return False
        _check(self._text[:end])
        self._held += f"{self._text[:end]}: "
        self._text, self._scan = self._text[end:], _Scan()
        self._state = self._colon
        return True

    def _colon(self, _: list[str]) -> bool:
        self._take(":")
        self._state = self._value
        return True

    def _value(self, parts: list[str]) -> bool:
        if self._text[0] == '"':
            parts.append(self._held + '"')
            self._held, self._text = "", self._text[1:]
            self._in_text = True
            self._state = self._string
            return True
        end = self._scan.end(self._text)
        if end is None:
            return False
        _check(self._text[:end])
        parts.append(self._held + self._text[:end])
        self._text = self._text[end:]
        return self._end_of_member()

    def _string(self, parts: list[str]) -> bool:
        text, at = self._text, 0
        while True:
            plain = _PLAIN.match(text, at)
            assert plain is not None
            parts.append(plain[0])
            at = plain.end()
            if text[at : at + 1] == '"':
                parts.append('"')
                self._text, self._in_text = text[at + 1 :], False
                return self._end_of_member()
            said, length = _escaped(text[at : at + 12]) if at < len(text) else ("", 0)
            if not length:
                self._text = text[at:]
                return False
            parts.append(said)
            at += length

    def _end_of_member(self) -> bool:
        self._held, self._scan, self._has_members = "", _Scan(), True
        self._state = self._next
        return True

    def _next(self, parts: list[str]) -> bool:
        if self._text[0] == "}":
            return self._close(parts)
        self._take(",")
        self._held = ", "
        self._state = self._name
        return True

    def _close(self, parts: list[str]) -> bool:
        parts.append("}")
        self._complete = True
        return False

    def _skip(self) -> bool:
        self._text = self._text.lstrip(_SPACE)
        return bool(self._text)

    def _take(self, character: str) -> None:
        if self._text[0] != character:
            raise _Broken
        self._text = self._text[1:]


class _Scan:
    """Searches for the end of a name or value; continues at its position when more text arrives."""

    def __init__(self) -> None:
        self.place = 0
        self._depth = 0
        self._in_string = False

    def end(self, text: str) -> int | None:
        """Return the end of the value at the beginning of `text`; None if the value is not complete."""
        if text[0] not in '[{"':
            match = _SCALAR_END.search(text, self.place)
            self.place = len(text) if match is None else match.start()
            return None if match is None else self.place
        while self.place < len(text):
            if self._in_string:
                string = _IN_STRING.match(text, self.place)
                assert string is not None
                self.place, self._in_string = string.end(), not string[1]
                if self._in_string:
                    return None
            else:
                match = _STRUCTURE.search(text, self.place)
                self.place = len(text) if match is None else match.end()
                if match is None:
                    return None
                self._in_string = match[0] == '"'
                self._depth += 0 if self._in_string else 1 if match[0] in "[{" else -1
            if self._depth == 0 and not self._in_string:
                return self.place
        return None


def _escaped(text: str) -> tuple[str, int]:
    """Return what replaces the first escape or character, and the length of the latter; 0 if more text is needed."""
    if text[0] != "\\":
        return (_REPLACED if text[0] > "\x1f" else json.dumps(text[0])[1:-1]), 1
    if len(text) < 2 or (text[1] == "u" and len(text) < 6):
        return "", 0
    if text[1] in _ESCAPES:
        return text[:2], 2
    if _UNIT.match(text) is None:
        return "\\\\", 1
    if _HIGH.match(text) is not None:
        if len(text) < 12 and '"' not in text:
            return "", 0
        return (text[:12], 12) if _LOW.match(text, 6) else (_REPLACED, 6)
    return (_REPLACED, 6) if _LOW.match(text) else (text[:6], 6)


def _check(text: str) -> None:
    """Raise `_Broken` if the text is not a JSON value that every client can read."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if is_deeper(value, MAX_DEPTH - 1) or _has_wide_integer(value):
            raise _Broken
    except (ValueError, RecursionError):  # halves of surrogate pairs too
        raise _Broken from None


def _has_wide_integer(value: Any) -> bool:
    """Whether the value has an integer of more than 64 bits, which cannot be encoded in answers."""
    if isinstance(value, (dict, list)):
        return any(map(_has_wide_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 64


def parsed_input(text: str) -> dict[str, Any]:
    """Parse the text that was sent for a call, which may be incomplete."""
    return from_json(text, allow_partial=True) if text else {}
