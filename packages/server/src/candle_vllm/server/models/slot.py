# SPDX-License-Identifier: MIT
"""State of one model of the catalogue (step 1): whether it is loaded, its leases, and the requests that wait for it."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from candle_vllm.core.progress import Progress
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.anthropic import MessagesAdapter
from candle_vllm.openai.ollama import OllamaAdapter
from candle_vllm.server.models.admission import Admission, Queued
from candle_vllm.server.models.library import Description
from candle_vllm.server.observing.model_metrics import EngineWatcher, ServedEngine
from candle_vllm.server.settings.catalogue import ModelEntry

MAX_DEATHS = 5  # after more deaths within `DEATH_WINDOW` (`manager.py`), an engine is not restarted automatically


class ModelState(enum.StrEnum):
    """State of a model."""

    UNLOADED = "unloaded"
    WAITING = "waiting"  # requested; its load has not begun
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # running requests finish, new ones wait
    FAILED = "failed"  # could not be loaded, or its engine died; a request loads it, after a failed load with a pause


@dataclass(eq=False)
class ServedModel:
    """A loaded model with its API adapters.

    Attributes:
        entry: its entry in the catalogue; only the names may change while it is loaded.
        admission: admission control of the engine.
        memory: bytes of its weights, cache and sparse-attention indexer, for memory checks of other models.
    """

    entry: ModelEntry
    engine: ServedEngine
    watcher: EngineWatcher
    adapter: OpenAIAdapter
    messages: MessagesAdapter
    ollama: OllamaAdapter
    admission: Admission
    memory: int = 0

    def rename(self, entry: ModelEntry) -> None:
        """Replace the entry by one with other names for clients."""
        self.entry = entry
        self.adapter.rename(entry.names)

    def close(self) -> None:
        """Remove the model's gauges and close the engine. Further calls have no effect."""
        self.watcher.close()
        self.engine.close()


@dataclass
class ModelSlot:
    """A model of the catalogue and its state.

    Attributes:
        idle: called when the last lease is released.
        in_flight: number of leases that are not released.
        waiters: requests that wait for the model, in order of arrival.
        arrivals: description of each waiting request, for operators and for the limit of each key.
        asked: whether the model is to be loaded even if no request waits for it.
        error, failed_at: reason why loading failed or the engine died; and `time.monotonic()` of a failed load.
        deaths: `time.monotonic()` of its engine's latest deaths, and of failed loads after them.
        dead: whether its engine died, and no other was loaded since.
        last_used, loaded_at: `time.monotonic()` of the last use, and Unix time in seconds of the load.
        awaited: whether the server's start waits for the model, and reports its failure itself.
        going: whether the model left the catalogue, so that it is unloaded when its last lease is released.
        resting: number of operators' requests that wait for it to finish its requests and sleep; new ones are refused.
        described: description from the model's files, read at the first request for it.
        keep_seconds: idle time that the latest request set; None is the setting `idle_unload_secs`.
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
    dead: bool = False
    last_used: float = 0.0
    loaded_at: float | None = None
    load_seconds: float | None = None
    progress: Progress | None = None
    awaited: bool = False
    timer: asyncio.TimerHandle | None = None
    going: bool = False
    resting: int = 0
    keep_seconds: float | None = None
    described: Description | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether a request waits and is not cancelled."""
        return any(not waiter.done() for waiter in self.waiters)

    @property
    def given_up(self) -> bool:
        """Whether its engine died so often that the model is not loaded again automatically."""
        return self.state is ModelState.FAILED and len(self.deaths) > MAX_DEATHS

    def ready(self, model: ServedModel) -> None:
        """Set the loaded model."""
        if model.entry is not self.entry:
            model.rename(self.entry)  # it got another name while it was loaded
        self.model, self.state = model, ModelState.READY
        self.last_used, self.loaded_at = time.monotonic(), time.time()
        self.error = self.failed_at = None
        self.dead = self.asked = False

    def rename(self, entry: ModelEntry) -> None:
        """Take the names for clients from another entry; the first stays, because the model's metrics have it."""
        assert entry.names[0] == self.entry.names[0]
        settings = dataclasses.replace(self.entry.settings, served_model_name=entry.settings.served_model_name)
        self.entry = dataclasses.replace(self.entry, settings=settings, aliases=entry.names)
        if self.model is not None:
            self.model.rename(self.entry)

    def lease(self) -> Lease:
        """Return a lease, which keeps the model loaded until it is released."""
        assert self.model is not None
        self.in_flight += 1
        self.last_used = time.monotonic()
        return Lease(self, self.model)

    def grant(self) -> None:
        """Give a lease to every waiting request."""
        for waiter in self._taken():
            waiter.set_result(self.lease())

    def refuse(self, error: Exception) -> None:
        """Fail every waiting request with an error."""
        for waiter in self._taken():
            waiter.set_exception(error)

    def _taken(self) -> Iterator[asyncio.Future[Lease]]:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                yield waiter

    def forget(self, waiter: asyncio.Future[Lease]) -> None:
        """Remove a waiting request; release its lease if it was granted at the same time."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            waiter.result().release()
        else:
            waiter.cancel()


@dataclass(eq=False)
class Lease:
    """The use of a loaded model by one request; the first `release` ends it and calls `beside`, if that is set."""

    _slot: ModelSlot | None
    model: ServedModel
    beside: Callable[[], object] | None = None

    def release(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            if self.beside is not None:
                self.beside()
            slot.in_flight -= 1
            slot.last_used = time.monotonic()
            if slot.in_flight == 0:
                slot.idle(slot)
