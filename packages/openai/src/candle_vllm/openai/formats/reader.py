# SPDX-License-Identifier: MIT
"""Streamed text, for parsers that are written as if all of it were present; and detection of Markdown code.

A parser is a generator: it `yield`s when it needs more text, and is resumed when more arrives or the text ends. Its
decisions depend on the text and its end, never on how it was split; so every split gives the same result.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Need = Generator[None, None, T]  # a parser with a result of type T
Sink = Callable[[str], object]

SPACE = " \t\r\n"
SPACES = re.compile(r"[ \t\r\n]*")
SPECIAL = re.compile("[\ud800-\udfff]")  # a special token (see `layout`), or half of a surrogate pair


def nowhere(_: object) -> None:
    """Sink for text that is not needed."""


class Markers:
    """A set of literals to search for: non-empty texts, of which none begins with another."""

    def __init__(self, literals: Iterable[str]) -> None:
        self.literals = frozenset(literals)
        ordered = sorted(self.literals)
        clash = next((pair for pair in itertools.pairwise(ordered) if pair[1].startswith(pair[0])), None)
        assert clash is None, f"one marker begins with another: {clash}"
        assert "" not in self.literals
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._reach = max(map(len, ordered), default=1) - 1  # maximum length of a proper beginning of a literal
        begun = "|".join(_beginnings(literal) for literal in ordered if len(literal) > 1)
        self._begun = re.compile(rf"(?:{begun})\Z") if begun else None

    def __bool__(self) -> bool:
        return bool(self.literals)

    def begun_at(self, text: str, start: int) -> int:
        """Return where a literal's beginning at the end of `text` starts; without one, the text's length."""
        if self._begun is None:
            return len(text)
        match = self._begun.search(text, max(start, len(text) - self._reach))
        return len(text) if match is None else match.start()


@functools.lru_cache(maxsize=512)
def markers(*literals: str) -> Markers:
    """Return the `Markers` of these literals, cached; repeated and empty literals are ignored."""
    return Markers(literal for literal in literals if literal)


@functools.lru_cache(maxsize=512)
def _longest_first(literals: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(literals, key=len, reverse=True))


class Reader:
    """Text that is not consumed yet.

    Attributes:
        text, at: the received text, and the offset up to which it is consumed.
        lenient: whether a parser may close what is open at the end; if not, `whole` is False.
        begun: the beginning of a marker at the end of truncated text, which `until` did not pass to its sink.
    """

    __slots__ = ("_done", "_from", "_kept", "at", "begun", "ended", "lenient", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self.lenient = True
        self._done = False
        self.begun = ""
        self._kept: list[str] | None = None  # consumed text since the mark, no longer in `text`
        self._from = 0  # offset in `text` at which `_kept` continues

    def feed(self, text: str) -> None:
        if self._kept is not None:
            self._kept.append(self.text[self._from : self.at])
        self.text = self.text[self.at :] + text
        self.at = self._from = 0

    def end(self, whole: bool) -> None:
        self.ended = True
        self._done = whole

    @property
    def whole(self) -> bool:
        """Whether the text ended because the model had finished, not by truncation; False if not `lenient`."""
        return self._done and self.lenient

    def mark(self) -> None:
        """Remember the position, for `unread`."""
        self._from = self.at
        self._kept = []

    def unread(self) -> int:
        """Move back to the mark; return the number of characters between."""
        assert self._kept is not None
        size = sum(map(len, self._kept)) + self.at - self._from
        if self._kept:
            self.text = "".join(self._kept) + self.text[self._from :]
            self._from = 0
            self._kept = []
        self.at = self._from
        return size

    def since_mark(self) -> str:
        return "".join(self._kept or ()) + self.text[self._from : self.at]

    def attempt(self, parser: Need[bool], *, back: bool) -> Need[bool]:
        """Run a parser behind the mark; with `back`, move back if it returns False and the text was not truncated."""
        start = len(self.since_mark()) if back else 0
        done = yield from parser
        if back and not done and not self.cut:
            self.put_back(self.since_mark()[start:])
        return done

    def forget(self) -> None:
        self._kept = None

    def put_back(self, text: str) -> None:
        """Move back by the length of `text`, the text consumed last; the caller must not move back beyond a mark."""
        gone = len(text) - self.at  # number of characters that are no longer in `text`
        if gone <= 0:
            self.at -= len(text)
            return
        self.text = text[:gone] + self.text
        self.at = self._from = 0
        while gone and self._kept:
            last = self._kept.pop()
            if len(last) > gone:
                self._kept.append(last[:-gone])
            gone = max(0, gone - len(last))

    def next(self, count: int) -> str:
        """Consume and return characters that have already arrived."""
        start, self.at = self.at, self.at + count
        return self.text[start : self.at]

    def skip_space(self) -> Need[None]:
        if self.at < len(self.text) and self.text[self.at] not in SPACE:
            return
        while True:
            match = SPACES.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return
            yield

    def peek(self) -> Need[str]:
        """Return the next character without consuming it; "" at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def take(self, *literals: str) -> Need[str]:
        """Consume and return the longest of the literals that begins here; "" if no literal does."""
        ordered = literals if len(literals) == 1 else _longest_first(literals)
        while True:
            rest = self.text[self.at : self.at + len(ordered[0])]
            for literal in ordered:
                if rest.startswith(literal):
                    self.at += len(literal)
                    return literal
                if not self.ended and literal.startswith(rest):
                    break
            else:
                return ""
            yield

    def match(self, pattern: re.Pattern[str], sink: Sink) -> Need[None]:
        """Consume characters as long as `pattern`, a character class with a star, matches."""
        while True:
            match = pattern.match(self.text, self.at)
            assert match is not None
            if match.end() > self.at:
                sink(match.group())
                self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return
            yield

    def until(self, markers: Markers, sink: Sink, *, inside: bool = False) -> Need[str]:
        """Pass text to `sink` up to one of the markers, which is consumed and returned; "" if the text ends first.

        `inside` a call, the beginning of a marker at the end of truncated text is not passed on, because it would
        become a part of the arguments.
        """
        while True:
            hit = markers.pattern.search(self.text, self.at)
            if hit is not None:
                if hit.start() > self.at:
                    sink(self.text[self.at : hit.start()])
                self.at = hit.end()
                return hit.group()
            done = self.ended and (self.whole or not inside)
            stop = len(self.text) if done else markers.begun_at(self.text, self.at)
            if stop > self.at:
                sink(self.text[self.at : stop])
                self.at = stop
            if self.ended:
                self.begun = self.text[self.at :]
                self.at = len(self.text)
                return ""
            yield

    def drop_begun(self, *literals: str) -> bool:
        """Consume the beginning of a literal at the end of truncated text; return whether there was one."""
        rest = len(self.text) - self.at
        if not self.ended or self.whole or not rest or rest > max(map(len, literals), default=0):
            return False
        begun = any(one.startswith(self.text[self.at :]) for one in literals)
        self.at += rest if begun else 0
        return begun

    @property
    def cut(self) -> bool:
        """Whether the text was truncated, and all of it is consumed."""
        return self.ended and not self.whole and self.at == len(self.text)

    def name(self, ends: Markers, most: int = 256) -> Need[tuple[str, str]]:
        """Consume and return a short text and the marker after it, "" if the text ends or exceeds `most` before one."""
        parts: list[str] = []
        size = 0
        while True:
            hit = ends.pattern.search(self.text, self.at)
            stop = hit.start() if hit else (len(self.text) if self.ended else ends.begun_at(self.text, self.at))
            parts.append(self.text[self.at : stop])
            size += stop - self.at
            self.at = stop
            if hit is not None and size <= most:
                self.at = hit.end()
                return "".join(parts), hit.group()
            if self.ended or size > most:
                self.at -= max(0, size - most)  # the result does not depend on how much has arrived
                return "".join(parts)[:most], ""
            yield


