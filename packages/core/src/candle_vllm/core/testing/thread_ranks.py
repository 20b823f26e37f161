# SPDX-License-Identifier: MIT
"""Ranks in threads of one process, for tests: what they do together is done in the order of ranks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from candle_vllm.core.kernels.collectives import Stages
from candle_vllm.core.kernels.recorded import Value

_PATIENCE = 60.0
_Result = TypeVar("_Result")
Box: TypeAlias = "queue.SimpleQueue[Any]"


class ThreadRanks:
    """See `Collective`."""

    def __init__(
        self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier, stages: Stages | None = None
    ) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier
        self.stages: Stages | None = stages

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
        found = min(self._all(number))
        return found if self.stages is None else self.stages.least(found)

    def close(self) -> None:
        """See `Collective`."""
        self._barrier.abort()


class ThreadStages(ThreadRanks):
    """See `Stages`; `boxes` are what is on its way, by sender and receiver."""

    def __init__(
        self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier, boxes: Mapping[tuple[int, int], Box]
    ) -> None:
        super().__init__(rank, size, shared, barrier)
        self._boxes = boxes

    def send(self, x: Value, to: int) -> None:
        """See `Stages`."""
        self._boxes[self.rank, to].put(x.clone())

    def receive(self, x: Value, source: int) -> Value:
        """See `Stages`."""
        return x.copy_(self._boxes[source, self.rank].get(timeout=_PATIENCE))


def lines(size: int) -> list[ThreadStages]:
    """So many stages, each as its rank sees them."""
    shared, barrier = [None] * size, threading.Barrier(size)
    boxes = {(one, other): queue.SimpleQueue[Any]() for one in range(size) for other in range(size)}
    return [ThreadStages(rank, size, shared, barrier, boxes) for rank in range(size)]


def in_threads(size: int, work: Callable[[ThreadRanks], _Result], stages: int = 1) -> list[_Result]:
    """What each of so many ranks of each of the stages gives; where one fails, none waits for it."""
    groups = [([None] * size, threading.Barrier(size)) for _ in range(stages)]
    others = [lines(stages) if stages > 1 else [None] for _ in range(size)]

    def run(number: int) -> _Result:
        stage, rank = divmod(number, size)
        try:
            return work(ThreadRanks(rank, size, *groups[stage], others[rank][stage]))
        except BaseException:
            for _, barrier in groups:
                barrier.abort()
            raise

    with ThreadPoolExecutor(size * stages) as pool:
        return list(pool.map(run, range(size * stages)))
