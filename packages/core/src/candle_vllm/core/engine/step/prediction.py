# SPDX-License-Identifier: MIT
"""Predicted output of a request: a source of draft tokens. Its tokens that occur in the answer are also counted."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Sequence


class Prediction:
    """Tokens of a predicted text; the sequences of a request share one."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self._pairs: dict[tuple[int, int], list[int]] = defaultdict(list)  # positions at which each pair begins
        for place, pair in enumerate(itertools.pairwise(self.tokens)):
            self._pairs[pair].append(place)

    def found_in(self, answer: Sequence[int]) -> int:
        """Count the predicted tokens in passages that the answer shares: at both beginnings, or of two tokens or more.

        The answer is matched along the prediction. After a mismatch, matching resumes at the next occurrence of the
        answer's last two tokens in the prediction, or else at their last earlier occurrence.
        """
        prediction, pairs = self.tokens, self._pairs
        seen, upcoming, inside = set[int](), 0, True
        for place, token in enumerate(answer):
            was_inside = inside and place > 0
            inside = inside and upcoming < len(prediction) and prediction[upcoming] == token
            if not inside and place and (places := pairs.get((answer[place - 1], token))):
                upcoming = places[min(bisect.bisect_left(places, upcoming - 1), len(places) - 1)] + 1
                if not was_inside:  # else the token before was counted at another position
                    seen.add(upcoming - 1)
                inside = True
            if inside:
                seen.add(upcoming)
                upcoming += 1
        return len(seen)
