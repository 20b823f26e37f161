# SPDX-License-Identifier: MIT
"""Ranks in threads of one process, for tests: what they do together is done in the order of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from candle_vllm.core.kernels.recorded import Value

_PATIENCE = 60.0
_Result = TypeVar("_Result")


class ThreadRanks:
    """See `Collective`."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier

    def _all(self, x: Any) -> list[Any]:
        self._shared[self.rank] = x
        self._barrier.wait(_PATIENCE)
        found = list(self._shared)
        self._barrier.wait(_PATIENCE)
        return found

    def sum(self, x: Value) -> Value:
        """See `Collective`."""
        first, *others = self._all(x)
        total = first.clone()
        for each in others:
            total += each
        return total

    def gather(self, x: Value, width: int) -> Value:
        """See `Collective`."""
        wide = x.new_zeros(x.shape[0], self.size, width)
        for rank, part in enumerate(self._all(x)):
            wide[:, rank, : part.shape[1]] = part
        return wide.flatten(1)

    def least(self, number: int) -> int:
        """See `Collective`."""
        return min(self._all(number))

    def close(self) -> None:
        """See `Collective`."""
        self._barrier.abort()


def in_threads(size: int, work: Callable[[ThreadRanks], _Result]) -> list[_Result]:
    """What each of so many ranks gives; where one fails, none waits for it."""
    shared, barrier = [None] * size, threading.Barrier(size)

    def run(rank: int) -> _Result:
        try:
            return work(ThreadRanks(rank, size, shared, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
