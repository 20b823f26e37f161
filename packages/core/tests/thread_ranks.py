# SPDX-License-Identifier: MIT
"""Ranks in threads of one process, for tests. Collective operations run in the order of ranks.

All ranks but the first get their messages encoded, as over a connection.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.ranks.rank_line import Batches, ToRank, decoder, encoded
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.errors import EngineDeadError
from candle_vllm.core.kernels.collectives import Stages
from candle_vllm.core.kernels.recorded import Value
from packages.core.tests.lazy_stream import LazyStream, NotYetError

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

    def gather(self, x: Value, width: int, out: Value | None = None) -> Value:
        """See `Collective`."""
        wide = x.new_zeros(x.shape[0], self.size, width)
        for rank, part in enumerate(self._all(x)):
            wide[:, rank, : part.shape[1]] = part
        return wide.flatten(1)

    def exchange(self, x: Value, sent: Sequence[int], received: Sequence[int]) -> Value:
        """See `Collective`."""
        assert len(x) == sum(sent)
        parts = [rows.split(list(counts))[self.rank] for rows, counts in self._all((x, sent))]
        assert [len(part) for part in parts] == list(received)
        found = x.new_empty(sum(received), x.shape[1])
        for rows, part in zip(found.split(list(received)), parts, strict=True):
            rows.copy_(part)
        return found

    def least(self, number: int) -> int:
        """See `Collective`."""
        found = min(self._all(number))
        return found if self.stages is None else self.stages.least(found)

    def close(self) -> None:
        """See `Collective`."""
        self._barrier.abort()


class ThreadStages(ThreadRanks):
    """See `Stages`; `boxes` are queues of sent tensors, by sender and receiver."""

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


class Meetings:
    """Transfers between devices without a buffer, as in NCCL: each end waits for the other.

    Attributes:
        asked: the requested shapes in order, by sender, receiver and end (0 for the sender's).
    """

    def __init__(self) -> None:
        self.asked: dict[tuple[int, int, int], list[tuple[int, ...]]] = collections.defaultdict(list)
        self._waiting: dict[tuple[int, int, int], Any] = {}
        self._over: set[tuple[int, int, int]] = set()
        self._lock = threading.Lock()

    def meet(self, sender: int, receiver: int, end: int, x: Value) -> None:
        """Run one end of a transfer, 0 for the sender's, in work of a `LazyStream`.

        Raises:
            AssertionError: the shapes of the two ends differ.
            NotYetError: the other end has not begun.
        """
        own, other = (sender, receiver, end), (sender, receiver, 1 - end)
        with self._lock:
            if own in self._over:
                self._over.remove(own)
                return
            if own not in self._waiting:
                self.asked[own].append(tuple(x.shape))
                self._waiting[own] = x
            if other not in self._waiting:
                raise NotYetError
            source, target = self._waiting.pop((sender, receiver, 0)), self._waiting.pop((sender, receiver, 1))
            assert source.shape == target.shape, f"{sender} sends {source.shape}, {receiver} takes {target.shape}"
            target.copy_(source)
            self._over.add(other)


class MeetingStages(ThreadStages):
    """See `Stages` and `Meetings`; stages on lazy devices."""

    def __init__(self, rank: int, size: int, meetings: Meetings) -> None:
        super().__init__(rank, size, [None] * size, threading.Barrier(1), {})
        self.meetings = meetings

    def send(self, x: Value, to: int) -> None:
        """See `Stages`."""
        self.meetings.meet(self.rank, to, 0, x)

    def receive(self, x: Value, source: int) -> Value:
        """See `Stages`."""
        self.meetings.meet(source, self.rank, 1, x)
        return x


class MeetingRanks(ThreadRanks):
    """See `Collective`; ranks on lazy devices, whose work waits for the other ranks.

    Args:
        rank, size: see `Collective`.
        said: tensors of the ranks, by number of the exchange and rank; shared by all ranks.
        stream: the stream that runs the work.

    Attributes:
        asked: for each exchange, dtype and number of rows of the tensor.
    """

    def __init__(self, rank: int, size: int, said: dict[int, dict[int, Any]], stream: LazyStream) -> None:
        super().__init__(rank, size, [], threading.Barrier(1))
        self.asked: list[tuple[Any, int]] = []
        self._said, self._stream = said, stream
        self._numbers = itertools.count()

    def _all(self, x: Any) -> list[Any]:
        number = next(self._numbers)
        said = self._said.setdefault(number, {})
        self.asked.append((x.dtype, len(x)))
        said[self.rank] = x.clone()
        until = time.monotonic() + _PATIENCE
        while len(said) < self.size:
            if self._stream.meanwhile():
                continue
            time.sleep(0.0005)
            if time.monotonic() > until:
                raise RuntimeError(f"another rank has not come to exchange {number}, of {self.asked[-1]}")
        self._said.pop(number - 1, None)  # all ranks are here, so no rank reads the previous exchange any more
        kinds = {(each.dtype, len(each)) for each in said.values()}
        assert len(kinds) == 1, f"ranks say different things in exchange {number}: {kinds}"
        return [said[each] for each in range(self.size)]


def lines(size: int) -> list[ThreadStages]:
    """Return `size` connected stages, one for each rank."""
    shared, barrier = [None] * size, threading.Barrier(size)
    boxes = {(one, other): queue.SimpleQueue[Any]() for one in range(size) for other in range(size)}
    return [ThreadStages(rank, size, shared, barrier, boxes) for rank in range(size)]


def in_threads(size: int, work: Callable[[ThreadRanks], _Result], stages: int = 1) -> list[_Result]:
    """Return the results of `work` for each of `size` ranks of each stage; if a rank fails, the others do not wait."""
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


class ToldRanks:
    """All ranks but the first; see `Ranks`.

    Args:
        config: the engine's configuration.
        others: the runner of each rank, and the stream that it runs on, if it has one.

    Attributes:
        failed: errors of the ranks that failed.
    """

    def __init__(self, config: EngineConfig, others: Sequence[tuple[ModelRunner, LazyStream | None]]) -> None:
        self.config, self.failed = config, list[Exception]()
        self._told = [queue.SimpleQueue[bytes | None]() for _ in others]
        self._threads = [
            threading.Thread(target=self._run, args=(told, *other), daemon=True)
            for told, other in zip(self._told, others)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, told: queue.SimpleQueue[bytes | None], runner: ModelRunner, stream: LazyStream | None) -> None:
        batches = Batches()
        while True:
            try:
                while stream is not None and told.empty():  # a device computes while no message arrives
                    if not stream.progress():
                        time.sleep(0.0005)
                if (data := told.get()) is None:
                    return
                batches.run(runner, decoder(ToRank).decode(data))
            except Exception as error:
                self.failed.append(error)
                return

    def broadcast(self, message: ToRank) -> None:
        """See `Ranks`."""
        assert not self.failed
        for told in self._told:
            told.put(encoded(message))

    def dead(self, here: str = "") -> EngineDeadError:
        """See `Ranks`."""
        return EngineDeadError(f"{here} {self.failed}")

    def close(self) -> None:
        """End the threads."""
        for told in self._told:
            told.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE)