def _beginnings(literal: str) -> str:
    """Return a pattern of every proper beginning of `literal`, the longest first."""
    pattern = ""
    for character in reversed(literal[1:-1]):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return re.escape(literal[0]) + pattern


_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEAD = 80  # characters of a line that are stored, because a fence can be only at its beginning


class CodeSpans:
    """Detects Markdown code in a text that is added in parts of any size."""

    def __init__(self) -> None:
        self._fence = ""  # fence that opened the current code block
        self._head = ""  # first characters of the current line
        self._size = 0  # number of its characters
        self._ticks = 0  # number of its backticks

    def add(self, text: str) -> None:
        for number, part in enumerate(text.split("\n")):
            if number:
                self.end_line()
            if len(self._head) < _HEAD:
                self._head += part[: _HEAD - len(self._head)]
            self._size += len(part)
            self._ticks += part.count("`")

    @property
    def inside(self) -> bool:
        """Whether the next text would be code."""
        return bool(self._fence or self._opened()) or self._ticks % 2 == 1

    @property
    def at_line_start(self) -> bool:
        """Whether only white space precedes the next text on its line."""
        return self._size == len(self._head) and not self._head.strip()

    def _opened(self) -> str:
        """Return the fence by which the current line opens a block; no backtick may follow a fence of backticks."""
        match = _FENCE.match(self._head)
        if match is None or (match[1][0] == "`" and self._ticks > len(match[1])):
            return ""
        return match[1]

    def end_line(self) -> None:
        """End the line: the next text begins a new line."""
        if not self._fence:
            self._fence = self._opened()
        else:
            match = _FENCE.match(self._head)
            closes = match is not None and match[1].startswith(self._fence)
            if match is not None and closes and self._size <= _HEAD and not self._head[match.end() :].strip():
                self._fence = ""
        self._head, self._size, self._ticks = "", 0, 0
