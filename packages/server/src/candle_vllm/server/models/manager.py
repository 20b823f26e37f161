# SPDX-License-Identifier: MIT
"""The model manager: gives each request a loaded model, and then a place in the model's engine.

It works in step 1 of a request's life, after the request's field `model` has been read. Requests for the same model
share one load, and its failure. The switcher loads and unloads the models. A turn is one request's right to use a
model; it ends when the response is complete or the client has disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec
from starlette.types import Scope

from candle_vllm.core.engine.step.thread import SLEEPS
from candle_vllm.core.errors import AdapterError, CandleVllmError, EngineDeadError, EngineSleepingError, RequestError
from candle_vllm.openai.errors import ModelNotServedError
from candle_vllm.openai.fair_threads import asker
from candle_vllm.server.adapters.registry import Adapter, Adapters
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.limits import RateLimits
from candle_vllm.server.http.routing import NOBODY, Caller, caller_of
from candle_vllm.server.models.admission import Place, Queued, RetiredError
from candle_vllm.server.models.slot import Lease, ModelSlot, ModelState, ServedModel
from candle_vllm.server.models.switcher import RETRY_SECONDS, Load, ModelSwitcher, load_failed
from candle_vllm.server.observing.metrics import Metrics, Rejection
from candle_vllm.server.observing.series import WAIT_SECONDS
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.table import ManagerOptions

logger = logging.getLogger(__name__)

DEATH_WINDOW = 300.0  # an engine that dies more than MAX_DEATHS times in these seconds is not restarted automatically


class Changes(msgspec.Struct, frozen=True):
    """Names of the models that a new catalogue changes."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


