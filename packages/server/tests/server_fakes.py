# SPDX-License-Identifier: MIT
"""Engines for the server's tests whose speed and death are controlled, and their loader for the model manager."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import msgspec

from candle_vllm.core.engine.outputs import GenerationOutput, OutputCollector
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.progress import tell
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.server.models.loader import serve_engine
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.models.switcher import NoRoomError
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.model_metrics import EngineWatcher
from candle_vllm.server.settings.catalogue import ModelEntry
from candle_vllm.server.settings.table import ManagerOptions


async def whole_answer(
    engine: Any, prompt: str | list[int], params: SamplingParams, **watched: Any
) -> GenerationOutput:
    """Return the whole answer of a stream's chunks."""
    ids = engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    collector = OutputCollector(GenerationRequest(request_id="whole", prompt=None, prompt_token_ids=ids, params=params))
    async for piece in engine.stream(prompt, params, **watched):
        collector.add(piece)
    return collector.result()


def watched(engine: Any, metrics: Metrics, name: str | None = None, **options: Any) -> EngineWatcher:
    """Return the watcher of an engine, which counts under the model's name or another name."""
    info = engine.model_info
    return EngineWatcher(engine, metrics.model(name or info.name, info.max_model_len), **options)


class PacedEngine(ScriptedEngine):
    """Engine with KV blocks that dies on request and records whether it was closed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_blocks = 1000
        self.alive = True
        self.closed = False

        self._watchers: list[Callable[[], None]] = []

    @property
    def is_alive(self) -> bool:
        return self.alive

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        self._watchers.append(callback)

    def die(self) -> None:
        self.alive = False
        for callback in self._watchers:
            callback()

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(super().stats(), num_blocks=self.num_blocks)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShortLimits(ManagerOptions):
    """Limits of a model manager in fractions of a second, which settings cannot have."""

    def __post_init__(self) -> None:
        pass


class FakeLoader:
    """Loads scripted engines: `room` of them fit, each load takes `seconds`; `broken` ones fail, `hopeless` ones early.

    While `gate` is cleared, loads wait.
    """

    def __init__(self, room: int = 9, seconds: float = 0.0) -> None:
        self.room = room
        self.seconds = seconds
        self.broken: dict[str, Exception] = {}
        self.hopeless: dict[str, Exception] = {}
        self.loads: list[str] = []
        self.engines: list[PacedEngine] = []
        self.together = 0
        self.metrics = Metrics()
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def check(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> None:
        if entry.name in self.hopeless:
            raise self.hopeless[entry.name]

    def __call__(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> ServedModel:
        assert self._lock.acquire(blocking=False), "two models are loaded at the same time"
        try:
            tell("testing", 434, 1000)
            time.sleep(self.seconds)
            assert self.gate.wait(60)
            if entry.name in self.broken:
                raise self.broken[entry.name]
            if len(beside) >= self.room:
                raise NoRoomError(f"{entry.name} does not fit")
            self.loads.append(entry.name)
            self.together = max(self.together, len(beside) + 1)
            self.engines.append(PacedEngine(name=entry.name))
            return serve_engine(self.engines[-1], entry, self.metrics)
        finally:
            self._lock.release()
