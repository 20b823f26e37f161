"""Bytes as they come, cut into lines within a limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_KEPT = 256  # bytes of an oversized line's two ends


class OversizedLine(NamedTuple):
    """What is left of a line beyond the limit: its first and last bytes, and how many it had."""

    head: bytes
    tail: bytes
    size: int


class LineSplitter:
    """Cuts chunks at their line feeds; of a line beyond the limit nothing but its ends is held.

    Args:
        limit: bytes of a line, without its line feed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._head = b""
        self._tail = b""
        self._size = 0

    @property
    def pending(self) -> int:
        """Bytes of the line that has not ended yet."""
        return self._size

    def feed(self, chunk: bytes) -> Iterator[bytes | OversizedLine]:
        """The lines that end within a chunk."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(piece)
            yield self._take()
        self._add(rest)

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._limit:
            self._parts.append(piece)
            return
        if self._parts or not self._head:
            whole = b"".join([*self._parts, piece])
            self._parts.clear()
            self._head, self._tail = whole[:_KEPT], whole[-_KEPT:]
        else:
            self._head += piece[: max(0, _KEPT - len(self._head))]
            self._tail = (self._tail + piece[-_KEPT:])[-_KEPT:]

    def _take(self) -> bytes | OversizedLine:
        line = OversizedLine(self._head, self._tail, self._size) if self._head else b"".join(self._parts)
        self._parts.clear()
        self._head = self._tail = b""
        self._size = 0
        return line
