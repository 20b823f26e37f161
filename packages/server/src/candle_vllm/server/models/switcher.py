# SPDX-License-Identifier: MIT
"""The model switcher: a single task that loads and unloads models, one after the other.

Step 1 of a request's life, below the manager. A requested model is loaded beside others if memory and
`max_loaded_models` allow it; if not, the least recently used model, idle ones first, finishes its requests and is
unloaded.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.progress import Progress, heard_by, tell
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.loop_threads import call_in, in_thread
from candle_vllm.server.models.slot import ModelSlot, ModelState, ServedModel
from candle_vllm.server.observing import series
from candle_vllm.server.observing.metrics import Metrics, Outcome
from candle_vllm.server.settings.catalogue import ModelEntry
from candle_vllm.server.settings.table import ManagerOptions

RETRY_SECONDS = 30.0  # pause after a failed load before a request tries again; an operator can try at once

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NoRoomError(Exception):
    """The model does not fit beside the loaded models, but would fit without some of them."""


class Load(Protocol):
    """Interface of a model loader; called in threads."""

    def check(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> None:
        """Raise the errors that can be found before other models are unloaded for this one."""

    def __call__(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> ServedModel:
        """Load a model while others stay loaded; NoRoomError if it does not fit beside them."""


@dataclass(frozen=True)
class _Unwanted:
    """A model that is to be unloaded; if `idle`, only if it has been idle for long enough.

    `done` is completed when the model is unloaded, or need not be unloaded any more.
    """

    slot: ModelSlot
    done: asyncio.Future[None]
    idle: bool


class ModelSwitcher:
    """Loads and unloads the models of the slots.

    Args:
        settled: called with a slot when its model is ready, or could not be loaded.
        died: called with a slot and its model when the model's engine dies.
    """

    def __init__(
        self,
        slots: Sequence[ModelSlot],
        load: Load,
        options: ManagerOptions,
        metrics: Metrics,
        settled: Callable[[ModelSlot], None],
        died: Callable[[ModelSlot, ServedModel], None],
    ) -> None:
        self._slots = tuple(slots)
        self._load = load
        self._options = options
        self._metrics = metrics
        self._settled = settled
        self._died = died
        self._wanted: deque[ModelSlot] = deque()
        self._unwanted: deque[_Unwanted] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._returned = asyncio.Event()  # set when a lease is released, for `_retire`
        self._leaving = set[asyncio.Task[None]]()  # tasks that close engines
        self.closing = False

    def adopt(self, slots: Sequence[ModelSlot], gone: Sequence[ModelSlot]) -> None:
        """Replace the slots; the models of the slots `gone` are unloaded after their last request."""
        for slot in gone:
            slot.going, slot.asked = True, False
        there = (each for each in self._slots if each.model is not None or each.state is ModelState.LOADING)
        still = [slot for slot in there if slot.going]
        self._slots = (*slots, *still)
        for slot in still:
            if not slot.in_flight:
                self.idle(slot)

    @property
    def loaded(self) -> list[ServedModel]:
        """The models in memory."""
        return [model for slot in self._slots if (model := slot.model) is not None]  # also called in threads

    def want(self, slot: ModelSlot, *, asked: bool = False) -> None:
        """Queue a model for loading because requests wait for it, or, with `asked`, even if no request waits."""
        if self.closing:
            slot.refuse(_shutting_down())
            return
        slot.asked = slot.asked or asked
        if slot not in self._wanted and slot.state is not ModelState.LOADING:
            if slot.state in (ModelState.UNLOADED, ModelState.FAILED):
                slot.state = ModelState.WAITING
            self._wanted.append(slot)
        self._work()

    async def unwant(self, slot: ModelSlot) -> None:
        """Unload a model, and wait until it is unloaded; HttpError 503 if the switcher is closing."""
        if self.closing:
            raise _shutting_down()
        await self._retire_soon(slot).done

    def idle(self, slot: ModelSlot) -> None:
        """React to the release of a model's last lease: start its idle timer, or unload it if it left the catalogue."""
        self._returned.set()
        if slot.going:
            if slot.model is not None and not self.closing:
                self._retire_soon(slot)
            return
        seconds = self.rest_of(slot)
        if seconds is not None and slot.timer is None and slot.state is ModelState.READY and not self.closing:
            slot.timer = asyncio.get_running_loop().call_later(seconds, self._unload_idle, slot)

    def rest_of(self, slot: ModelSlot) -> float | None:
        """Seconds after which an unused model is unloaded; None if it stays."""
        if slot.keep_seconds is None:
            return self._options.idle_unload_secs
        return None if slot.keep_seconds == math.inf else slot.keep_seconds

    def keep(self, slot: ModelSlot, seconds: float | None) -> None:
        """Set the idle time of a model; None is the setting `idle_unload_secs`."""
        slot.keep_seconds = seconds
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
        if not slot.in_flight:
            self.idle(slot)

    def let_go(self, model: ServedModel) -> asyncio.Task[None]:
        """Return a task that closes the engine of a model that no slot has; wait for it with `asyncio.shield`."""
        name = model.entry.name

        async def leave() -> None:
            try:
                await in_thread(lambda: _unload(model), f"unload-{name}")
            except Exception:
                logger.exception("the engine of %s could not be closed", name)

        task = asyncio.create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def close(self) -> None:
        """Stop the switcher, refuse waiting requests, and unload all models."""
        self.closing = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for entry in self._unwanted:
            _done(entry)
        for slot in self._slots:
            slot.refuse(_shutting_down())
        await asyncio.gather(*(self._unload(slot) for slot in self._slots if slot.model is not None))
        await asyncio.gather(*self._leaving)

    def _retire_soon(self, slot: ModelSlot, *, idle: bool = False) -> _Unwanted:
        entry = _Unwanted(slot, asyncio.get_running_loop().create_future(), idle)
        self._unwanted.append(entry)
        self._work()
        return entry

    def _work(self) -> None:
        if (self._worker is None or self._worker.done()) and not self.closing:
            self._worker = asyncio.create_task(self._change(), name="model-switcher")

    async def _change(self) -> None:
        while self._unwanted or self._wanted:
            if self._unwanted:
                entry = self._unwanted.popleft()
                try:
                    if entry.slot.model is not None and (not entry.idle or self._rested(entry.slot)):
                        reason = "its entry was removed or changed" if entry.slot.going else "on request"
                        unused = f"unused for {time.monotonic() - entry.slot.last_used:.0f} s"
                        await self._retire(entry.slot, unused if entry.idle else reason)
                finally:
                    _done(entry)
                continue
            slot = self._wanted.popleft()
            if slot.state is ModelState.READY:
                slot.grant()
            elif slot.asked or slot.is_waited_for:
                await self._bring(slot)
            elif slot.state is ModelState.WAITING:  # all requests for it were cancelled
                slot.state = ModelState.UNLOADED

    async def _bring(self, slot: ModelSlot) -> None:
        started = time.monotonic()
        slot.state, slot.error, slot.asked, slot.progress = ModelState.LOADING, None, False, None
        try:
            if self.loaded:  # else no model would be unloaded, and loading detects the same errors
                check = _heard(slot, lambda: self._load.check(slot.entry, self.loaded))  # may download the model
                await in_thread(check, f"check-{slot.entry.name}")
            while self._options.max_loaded_models is not None and len(self.loaded) >= self._options.max_loaded_models:
                await self._retire(self._least_used(), f"to make room for {slot.entry.name}")
            model = await self._load_beside(slot)
        except Exception as error:
            self._failed(slot, error)
            return
        slot.load_seconds = time.monotonic() - started
        self._metrics.count(series.LOADS, slot.entry.names[0], Outcome.OK)
        self._metrics.observe(series.LOAD_SECONDS, slot.load_seconds, slot.entry.names[0])
        self._settle(slot, model)

    async def _load_beside(self, slot: ModelSlot) -> ServedModel:
        def load() -> ServedModel:
            tell("importing the engine")
            return self._load(slot.entry, self.loaded)

        while True:
            try:
                return await in_thread(_heard(slot, load), f"load-{slot.entry.name}", _unload)
            except NoRoomError as error:
                if not self.loaded:
                    raise
                victim = self._least_used()
                logger.info("%s: unloading %s to make room", error, victim.entry.name)
                await self._retire(victim, f"to make room for {slot.entry.name}")

    def _failed(self, slot: ModelSlot, error: Exception) -> None:
        ours = not isinstance(error, (CandleVllmError, NoRoomError))  # errors of files or settings need no traceback
        if ours or not slot.awaited:
            logger.error("the model %s could not be loaded: %s", slot.entry.name, error, exc_info=ours)
        _forget_frames(error)
        slot.state, slot.error, slot.failed_at, slot.asked = ModelState.FAILED, error, time.monotonic(), False
        self._metrics.count(series.LOADS, slot.entry.names[0], Outcome.FAILED)
        slot.refuse(load_failed(slot))
        self._settled(slot)

    def _settle(self, slot: ModelSlot, model: ServedModel) -> None:
        slot.ready(model)
        loop = asyncio.get_running_loop()

        def notice() -> None:
            call_in(loop, self._died, slot, model)

        model.engine.add_death_callback(notice)
        self._settled(slot)
        slot.grant()
        if not slot.in_flight:
            self.idle(slot)

    def _least_used(self) -> ModelSlot:
        """Return the slot to unload next: the least recently used of the idle ones, else of the busy ones."""
        slots = [slot for slot in self._slots if slot.model is not None]
        return min(slots, key=lambda slot: (slot.in_flight > 0, slot.last_used))

    async def _retire(self, slot: ModelSlot, reason: str) -> None:
        """Unload a model after its requests or `model_drain_timeout`; new requests wait for the next load."""
        slot.state = ModelState.DRAINING
        try:
            async with asyncio.timeout(self._options.model_drain_timeout):
                while slot.in_flight:
                    self._returned.clear()
                    await self._returned.wait()
        except TimeoutError:
            logger.warning("%s still had %d requests: they are aborted", slot.entry.name, slot.in_flight)
        await self._unload(slot)
        self._metrics.count(series.UNLOADS, slot.entry.names[0])
        logger.info("unloaded %s (%s)", slot.entry.name, reason)
        if slot.waiters:
            self.want(slot)

    async def _unload(self, slot: ModelSlot) -> None:
        model, slot.model = slot.model, None
        slot.state, slot.loaded_at = ModelState.UNLOADED, None
        slot.keep_seconds = None  # a request's `keep_alive` ends when the model is unloaded
        self._slots = tuple(each for each in self._slots if each is not slot or not slot.going)
        if model is None:  # its engine died while it was drained
            return
        model.admission.close()
        await asyncio.shield(self.let_go(model))

    def _unload_idle(self, slot: ModelSlot) -> None:
        """Unload a model after its idle time; restart the timer if the model was used meanwhile."""
        slot.timer = None
        if slot.state is not ModelState.READY or slot.in_flight or self.closing:
            return
        if self._rested(slot):
            self._retire_soon(slot, idle=True)
        elif (seconds := self.rest_of(slot)) is not None:
            left = seconds - (time.monotonic() - slot.last_used)
            slot.timer = asyncio.get_running_loop().call_later(max(left, 0.001), self._unload_idle, slot)

    def _rested(self, slot: ModelSlot) -> bool:
        seconds = self.rest_of(slot)
        return seconds is not None and not slot.in_flight and time.monotonic() - slot.last_used >= seconds - 0.001


