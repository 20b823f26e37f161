# SPDX-License-Identifier: MIT
"""Ranks of stages on devices that are late, each in a thread, joined as NCCL joins them; told as over lines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.engine.ranks.rank_line import Batches, Forward, Next, ToRank, decoder, encoded
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.thread_ranks import MeetingRanks, Meetings, MeetingStages, ThreadRanks, in_threads


def join(part: LoadedModel, ranks: ThreadRanks) -> None:
    """A rank's part of a Llama has its sums and its draws from these ranks."""
    decoder: Any = part.decoder
    for layer in decoder.layers:
        if layer is not None:
            layer.attention.output.collective = layer.mlp.down.collective = ranks
    for table in (decoder.embed, decoder.head):
        if table is not None:
            table.share = table.share._replace(collective=ranks)


class LateStage:
    """A rank behind the first, as `rank.py` has it; its device computes only while it is told nothing.

    Attributes:
        batches: what it makes of what it is told.
        behind: steps that it was told while others had not run.
        failed: why it has ended.
        runner: its part.
    """

    def __init__(self, runner: DeviceRunner, stream: LazyStream) -> None:
        self.batches, self.behind = Batches(), 0
        self.failed: Exception | None = None
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.runner, self._stream = runner, stream
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                try:
                    message = self._told.get(timeout=0.001)
                except queue.Empty:
                    while self._told.empty() and self._stream.progress():
                        pass
                    continue
                if message is None:
                    return
                self._take(message)
        except Exception as error:
            self.failed = error

    def _take(self, message: Any) -> None:
        if callable(message):
            message(self.runner)
            return
        self.behind += isinstance(message, Forward | Next) and self._stream.pending > 0
        assert self.batches.run(self.runner, message)

    def tell(self, message: Any) -> None:
        """A message, or what is to be called with its runner."""
        assert self.failed is None
        self._told.put(message)

    def close(self) -> None:
        """Ends it."""
        self._told.put(None)
        self._thread.join()


class Staged:
    """The stages of a model; the first one is the caller's thread.

    Args:
        load: loads a rank's part.
        build: makes what runs a part on a stream.
        stages: how many there are.
        ranks: of each stage.
        serial: see `LazyStream`.

    Attributes:
        parts: of the model, those of a stage beside each other.
        groups: the ranks of each stage.
        first: what runs the first part.
        stream: on which it does.
        others: the other ones.
        runner: the first one's, for an engine.
        told: what kinds of messages were told, and of each how many steps were on their way to the first rank.
        flights: how many steps were in flight whenever one of them was to land, of engines that are watched.
    """

    def __init__(
        self,
        load: Callable[[ThreadRanks], LoadedModel],
        build: Callable[[LoadedModel, LazyStream], DeviceRunner],
        stages: int,
        ranks: int = 1,
        *,
        serial: bool = False,
    ) -> None:
        self.config = SimpleNamespace(tensor_parallel_size=ranks)  # as of `Ranks`
        self.parts = in_threads(ranks, load, stages)
        streams = [LazyStream(serial=serial) for _ in self.parts]
        self._meetings = [Meetings() for _ in range(ranks)]
        self.groups: list[list[MeetingRanks]] = []
        for stage in range(stages):
            said: dict[int, dict[int, Any]] = {}
            beside = range(stage * ranks, (stage + 1) * ranks)
            group = [MeetingRanks(rank, ranks, said, streams[each]) for rank, each in enumerate(beside)]
            for own, each in zip(group, beside, strict=True):
                decoder: Any = self.parts[each].decoder
                decoder.stage.line = MeetingStages(stage, stages, self._meetings[own.rank])
                if ranks > 1:
                    join(self.parts[each], own)
            self.groups.append(group)

        def built(own: ThreadRanks) -> DeviceRunner:
            assert own.stages is not None
            number = own.stages.rank * ranks + own.rank
            runner = build(self.parts[number], streams[number])
            while streams[number].pending:  # a device runs what nobody waits for, too
                streams[number].progress()
            return runner

        self.first, *others = in_threads(ranks, built, stages)
        self.stream = streams[0]
        self.others = [LateStage(*each) for each in zip(others, streams[1:], strict=True)]
        self.runner = RankedRunner(self.first, self)  # type: ignore[arg-type]
        self.flights: list[int] = []

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.others:
            each.close()

    def broadcast(self, message: Any) -> None:
        """As `Ranks`; see `LateStage`."""
        for each in self.others:
            each.tell(decoder(ToRank).decode(encoded(message)))

    def dead(self, here: str = "") -> Exception:
        """As `Ranks`."""
        return RuntimeError(f"{here}; {[each.failed for each in self.others]}")

    def watched(self, engine: Engine) -> Engine:
        """The same engine, whose flights are counted."""
        landing = engine._collect

        def collect() -> Any:
            self.flights.append(len(engine._flights))
            return landing()

        engine._collect = collect  # type: ignore[method-assign]
        return engine

    def sent(self) -> Sequence[tuple[int, ...]]:
        """Shapes of what went over the first border; both ends of each were asked for the same, in the same order."""
        asked, *others = (each.asked for each in self._meetings)
        assert all(each == asked for each in others), "the ranks of a stage hand on the same"
        count = len(self.parts) // len(self._meetings)
        borders = {(rank, (rank + 1) % count) for rank in range(count)}
        assert {(sender, receiver) for sender, receiver, _ in asked} == borders
        assert all(asked[*border, 0] == asked[*border, 1] for border in borders)
        assert len({len(each) for each in asked.values()}) == 1, "a step goes over each border once"
        return asked[0, 1, 0]
