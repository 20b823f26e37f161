# SPDX-License-Identifier: MIT
"""Histograms without a lock, for values that are measured at every token, and token counts by model and key.

The histograms of prometheus-client take a lock and search all buckets, which is too slow for every token.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.utils import INF, floatToGoString

MAX_KEYS = 1000
OTHER_KEYS = "other"
"""Label under which the keys beyond `MAX_KEYS` are counted together."""


class Histogram:
    """Counts per bucket, and the sum of the values. One thread writes at a time.

    `bounds` are the upper bounds, ascending, without the infinite one.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value in the first bucket whose upper bound is at least the value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Add the observations of another histogram with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """Return a histogram with the same observations."""
        made = Histogram(self.bounds)
        made.merge(self)
        return made

    def buckets(self) -> list[tuple[str, float]]:
        """Return upper bound and cumulative count of each bucket, as in Prometheus's format."""
        made, sum_so_far = [], 0
        for bound, count in zip((*self.bounds, INF), self.counts, strict=True):
            sum_so_far += count
            made.append((floatToGoString(bound), float(sum_so_far)))
        return made


def token_buckets(most: int) -> tuple[float, ...]:
    """Return the bounds 1, 2, 5, 10, 20, 50 ... up to `most` tokens."""
    bounds: list[float] = []
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step > most:
                return tuple(bounds) or (1,)
            bounds.append(factor * step)
        step *= 10


@dataclass(frozen=True)
class UsageCounts:
    """Sums over requests: the number of requests, and the tokens in their `usage`."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: UsageCounts) -> UsageCounts:
        """Return the sum of both."""
        return UsageCounts(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class UsageRow:
    """The counts of one API key with one model."""

    model: str
    key: str
    counts: UsageCounts


class UsageTable:
    """Counts of finished requests by model and key label, for `GET /v1/usage`, or by model and adapter. Thread-safe."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self.max_keys = max_keys
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._rows: dict[tuple[str, str], UsageCounts] = {}

    def add(self, model: str, key: str, counts: UsageCounts) -> None:
        """Add the counts of one request."""
        with self._lock:
            if key not in self._keys:
                if len(self._keys) >= self.max_keys:
                    key = OTHER_KEYS
                else:
                    self._keys.add(key)
            self._rows[model, key] = self._rows.get((model, key), UsageCounts()).plus(counts)

    def rows(self) -> list[UsageRow]:
        """Return the rows in order of model and key."""
        with self._lock:
            return [UsageRow(model, key, counts) for (model, key), counts in sorted(self._rows.items())]