def _shutting_down() -> HttpError:
    return HttpError(503, "The server is shutting down.", "shutting_down", {"retry-after": "5"})


def load_failed(slot: ModelSlot) -> HttpError:
    """Return the error for requests to a model that failed to load, which is not tried again before `RETRY_SECONDS`."""
    left = max(1, round((slot.failed_at or time.monotonic()) + RETRY_SECONDS - time.monotonic()))
    message = f"The model {slot.entry.name!r} could not be loaded; the server's log has the reason."
    return HttpError(503, message, "model_load_failed", {"retry-after": str(left)})


def _heard(slot: ModelSlot, work: Callable[[], T]) -> Callable[[], T]:
    """Wrap work so that the progress that it reports is stored in a slot."""

    def hear(progress: Progress) -> None:  # replaces the previous progress
        slot.progress = progress

    def heard() -> T:
        with heard_by(hear):
            return work()

    return heard


def _done(entry: _Unwanted) -> None:
    if not entry.done.done():
        entry.done.set_result(None)


def _forget_frames(error: BaseException | None) -> None:
    """Clear the frames of a stored error, which would otherwise keep the weights of a partly loaded model in memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _unload(model: ServedModel) -> None:
    gc.unfreeze()  # garbage that was frozen at startup would keep alive what it refers to
    model.close()
