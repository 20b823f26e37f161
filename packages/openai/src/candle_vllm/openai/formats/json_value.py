# SPDX-License-Identifier: MIT
"""One JSON value, passed on while it is received (step 10 of a request's life).

Valid JSON is passed on byte for byte. Mistakes of models that have only one meaning are repaired: raw control
characters and unknown escapes in strings, single quotes, Python's True, False and None, numbers and words that JSON
does not allow, keys without quotes, commas before a closing bracket, and brackets that a finished text lacks.
"""

from __future__ import annotations

import json
import re

from candle_vllm.openai.formats.reader import SPACE, SPACES, SPECIAL, Markers, Need, Reader, Sink

_ESCAPES = 'bfnrtu"\\/'
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null", "undefined": "null"}
_RUNS = {quote: re.compile(rf'[^"\\\x00-\x1f\ud800-\udfff{quote}]*') for quote in ('"', "'")}
_WORD = re.compile(r"[\w+\-.$@/%]*")
_NUMBER = re.compile(r"([+-]?)([0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_CLOSING = {"{": "}", "[": "]"}
_NOTHING = Markers(())


def read_value(reader: Reader, sink: Sink, stops: Markers = _NOTHING) -> Need[bool]:
    """Parse one value, perhaps after white space, and pass its text to `sink`; return whether it is closed.

    Outside of its strings, a marker of `stops` ends the value early, and is not consumed. A value is also closed if
    missing brackets were added.
    """
    yield from reader.skip_space()
    return (yield from _Value(reader, sink, stops).read())


def read_string(reader: Reader, most: int = 1 << 16) -> Need[str | None]:
    """Parse a quoted string, and return its content; None without a quote, or not closed in `most` characters."""
    quote = yield from reader.peek()
    if quote not in ('"', "'") or not quote:
        return None
    parts: list[str] = []
    if not (yield from read_quoted(reader, parts.append, most)):
        return None
    try:
        value = json.loads(SPECIAL.sub("", "".join(parts)))
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def read_quoted(reader: Reader, sink: Sink, most: int = 1 << 30) -> Need[bool]:
    """Parse a string of at most `most` characters to JSON, in runs and whole escapes; return whether it is closed."""
    return (yield from _Value(reader, sink, _NOTHING, most).string())


def number(text: str) -> str | None:
    """Return a number as JSON: no leading zeros or plus, digits on both sides of the point; None for any other text."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or len(match[3] or "") > 1):
        return None
    fraction = match[3] + "0" * (match[3] == ".") if match[3] else ""
    return f"{match[1].strip('+')}{match[2].lstrip('0') or '0'}{fraction}{match[4] or ''}"


class _Value:
    def __init__(self, reader: Reader, sink: Sink, stops: Markers, most: int = 1 << 30) -> None:
        self._reader = reader
        self._sink = sink
        self._stops = stops
        self._open: list[str] = []  # closing brackets that are expected
        self._count = {"}": 0, "]": 0}  # number of expected brackets of each kind
        self._left = most
        self._comma = ""  # a comma and the space after it, held back until the next token is known
        self._state = "value"  # expected token: value, key, colon, or more (a comma or a closing bracket)

    def read(self) -> Need[bool]:
        reader = self._reader
        while True:
            text, at = reader.text, reader.at
            if at == len(text) or text[at] in SPACE:
                yield from reader.match(SPACES, self._space)
                if reader.at == len(reader.text):
                    return reader.whole and self._close()
            character = reader.text[reader.at]
            if character in "\"'":
                self._begin_value()
                if not (yield from self.string()):
                    return False
                self._state = "colon" if self._state == "key" else "more"
            elif self._stops and (yield from self._stopped()):
                return self._close()
            elif self._begun_stop():
                return False
            elif character in "{[}],:":
                reader.at += 1
                self._structure(character)
            else:
                self._begin_value()
                yield from self._word()
            if not self._open and self._state == "more":
                return True

    def string(self) -> Need[bool]:
        reader = self._reader
        quote = reader.text[reader.at]
        reader.at += 1
        self._sink('"')
        while True:
            yield from reader.match(_RUNS[quote], self._run)
            if reader.at == len(reader.text) or self._left < 0:
                return False
            character = reader.text[reader.at]
            if character == quote:
                reader.at += 1
                self._sink('"')
                return True
            if character == "\\":
                if not (yield from self._escape()):
                    return False
            else:
                reader.at += 1  # a special token is its text: marks have no meaning here
                self._run(character if SPECIAL.match(character) else json.dumps(character)[1:-1])

    def _run(self, text: str) -> None:
        self._left -= len(text)
        self._sink(text)

    def _escape(self) -> Need[bool]:
        """Parse a backslash and the escaped character; an unknown escape is plain text, with its backslash."""
        reader = self._reader
        if not (yield from self._ahead(2)):
            return False
        following = reader.text[reader.at + 1]
        if following == "u":
            if not (yield from self._ahead(6)):
                return False
            digits = reader.text[reader.at + 2 : reader.at + 6]
            valid = re.fullmatch("[0-9a-fA-F]{4}", digits) is not None
            self._run(f"\\u{digits}" if valid else "\\\\")
            reader.at += 6 if valid else 1
        elif following in _ESCAPES:
            self._run("\\" + following)
            reader.at += 2
        elif following == "'":
            self._run("'")
            reader.at += 2
        else:
            self._run("\\\\")
            reader.at += 1
        return True

    def _ahead(self, count: int) -> Need[bool]:
        """Wait until `count` characters can be read; consume the rest of a text that ends before."""
        while len(self._reader.text) - self._reader.at < count:
            if self._reader.ended:
                self._reader.at = len(self._reader.text)
                return False
            yield
        return True

    def _word(self) -> Need[None]:
        """Pass on a number, word or unquoted key if it is complete, or else one character that is no special token."""
        parts: list[str] = []
        yield from self._reader.match(_WORD, parts.append)
        word = "".join(parts)
        if not word:
            character = self._reader.text[self._reader.at]
            self._reader.at += 1
            if not "\ud800" <= character <= "\udfff":
                self._sink(character)
            self._state = "more"
        elif not self._reader.cut:
            known = None if self._state == "key" else _WORDS.get(word.lower()) or number(word)
            self._sink(known or json.dumps(word, ensure_ascii=False))
            self._state = "colon" if self._state == "key" else "more"

    def _space(self, text: str) -> None:
        if self._comma:
            self._comma += text
        else:
            self._sink(text)

    def _begin_value(self) -> None:
        if self._comma:
            self._sink(self._comma)
            self._comma = ""

    def _structure(self, character: str) -> None:
        if character in _CLOSING:
            self._begin_value()
            self._sink(character)
            self._open.append(_CLOSING[character])
            self._count[_CLOSING[character]] += 1
            self._state = "key" if character == "{" else "value"
        elif character == ",":
            self._begin_value()
            self._comma = ","
            self._state = "key" if self._open and self._open[-1] == "}" else "value"
        elif character == ":":
            self._sink(":")
            self._state = "value"
        else:
            self._drop_comma()
            closed = "" if self._count[character] else character  # leave out a surplus bracket
            while closed != character:
                closed = self._open.pop()
                self._count[closed] -= 1
                self._sink(closed)
            self._state = "more"

    def _drop_comma(self) -> None:
        if self._comma:
            self._sink(self._comma[1:])
            self._comma = ""

    def _stopped(self) -> Need[bool]:
        """Whether a stop marker begins here; it is not consumed."""
        reader = self._reader
        while True:
            hit = self._stops.pattern.match(reader.text, reader.at)
            if hit is not None:
                return True
            if reader.ended or self._stops.begun_at(reader.text, reader.at) != reader.at:
                return False
            yield

    def _begun_stop(self) -> bool:
        """Whether the text was truncated inside a possible stop marker, which is then consumed."""
        reader = self._reader
        cut = bool(self._stops) and reader.ended and not reader.whole
        if not cut or self._stops.begun_at(reader.text, reader.at) != reader.at:
            return False
        reader.at = len(reader.text)
        return True

    def _close(self) -> bool:
        """Add the missing brackets, if they complete a value; return whether they do."""
        after_colon = self._state == "value" and self._open[-1:] == ["}"]
        if not self._open or self._state == "colon" or after_colon:
            return False
        self._drop_comma()
        while self._open:
            self._sink(self._open.pop())
        return True
