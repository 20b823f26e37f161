# SPDX-License-Identifier: MIT
"""Finds stop strings in text that arrives in pieces (step 9 of a request).

The stop that counts is the one that is complete first; of several that end at the same character, the longest. What
is found therefore does not depend on how the text is cut, and only text that may be the beginning of a stop string is
ever held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Prefix:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt): constant time per character."""

    __slots__ = ("_borders", "length", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0  # of the longest end of the text that begins the stop string; the whole string never stays
        self._borders = [0]
        for character in text[1:]:
            border = self._borders[-1]
            while border and text[border] != character:
                border = self._borders[border - 1]
            self._borders.append(border + (text[border] == character))

    def advance(self, character: str) -> bool:
        """Takes one character; True when it completes the stop string."""
        length = self.length
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        length += self.text[length] == character
        complete = length == len(self.text)
        self.length = self._borders[length - 1] if complete else length
        return complete


class StopScanner:
    """Lets text through until a stop string is complete.

    Attributes:
        idle: there is nothing to look for.
        found: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self.found: str | None = None
        self._prefixes = [_Prefix(stop) for stop in dict.fromkeys(stops) if stop]
        self.idle = not self._prefixes
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Takes the next text and returns what is safe to show; a stop that ends in it counts only when `armed`."""
        if self.found is not None or not text:
            return ""
        if self.idle:
            return text
        start = len(self._held)
        whole = self._held + text
        for position in range(start, len(whole)):
            stop = self._advance(whole[position])
            if stop is not None and armed:
                self.found = stop
                self._held = ""
                end = position + 1
                return whole[: end if self._include_stop else end - len(stop)]
        safe = len(whole) - max(prefix.length for prefix in self._prefixes)
        self._held = whole[safe:]
        return whole[:safe]

    def flush(self) -> str:
        """Returns what was held back; the text has ended."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """The longest stop string that `character` completes."""
        longest: str | None = None
        for prefix in self._prefixes:
            if prefix.advance(character) and (longest is None or len(prefix.text) > len(longest)):
                longest = prefix.text
        return longest
