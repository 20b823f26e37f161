"""Histogram: observations sorted into buckets without a lock, for what is measured at every token.

The histograms of prometheus-client take a lock and walk through their buckets; a token of a fast model has no time for
that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.utils import INF, floatToGoString


class Histogram:
    """Counts per bucket and the sum. One thread writes at a time.

    Args:
        bounds: upper bounds, rising, without the infinite one.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value in the first bucket that reaches it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Adds the observations of another one with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """The same observations, apart from those to come."""
        made = Histogram(self.bounds)
        made.merge(self)
        return made

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and cumulative count, as Prometheus wants them."""
        made, sum_so_far = [], 0
        for bound, count in zip((*self.bounds, INF), self.counts, strict=True):
            sum_so_far += count
            made.append((floatToGoString(bound), float(sum_so_far)))
        return made
