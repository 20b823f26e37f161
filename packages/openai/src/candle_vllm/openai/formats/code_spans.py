"""Whether a place in Markdown text is code: in a fenced block or in a span between backticks."""

from __future__ import annotations

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEAD = 80  # characters of a line that are kept; a fence stands at its beginning


class CodeSpans:
    """Follows a text, which may come in any pieces."""

    def __init__(self) -> None:
        self._fence = ""  # what opened the block that we are in
        self._head = ""  # the present line's first characters
        self._size = 0  # its characters
        self._ticks = 0  # its backticks

    def add(self, text: str) -> None:
        """The next piece."""
        for number, part in enumerate(text.split("\n")):
            if number:
                self._end_line()
            if len(self._head) < _HEAD:
                self._head += part[: _HEAD - len(self._head)]
            self._size += len(part)
            self._ticks += part.count("`")

    @property
    def inside(self) -> bool:
        """True where the text goes on as code."""
        return bool(self._fence or self._opened()) or self._ticks % 2 == 1

    @property
    def at_line_start(self) -> bool:
        """True where nothing but white space stands before on the present line."""
        return self._size == len(self._head) and not self._head.strip()

    def end_line(self) -> None:
        """What comes next stands on a line of its own."""
        self._end_line()

    def _opened(self) -> str:
        """The fence with which the present line opens a block; what follows backticks must have none."""
        match = _FENCE.match(self._head)
        if match is None or (match[1][0] == "`" and self._ticks > len(match[1])):
            return ""
        return match[1]

    def _end_line(self) -> None:
        if not self._fence:
            self._fence = self._opened()
        else:
            match = _FENCE.match(self._head)
            closes = match is not None and match[1].startswith(self._fence)
            if match is not None and closes and self._size <= _HEAD and not self._head[match.end() :].strip():
                self._fence = ""
        self._head, self._size, self._ticks = "", 0, 0
