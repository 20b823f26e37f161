"""Engines for the server's tests, with a pace and a pulse, and a loader of them for the model manager."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import msgspec

from candle_vllm.core.engine.request import (
    EngineStats,
    GenerationOutput,
    GenerationRequest,
    OutputCollector,
    TokenOutput,
)
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing import ScriptedEngine, ScriptedStream
from candle_vllm.server.models.catalogue import ModelEntry
from candle_vllm.server.models.loader import serve_engine
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.models.switcher import NoRoomError
from candle_vllm.server.observing.metrics import Metrics


async def whole_answer(engine: Any, prompt: str | list[int], params: SamplingParams) -> GenerationOutput:
    """The answer that the pieces of a stream add up to."""
    ids = engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    collector = OutputCollector(GenerationRequest(request_id="whole", prompt=None, prompt_token_ids=ids, params=params))
    async for piece in engine.stream(prompt, params):
        collector.add(piece)
    return collector.result()


class PacedEngine(ScriptedEngine):
    """Waits `pause` seconds before every piece, `first_pause` before the first; dies on request."""

    def __init__(self, *args: Any, pause: float = 0.0, first_pause: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pause = pause
        self.first_pause = first_pause
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

    def stream(self, *args: Any, **options: Any) -> Any:
        return PacedStream(super().stream(*args, **options), self.pause, self.first_pause)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PacedStream:
    def __init__(self, inner: ScriptedStream, pause: float, first_pause: float) -> None:
        self.request = inner.request
        self._inner = inner
        self._pauses = [first_pause or pause]
        self._pause = pause

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        pause = self._pauses.pop() if self._pauses else self._pause
        if pause:
            await asyncio.sleep(pause)
        return await self._inner.__anext__()

    async def aclose(self) -> None:
        await self._inner.aclose()


class FakeLoader:
    """Loads scripted engines: `room` of them fit, each takes `seconds`; `broken` ones fail, `hopeless` ones early."""

    def __init__(self, room: int = 9, seconds: float = 0.0) -> None:
        self.room = room
        self.seconds = seconds
        self.broken: dict[str, Exception] = {}
        self.hopeless: dict[str, Exception] = {}
        self.loads: list[str] = []
        self.engines: list[PacedEngine] = []
        self.together = 0
        self.metrics = Metrics()
        self._lock = threading.Lock()

    def check(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> None:
        if entry.name in self.hopeless:
            raise self.hopeless[entry.name]

    def __call__(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> ServedModel:
        assert self._lock.acquire(blocking=False), "two models are loaded at the same time"
        try:
            time.sleep(self.seconds)
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