class ModelManager:
    """The models of a catalogue, some of them loaded. Not thread-safe: for one event loop.

    Args:
        load: loads a model; None if the caller has loaded the models, which then stay loaded.
        adapters: the registry of LoRA adapters; None allows only the adapters in the models' settings.

    Attributes:
        active: name of the model for requests without a model name.
        rates: rate limits of the callers.
        switch_requested_at: Unix time in seconds of a pending change of `active`, or None.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        load: Load | None,
        options: ManagerOptions | None = None,
        metrics: Metrics | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self._options = options or ManagerOptions()
        self.catalogue = catalogue
        self.metrics = metrics or Metrics()
        self.rates = RateLimits()
        self.adapters = adapters or Adapters()
        self._warming = set[asyncio.Task[None]]()
        self.adapters.adopt(catalogue)
        self.active = catalogue.default.name
        self.switch_requested_at: float | None = None
        self._chosen: str | None = None  # becomes `active` when it is ready
        self.slots = {entry.name: ModelSlot(entry, self._idle) for entry in catalogue.entries}
        self._switcher: ModelSwitcher | None = None
        if load is not None:
            slots = tuple(self.slots.values())
            self._switcher = ModelSwitcher(slots, load, self._options, self.metrics, self._settled, self.died)

    @classmethod
    def of_loaded(cls, model: ServedModel, metrics: Metrics, adapters: Adapters | None = None) -> ModelManager:
        """Return a manager of one loaded model, which stays loaded."""
        manager = cls(Catalogue([model.entry]), None, metrics=metrics, adapters=adapters)
        manager.slots[model.entry.name].ready(model)
        return manager

    # ---- for requests ------------------------------------------------------------------------------------------------

    def find(self, name: str | None, *, exact: bool = False, caller: Caller = NOBODY) -> ModelSlot:
        """Return the model of a request, by the name in it; for an adapter's name, its base model.

        Args:
            exact: accept only a model's own names: no adapter, and no other name for a single model.
            caller: sender of the request; error messages do not list models that it may not use.

        Raises ModelNotServedError if no model has this name.
        """
        adapter = None if exact or name is None else self.adapters.find(name)
        if adapter is not None:
            return self.slots[adapter.base]
        try:
            entry = self.catalogue.find(name, exact=exact)
        except RequestError as error:
            if caller.models is not None:
                raise type(error)(f"The model {name!r:.200} is not served here.", "model") from None
            if self.adapters.bases() and not exact:
                raise type(error)(f"{error} {self.adapters.near(name or '')}", "model") from None
            raise
        chosen = self.active if entry is self.catalogue.default and name not in entry.names else entry.name
        return self.slots[chosen]

    async def reach(self, name: str | None, caller: Caller) -> None:
        """Check that the caller may use a name, and fetch the adapters that the request needs.

        An unknown adapter is looked up (`--lora-resolver`); the lookup counts as one more request in the rate limits.

        Raises:
            ModelNotServedError: no model has this name, and no model supports adapters.
            HttpError: 403 if the API key may not use the name; and as `Adapters.reach` and `RateLimits.admit` raise it.
        """
        if name is None or not self.adapters.bases() or self.catalogue.has(name):
            self.permit(name, caller)
            entry = self.find(name, caller=caller).entry
            if entry.settings.enable_lora:
                await self.adapters.bring(entry.name)
            return
        if not caller.may_use(*self.adapters.spelled(name)):
            raise _not_allowed(name)
        if self.adapters.looks_elsewhere and self.adapters.find(name) is None:
            self.rates.admit(caller)
        await self.adapters.reach(name)

    def permit(self, name: str | None, caller: Caller) -> None:
        """Raise HttpError 403 if the caller may not use a name; if its models are limited, also raise as `find`."""
        if caller.models is None:
            return
        adapter = self.adapters.find(name)
        names = self.find(name, caller=caller).entry.names if adapter is None else adapter.names
        if not caller.may_use(*names):
            raise _not_allowed(name)

    async def acquire(self, name: str | None) -> Lease:
        """Wait until a model is loaded, and return a lease of it. Cancelling the coroutine ends the wait.

        Raises:
            ModelNotServedError: no model or adapter has this name.
            HttpError: 503 if too many requests wait, the wait is too long, the load fails, or the server shuts down.
            EngineDeadError: the model's engine has died and is not restarted.
            EngineSleepingError: the model finishes its requests before it sleeps.
        """
        slot, adapter = self.find(name), None if name is None else self.adapters.find(name)
        if adapter is None:
            return await self._acquire(slot)
        done = self.adapters.use(adapter)
        try:
            lease = await self._acquire(slot)
        except BaseException:
            done()
            raise
        lease.beside = done
        return lease

    async def _acquire(self, slot: ModelSlot) -> Lease:
        if slot.state is ModelState.READY and slot.model is not None:
            if slot.model.engine.is_alive:
                if slot.resting:
                    raise EngineSleepingError(SLEEPS)
                return slot.lease()
            if not slot.entry.settings.has_own_process or self._switcher is None:
                self.metrics.refused(slot.entry.names[0], Rejection.ENGINE_DEAD)
                raise EngineDeadError("the engine has stopped")
            self.died(slot, slot.model)
        self._check_queue(slot)
        return await self._wait(slot, self._options.model_wait_timeout)

    async def start(self) -> ModelSlot:
        """Load the active model, without a timeout; raises the loader's error if it cannot be loaded."""
        slot = self.slots[self.active]
        slot.awaited = True
        try:
            (await self._wait(slot, None)).release()
        except HttpError:
            if slot.error is not None:
                raise slot.error from None
            raise
        finally:
            slot.awaited = False
        return slot

    def _check_queue(self, slot: ModelSlot) -> None:
        name, failed_at = slot.entry.names[0], slot.failed_at if slot.state is ModelState.FAILED else None
        if failed_at is not None and time.monotonic() - failed_at < RETRY_SECONDS:
            self.metrics.refused(name, Rejection.MODEL_NOT_READY)
            raise load_failed(slot)
        key, most, count, of_key = Queued.now().key, self._options.queue_size, len(slot.waiters), ""
        if asker.get() and count < most:
            most, of_key = max(1, most // 2), " of this API key"
            count = sum(each.key == key for each in slot.arrivals.values())
        if count >= most:
            self.metrics.refused(name, Rejection.QUEUE_FULL)
            message = f"{count} of at most {most} requests{of_key} wait for the model {slot.entry.name!r}."
            raise HttpError(503, message, "overloaded", {"retry-after": "5"})

    async def _wait(self, slot: ModelSlot, patience: float | None) -> Lease:
        assert self._switcher is not None
        began = time.monotonic()
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        slot.waiters.append(waiter)
        slot.arrivals[waiter] = Queued.now()
        self._switcher.want(slot)
        try:
            async with asyncio.timeout(patience):
                lease = await waiter
        except (TimeoutError, asyncio.CancelledError) as end:
            slot.forget(waiter)
            if not isinstance(end, TimeoutError):
                raise
            self.metrics.refused(slot.entry.names[0], Rejection.MODEL_NOT_READY)
            message = f"The model {slot.entry.name!r} was not ready within {patience:g} seconds."
            raise HttpError(503, message, "model_not_ready", {"retry-after": "10"}) from None
        finally:
            del slot.arrivals[waiter]
        self.metrics.observe(WAIT_SECONDS, time.monotonic() - began, slot.entry.names[0])
        return lease

    # ---- for operators -----------------------------------------------------------------------------------------------

    async def load(self, name: str | None) -> ModelSlot:
        """Load a model and wait for it, even if it has just failed; raises as `acquire`."""
        slot = self.find(name, exact=True)
        slot.failed_at = None
        (await self.acquire(slot.entry.name)).release()
        return slot

    async def unload(self, name: str | None) -> ModelSlot:
        """Unload a loaded model after its running requests; HttpError 409 if models stay loaded, 503 on shutdown."""
        slot = self.find(name, exact=True)
        if self._switcher is None:
            raise HttpError(409, "The model of this server stays loaded.", "model_stays", param="model")
        await self._switcher.unwant(slot)
        return slot

    def select(self, name: str | None) -> ModelSlot:
        """Make a model the active one as soon as it is loaded; does not wait."""
        slot = self.find(name, exact=True)
        if slot.state is ModelState.READY or self._switcher is None:
            self.active, self._chosen, self.switch_requested_at = slot.entry.name, None, None
        else:
            self._chosen, self.switch_requested_at = slot.entry.name, time.time()
            self._switcher.want(slot, asked=True)
        return slot

    def keep(self, name: str | None, seconds: float) -> bool:
        """Set how long a model stays loaded after its last use; return False if this manager never unloads models."""
        slot = self.find(name)
        if self._switcher is None:
            return False
        self._switcher.keep(slot, seconds)
        return True

    def expires_at(self, slot: ModelSlot) -> float | None:
        """Unix time in seconds at which a loaded model will be unloaded if nobody uses it; None if it stays loaded."""
        rest = None if self._switcher is None else self._switcher.rest_of(slot)
        return None if rest is None else time.time() + rest - (time.monotonic() - slot.last_used)

    def adopt(self, catalogue: Catalogue) -> Changes:
        """Replace the catalogue; HttpError 409 if this manager does not unload models, UsageError as `Adapters.adopt`.

        A model with unchanged settings keeps its state, also if it has other aliases. A changed or removed model
        finishes its running requests. Requests that wait for a changed model wait for the new one, and those for a
        removed model fail. A changed model that was loaded, selected or waited for is loaded.
        """
        if self._switcher is None:
            raise HttpError(409, "The model of this server stays loaded.", "model_stays")
        self.adapters.adopt(catalogue)  # raises before anything has changed
        before, slots, renamed = self.slots, dict[str, ModelSlot](), set[str]()
        for entry in catalogue.entries:
            old = before.get(entry.name)
            if old is None or not old.entry.is_as(entry):
                slots[entry.name] = ModelSlot(entry, self._idle)
                continue
            slots[entry.name] = old
            if old.entry.names != entry.names:
                renamed.add(entry.name)
            old.rename(entry)  # also to names that are equal, but are the operator's now, who alone may remove them
        gone = [slot for name, slot in before.items() if slots.get(name) is not slot]
        if self.active == self.catalogue.default.name or self.active not in slots:
            self.active = catalogue.default.name
        if self._chosen not in slots:
            self._chosen, self.switch_requested_at = None, None
        self.catalogue, self.slots = catalogue, slots
        self._switcher.adopt(tuple(slots.values()), gone)
        for old in gone:
            new = slots.get(old.entry.name)
            if new is None:
                old.refuse(ModelNotServedError(f"The model {old.entry.name!r} is not served any more.", "model"))
                continue
            wanted = old.model is not None or old.is_waited_for or old.entry.name == self._chosen
            new.waiters, old.waiters = old.waiters, new.waiters
            new.arrivals = old.arrivals  # the same dictionary, since each waiting request removes itself from it
            if wanted:
                self._switcher.want(new, asked=True)
        return Changes(
            tuple(name for name in slots if name not in before),
            tuple(name for name in before if name in slots and (name in renamed or slots[name] is not before[name])),
            tuple(slot.entry.name for slot in gone if slot.entry.name not in slots),
        )

    def change(self, old: ModelEntry | None, new: ModelEntry | None) -> Changes:
        """Replace, add (`old` is None) or remove (`new` is None) a model; raises as `Catalogue` and `adopt`."""
        entries, news = list(self.catalogue.entries), [] if new is None else [new]
        at = len(entries) if old is None else [each.name for each in entries].index(old.name)
        entries[at : at + 1] = news
        return self.adopt(Catalogue(entries, self.catalogue.default.name))

    def died(self, slot: ModelSlot, model: ServedModel) -> None:
        """Release a model's dead engine and load the model again; after repeated deaths, only a request reloads it."""
        if self._switcher is None or slot.model is not model or self._switcher.closing:
            return
        logger.error("the engine of %s has died", slot.entry.name)
        slot.model = None
        model.admission.close()
        self._switcher.let_go(model)
        if slot.state is not ModelState.READY or slot.going:  # it was about to be unloaded
            return
        slot.state, slot.error, slot.failed_at = ModelState.FAILED, EngineDeadError("the engine has stopped"), None
        slot.dead, now = True, time.monotonic()
        slot.deaths = [then for then in slot.deaths if now - then < DEATH_WINDOW]
        self._revive(slot)

    def _revive(self, slot: ModelSlot) -> None:
        """Reload a model whose engine has died, unless it died too often; a failed load counts as a death."""
        switcher = self._switcher
        if switcher is None or switcher.closing or slot.going or not slot.dead or slot.state is not ModelState.FAILED:
            return
        slot.deaths.append(time.monotonic())
        if not slot.given_up:
            switcher.want(slot, asked=True)

    @property
    def loaded(self) -> list[ServedModel]:
        """The models in memory."""
        return [model for slot in self.slots.values() if (model := slot.model) is not None]  # also called in threads

    @property
    def is_healthy(self) -> bool:
        """Whether every engine is alive or is restarted automatically."""
        alive = all(model.engine.is_alive or model.entry.settings.has_own_process for model in self.loaded)
        return alive and not any(slot.given_up for slot in self.slots.values())

    async def close(self) -> None:
        """Unload the models that this manager loaded; refuse waiting requests and abort running ones."""
        if self._switcher is not None:
            await self._switcher.close()

    async def warm(self, slot: ModelSlot) -> None:
        """Load the model's adapters that are pinned, not yet looked up, or in `lora_warmup`; log failures."""
        pinned = [each.name for each in self.adapters.given(slot.entry.name) if each.pinned or not each.kind]
        for name in dict.fromkeys([*pinned, *slot.entry.settings.lora_warmup]):
            model, own = slot.model, f"{slot.entry.names[0]}:{name}"
            try:
                adapter = await self.adapters.reach(own if self.adapters.find(own) else name)
                if adapter is not None and adapter.base != slot.entry.name:
                    adapter = await self.adapters.reach(own)  # the name alone is another model's adapter
                if adapter is None:
                    raise AdapterError("no adapter source has an adapter of this name")
                if model is not None:
                    await asyncio.to_thread(_load_adapter, model, adapter)
            except (CandleVllmError, HttpError) as error:
                logger.error("the adapter %s of %s could not be preloaded: %s", name, slot.entry.name, error)

    def _settled(self, slot: ModelSlot) -> None:
        if slot.state is ModelState.READY and slot.entry.settings.enable_lora:
            task = asyncio.get_running_loop().create_task(self.warm(slot), name="warm-adapters")
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)
        if slot.dead and slot.state is ModelState.FAILED:  # proxies send no request to a server that is not ready
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._revive, slot)
        if slot.going or slot.entry.name != self._chosen:
            return
        if slot.state is ModelState.READY:
            self.active = slot.entry.name
        self._chosen, self.switch_requested_at = None, None

    def _idle(self, slot: ModelSlot) -> None:
        if self._switcher is not None:
            self._switcher.idle(slot)


