# SPDX-License-Identifier: MIT
"""Where the end of a text stood before: in itself, in a prompt that others begin with, in answers of the past."""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = -1  # between answers of the past; no token
_CANDIDATES = 12  # places that are looked at
_PAST_TOKENS = 1 << 16  # of each of two generations of past answers
_ALL = 1 << 62


class Text:
    """Tokens that grow at their end, and where each pair of them stood before.

    Args:
        tokens: the list itself, which its owner goes on writing to; what is in it never changes.
        begun: what is known of its beginning, together with other texts that begin alike.
        size: how many of the tokens are this text's, where others follow.
    """

    __slots__ = ("__weakref__", "_begun", "_earlier", "_first", "_last", "_size", "tokens")

    def __init__(self, tokens: list[int], begun: Text | None = None, size: int = _ALL) -> None:
        self.tokens = tokens
        self._begun, self._first, self._size = begun, 0 if begun is None else begun._size, size
        self._last: dict[int, int] = {}  # where each pair ends that stood here last
        self._earlier = [-1] if begun is None else []  # of each place, where the pair that ends there ended before

    def follow(self, most: int = _ALL) -> int:
        """Takes note of what the list has more since, and of what is not known of its beginning.

        Args:
            most: tokens that are looked at.

        Returns:
            How many were.
        """
        tokens, last, earlier, first = self.tokens, self._last, self._earlier, self._first
        start, end = len(earlier) + first, min(len(tokens), self._size)
        for place in range(start, min(end, start + most)):
            pair = tokens[place - 1] << 32 | tokens[place]
            earlier.append(last.get(pair, -1))
            last[pair] = place
        looked = len(earlier) + first - start
        return looked if self._begun is None else looked + self._begun.follow(most - looked)

    def find(self, end: Sequence[int], least: int, most: int) -> tuple[int, int]:
        """Where the end of a text stood here before: the place behind it, and how many tokens were the same.

        The longest match counts, of equal ones the latest; (0, 0) where none has `least` tokens. Of this very text
        the end itself is no match.
        """
        size = len(end)
        tokens, begun, first, earlier = self.tokens, self._begun, self._first, self._earlier
        own = end is tokens
        if size < max(least, 2) or (own and not first < size <= first + len(earlier)):
            return 0, 0
        pair = end[-2] << 32 | end[-1]
        place = earlier[size - 1 - first] if own else self._last.get(pair, -1)
        found, longest = 0, least - 1
        for _ in range(_CANDIDATES):
            if place < 0 and begun is not None:
                place, earlier, first, begun = begun._last.get(pair, -1), begun._earlier, 0, None
            if place < 0:
                break
            limit = min(most, place + 1, size)
            # What differs where the longest so far ended is no longer than that: most are put away by one look.
            if limit > longest and (longest < 2 or tokens[place - longest] == end[size - 1 - longest]):
                length = 2
                while length < limit and tokens[place - length] == end[size - 1 - length]:
                    length += 1
                if length > longest:
                    found, longest = place + 1, length
                    if length >= most:
                        break
            place = earlier[place - first]
        return (found, longest) if found else (0, 0)


class Past:
    """Answers of the past, in two generations: when the younger is full, the older one goes.

    Args:
        most: tokens of a generation.
        answers: most answers of both.
    """

    def __init__(self, most: int = _PAST_TOKENS, answers: int = _PAST_TOKENS) -> None:
        self._most = most
        self._answers, self._young = answers, 0
        self._texts = [Text([SEPARATOR]), Text([SEPARATOR])]  # the younger first

    def add(self, answer: Sequence[int]) -> None:
        """Keeps an answer, or the end of it."""
        if len(self._texts[0].tokens) + len(answer) >= self._most or self._young >= max(1, self._answers // 2):
            self._texts = [Text([SEPARATOR]), self._texts[0] if self._answers > 1 else Text([SEPARATOR])]
            self._young = 0
        self._young += 1
        young = self._texts[0]
        young.tokens += answer[-self._most // 2 :]
        young.tokens.append(SEPARATOR)
        young.follow()

    def find(self, end: Sequence[int], least: int, most: int) -> tuple[list[int], int, int]:
        """As `Text.find`, in either; with the tokens there."""
        best: tuple[list[int], int, int] = ([], 0, 0)
        for text in self._texts:
            place, length = text.find(end, least, most)
            if length > best[2]:
                best = text.tokens, place, length
        return best
