# SPDX-License-Identifier: MIT
"""What a request says its answer will be, for the most part: guessed from, and counted when the answer is whole."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Sequence


class Prediction:
    """Tokens of a predicted text; the sequences of a request share one."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self._pairs: dict[tuple[int, int], list[int]] = defaultdict(list)  # where each pair begins
        for place, pair in enumerate(itertools.pairwise(self.tokens)):
            self._pairs[pair].append(place)

    def found_in(self, answer: Sequence[int]) -> int:
        """How many of the tokens stand in an answer, in passages of at least two, or where both begin.

        The answer is followed through the prediction; where it leaves that, it comes back at the next place that has
        its last two tokens, else at the last such place before.
        """
        prediction, pairs = self.tokens, self._pairs
        seen, upcoming, inside = set[int](), 0, True
        for place, token in enumerate(answer):
            was_inside = inside and place > 0
            inside = inside and upcoming < len(prediction) and prediction[upcoming] == token
            if not inside and place and (places := pairs.get((answer[place - 1], token))):
                upcoming = places[min(bisect.bisect_left(places, upcoming - 1), len(places) - 1)] + 1
                if not was_inside:  # else it stands elsewhere
                    seen.add(upcoming - 1)
                inside = True
            if inside:
                seen.add(upcoming)
                upcoming += 1
        return len(seen)
