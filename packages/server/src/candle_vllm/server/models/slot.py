# SPDX-License-Identifier: MIT
"""One model of the catalogue as the manager sees it: its state, who uses it, and who waits for it.

Step 1 of a request's life. Nothing here waits or loads; the manager does.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from candle_vllm.core.progress import Progress
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.anthropic import MessagesAdapter
from candle_vllm.openai.ollama import OllamaAdapter
from candle_vllm.server.models.admission import Admission, Queued
from candle_vllm.server.models.library import Description
from candle_vllm.server.observing.model_metrics import EngineWatcher, ServedEngine
from candle_vllm.server.settings.catalogue import ModelEntry

MAX_DEATHS = 5  # of an engine within the manager's window, before it is not started again by itself


class ModelState(enum.StrEnum):
    """Where a model stands between its files and its answers."""

    UNLOADED = "unloaded"
    WAITING = "waiting"  # wanted; another model is being loaded or drained
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # running requests finish, new ones wait
    FAILED = "failed"  # could not be loaded, or died; asked for again, it is tried again


@dataclass(frozen=True)
class ServedModel:
    """A loaded model with all that answers in its name.

    Attributes:
        entry: of the catalogue.
        engine: the engine; the server closes it when the model is unloaded.
        watcher: counts what it is asked.
        adapter, messages, ollama: OpenAI's, Anthropic's and Ollama's requests answered by it.
        admission: who may use it when.
        memory: bytes that it holds, weights and cache, for the next decision about room.
    """

    entry: ModelEntry
    engine: ServedEngine
    watcher: EngineWatcher
    adapter: OpenAIAdapter
    messages: MessagesAdapter
    ollama: OllamaAdapter
    admission: Admission
    memory: int = 0

    def close(self) -> None:
        """Takes the model's gauges away and closes the engine. Closing twice is fine."""
        self.watcher.close()
        self.engine.close()


@dataclass
class ModelSlot:
    """A model of the catalogue and its state.

    Attributes:
        idle: called when the last lease comes back.
        in_flight: leases that are out.
        waiters: requests that wait for the model, in order.
        arrivals: what is told of each of them.
        asked: it shall be loaded also if no request waits for it.
        error, failed_at: why it could not be loaded, or died; and `time.monotonic()` when loading failed.
        deaths: `time.monotonic()` of its engine's latest deaths.
        last_used, loaded_at: `time.monotonic()` and Unix seconds.
        load_seconds: how long the last load took.
        progress: what is being done while it is loaded, and how far that is.
        awaited: the start waits for it, and says itself why it cannot be loaded.
        going: the catalogue has it no more: it goes when its last lease comes back.
        timer: runs until the model has rested long enough to be unloaded.
        described: what its files say, once somebody has asked.
        keep_seconds: how long the latest request that said so wants it to rest; None is the manager's `idle_seconds`.
    """

    entry: ModelEntry
    idle: Callable[[ModelSlot], None]
    state: ModelState = ModelState.UNLOADED
    model: ServedModel | None = None
    in_flight: int = 0
    waiters: deque[asyncio.Future[Lease]] = field(default_factory=deque)
    arrivals: dict[asyncio.Future[Lease], Queued] = field(default_factory=dict)
    asked: bool = False
    error: Exception | None = None
    failed_at: float | None = None
    deaths: list[float] = field(default_factory=list)
    last_used: float = 0.0
    loaded_at: float | None = None
    load_seconds: float | None = None
    progress: Progress | None = None
    awaited: bool = False
    timer: asyncio.TimerHandle | None = None
    going: bool = False
    keep_seconds: float | None = None
    described: Description | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether a request waits that has not left."""
        return any(not waiter.done() for waiter in self.waiters)

    @property
    def given_up(self) -> bool:
        """Whether its engine died so often that it is not started again by itself."""
        return self.state is ModelState.FAILED and len(self.deaths) > MAX_DEATHS

    def ready(self, model: ServedModel) -> None:
        """The model is loaded."""
        self.model, self.state = model, ModelState.READY
        self.last_used, self.loaded_at = time.monotonic(), time.time()
        self.error = self.failed_at = None

    def lease(self) -> Lease:
        """A claim on the loaded model, which keeps it loaded until it is released."""
        assert self.model is not None
        self.in_flight += 1
        self.last_used = time.monotonic()
        return Lease(self, self.model)

    def grant(self) -> None:
        """The model is ready: every request that waits gets its lease."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(self.lease())

    def refuse(self, error: Exception) -> None:
        """Every request that waits fails."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)

    def forget(self, waiter: asyncio.Future[Lease]) -> None:
        """A request waits no more; a lease that it was given in the same tick comes back."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            waiter.result().release()
        else:
            waiter.cancel()


class Lease:
    """The use of a loaded model by one request; released once, however often `release` is called.

    Attributes:
        beside: called when it is released.
    """

    def __init__(self, slot: ModelSlot, model: ServedModel) -> None:
        self.model = model
        self.beside: Callable[[], object] | None = None
        self._slot: ModelSlot | None = slot

    def release(self) -> None:
        """The request is over."""
        slot, self._slot = self._slot, None
        if slot is not None:
            if self.beside is not None:
                self.beside()
            slot.in_flight -= 1
            slot.last_used = time.monotonic()
            if slot.in_flight == 0:
                slot.idle(slot)