def _load_adapter(model: ServedModel, adapter: Adapter) -> None:
    model.engine.add_lora(adapter.request)
    if adapter.pinned:
        model.engine.pin_lora(adapter.request.lora_name)


def _not_allowed(name: str | None) -> HttpError:
    which = "the default model" if name is None else f"the model {name!r:.200}"  # reveals no name but the request's
    message = f"This API key may not use {which}; the server's operator sets which models it may use."
    return HttpError(403, message, "model_not_allowed", param="model")


@dataclass
class Turn:
    """The right to use a model now; only the first call of `release` has an effect."""

    lease: Lease
    place: Place

    @property
    def model(self) -> ServedModel:
        return self.lease.model

    def release(self) -> None:
        """Release the place and the lease."""
        self.place.leave()
        self.lease.release()


async def take_turn(scope: Scope, name: str | None, *, sequences: int = 1, priority: int = 0) -> Turn:
    """Wait for a model and for a place in its engine. Cancelling the coroutine ends the wait.

    Args:
        scope: ASGI scope of the request, whose body has been read.
        priority: requests with a lower value run first; unless the operator allows priorities, a negative one is 0.

    Raises ModelNotServedError, HttpError, EngineDeadError and EngineSleepingError as `ModelManager.reach`,
    `ModelManager.acquire`, `RateLimits.admit` and `Admission.enter`.
    """
    manager: ModelManager = scope["app"].state.manager
    caller = caller_of(scope)
    await manager.reach(name, caller)
    manager.find(name, caller=caller)  # raises for an unknown model, before the request counts in the rate limits
    with manager.rates.counted(caller):
        while True:
            lease = await manager.acquire(name)
            try:
                place = await enter(lease, caller, sequences, priority)
            except RetiredError:  # the model was unloaded or its engine died: wait for it again
                lease.release()
            except BaseException:
                lease.release()
                raise
            else:
                return Turn(lease, place)


async def enter(lease: Lease, caller: Caller, sequences: int, priority: int) -> Place:
    """Wait as `Admission.enter` does; unless the operator allows priorities, a priority below 0 counts as 0."""
    allowed = lease.model.entry.settings.enable_request_priority
    return await lease.model.admission.enter(caller.label, sequences, priority if allowed else max(priority, 0))
