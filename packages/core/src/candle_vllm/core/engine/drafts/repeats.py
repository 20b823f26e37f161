# SPDX-License-Identifier: MIT
"""Search for earlier occurrences of a sequence's last tokens: in the sequence, in a shared prompt, in past answers."""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = -1  # separates past answers; not a token id
_CANDIDATES = 12  # maximum number of earlier occurrences that are compared
_PAST_TOKENS = 1 << 16  # maximum tokens of each of two generations of past answers
_ALL = 1 << 62


class Text:
    """A growing list of tokens, with an index of the earlier positions of each token pair.

    Args:
        tokens: the list, which its owner appends to; its elements never change.
        begun: the indexed prefix that this text shares with other texts, such as the prompt of several sequences.
        size: length of this text, if the list may have further tokens.
    """

    __slots__ = ("__weakref__", "_begun", "_earlier", "_first", "_last", "_size", "tokens")

    def __init__(self, tokens: list[int], begun: Text | None = None, size: int = _ALL) -> None:
        self.tokens = tokens
        self._begun, self._first, self._size = begun, 0 if begun is None else begun._size, size
        self._last: dict[int, int] = {}  # the last position at which each pair of tokens ended
        self._earlier = [-1] if begun is None else []  # for each position, the previous end of the same pair of tokens

    def follow(self, most: int = _ALL) -> int:
        """Index up to `most` tokens that are not indexed yet, of the text, then of its prefix; return their number."""
        tokens, last, earlier, first = self.tokens, self._last, self._earlier, self._first
        start, end = len(earlier) + first, min(len(tokens), self._size)
        for place in range(start, min(end, start + most)):
            pair = tokens[place - 1] << 32 | tokens[place]
            earlier.append(last.get(pair, -1))
            last[pair] = place
        looked = len(earlier) + first - start
        return looked if self._begun is None else looked + self._begun.follow(most - looked)

    def find(self, end: Sequence[int], least: int, most: int) -> tuple[int, int]:
        """Find an earlier occurrence of a text's last tokens; return the index after it and the length of the match.

        The longest match of the last `_CANDIDATES` is returned, with at most `most` tokens; the latest of equally long
        ones; (0, 0) if no match has `least` tokens. If `end` is this text itself, its end does not match itself.
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
            # A candidate that differs at the longest match's length cannot be longer: one comparison rejects most.
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
    """Past answers in two generations: when the younger one is full, the older one is dropped.

    Args:
        most: maximum number of tokens of a generation.
        answers: maximum number of answers in both generations.
    """

    def __init__(self, most: int = _PAST_TOKENS, answers: int = _PAST_TOKENS) -> None:
        self._most = most
        self._answers, self._young = answers, 0
        self._texts = [Text([SEPARATOR]), Text([SEPARATOR])]  # the younger first

    def add(self, answer: Sequence[int]) -> None:
        """Store an answer, or its last tokens if it is long."""
        if len(self._texts[0].tokens) + len(answer) >= self._most or self._young >= max(1, self._answers // 2):
            self._texts = [Text([SEPARATOR]), self._texts[0] if self._answers > 1 else Text([SEPARATOR])]
            self._young = 0
        self._young += 1
        young = self._texts[0]
        young.tokens += answer[-self._most // 2 :]
        young.tokens.append(SEPARATOR)
        young.follow()

    def find(self, end: Sequence[int], least: int, most: int) -> tuple[list[int], int, int]:
        """Search both generations as `Text.find` does; return the tokens of the text, the position and the length."""
        best: tuple[list[int], int, int] = ([], 0, 0)
        for text in self._texts:
            place, length = text.find(end, least, most)
            if length > best[2]:
                best = text.tokens, place, length
        return best
