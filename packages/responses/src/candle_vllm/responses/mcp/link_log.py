"""The last lines that a server wrote beside the protocol, kept within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

MAX_LINES = 200
MAX_CHARS = 1000


class LinkLog:
    """A ring of lines: what a stdio server writes on standard error, and what happened to its connection.

    Args:
        redact: takes the secrets of the server's configuration out of a line.
        max_lines, max_chars: how much is kept; the oldest lines go, a longer line is cut.
    """

    def __init__(
        self, redact: Callable[[str], str] = str, *, max_lines: int = MAX_LINES, max_chars: int = MAX_CHARS
    ) -> None:
        self._redact = redact
        self._max_chars = max_chars
        self._lines: deque[str] = deque(maxlen=max_lines)

    def add(self, line: str) -> None:
        """Keeps a line; control characters other than tabs are left out, for it is shown to people."""
        line = self._redact(line[: 4 * self._max_chars])
        clean = "".join(char for char in line.rstrip() if char.isprintable() or char == "\t")
        if clean:
            self._lines.append(clean if len(clean) <= self._max_chars else clean[: self._max_chars - 1] + "…")

    def lines(self) -> list[str]:
        """The lines, oldest first."""
        return list(self._lines)

    def last(self) -> str | None:
        """The youngest line."""
        return self._lines[-1] if self._lines else None
