# SPDX-License-Identifier: MIT
"""Cards and status of the models, for clients and operators, and request bodies that name a model (step 1)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import model_validator

from candle_vllm.core import errors
from candle_vllm.openai import ModelCard
from candle_vllm.openai.protocol.fields import Name, WireModel, invalid
from candle_vllm.server.http.routing import NOBODY, Caller
from candle_vllm.server.loop_threads import in_thread
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelSlot, ModelState
from candle_vllm.server.models.switcher import NoRoomError

MAX_ERROR = 2000  # characters of an error text
_FEW = 200  # more cards than this are made in a thread
FAILURES: tuple[tuple[type[Exception], str], ...] = (  # the first match counts
    (errors.NoMemoryError, "memory"),
    (NoRoomError, "memory"),
    (MemoryError, "memory"),
    (errors.ModelNotFoundError, "not_found"),
    (errors.UnsupportedModelError, "unsupported"),
    (errors.InvalidFileError, "damaged"),
    (errors.WeightsError, "damaged"),
    (errors.ConfigError, "settings"),
    (errors.EngineDeadError, "died"),
    (Exception, "other"),
)
"""Kinds of failure that clients see. Only operators see the text of an error, which may contain paths."""


_KNOWN = (
    "architecture", "num_parameters", "implementation", "quantization", "dtype", "device", "weight_bytes",
    "kv_cache_bytes",
)  # fmt: skip


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of loading a model.

    Attributes:
        what: the current stage as text, for example "loading the weights".
        percent: progress of this stage; null if unknown.
    """

    what: str
    percent: int | None


class UnloadedCard(msgspec.Struct, frozen=True, kw_only=True):
    """A served model name whose model is not loaded, so that few properties are known.

    Attributes:
        loading: progress while it is loaded.
        failure: kind of failure, as in `FAILURES`, if the model could not be loaded or its engine died.
    """

    id: str
    created: int
    root: str
    status: str
    default: bool
    object: str = "model"
    owned_by: str = "candle-vllm"
    loading: LoadProgress | UnsetType = UNSET
    failure: str | UnsetType = UNSET


class LoadedCard(ModelCard, frozen=True, kw_only=True):
    """A served model name whose model is loaded.

    Attributes:
        num_parameters: number of the model's parameters.
        implementation: implementation of its layers, see `ModelInfo`.
        quantization: quantization format of its weights; null if they are not quantized.
        dtype, device: type and device of its activations.
        weight_bytes: memory of the weights.
        kv_cache_bytes: memory that is reserved for the KV cache; on a CPU it is allocated as the cache fills.
    """

    status: str
    default: bool
    architecture: str
    num_parameters: int
    implementation: str
    quantization: str | None
    dtype: str
    device: str
    weight_bytes: int
    kv_cache_bytes: int


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter, which a request names in place of a model.

    Attributes:
        root: name of its files, or their origin.
        parent: first name of its base model.
        status: status of the base model.
        revision: the pinned commit, checksum or version.
        pinned: whether the adapter stays in memory.
    """

    id: str
    created: int
    root: str
    parent: str
    status: str
    default: bool = False
    object: str = "model"
    owned_by: str = "candle-vllm"
    revision: str | UnsetType = UNSET
    pinned: bool = False


Card = LoadedCard | UnloadedCard | AdapterCard


class SlotStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Status of one model for operators.

    Attributes:
        id: first name of the model.
        status: unloaded, waiting, loading, ready, draining or failed.
        in_flight: requests that use the model, including requests in the queue before its engine.
        running, waiting: sequences of these requests in the engine, and in the queue before it.
        waiting_for_load: requests that wait until the model is loaded.
        loaded_at: Unix time in seconds.
        load_seconds: duration of loading, including the time in which other models were unloaded.
        idle_seconds: seconds since its last use; null while it is in use or not loaded.
        memory_bytes: size of weights, full cache with recurrent states, and sparse-attention indexer; 0 if not loaded.
        state_bytes, index_bytes: the parts of `memory_bytes` for recurrent states, and for the indexer.
        error: reason why the model could not be loaded, or why its engine died.
    """

    id: str
    status: str
    in_flight: int
    running: int
    waiting: int
    waiting_for_load: int
    loaded_at: float | None
    load_seconds: float | None
    idle_seconds: float | None
    memory_bytes: int
    state_bytes: int
    index_bytes: int
    error: str | None
    loading: LoadProgress | None


class ManagerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Status of all models for operators; the first six fields are the ones of the Rust candle-vllm.

    Attributes:
        active_model: the model for requests without a model name.
        status: Switching if `switch_requested_at` is set; otherwise status of the active model: Idle, Loading (also
            while it waits or drains), Ready or Error.
        last_error: why a model could not be loaded or its engine died; of several models, the catalogue's first.
        in_flight_requests: requests that use a model.
        switch_requested_at: Unix time in seconds of a pending request to make another model the active one, or null.
        queue_lengths: number of requests that wait until a model is loaded, by model.
    """

    active_model: str
    status: str
    last_error: str | None
    in_flight_requests: int
    switch_requested_at: float | None
    queue_lengths: dict[str, int]
    models: tuple[SlotStatus, ...]


async def visible_cards(manager: ModelManager, caller: Caller = NOBODY) -> list[Card]:
    """Return a card per name of the models and adapters that a caller may use: active model first, adapters last."""
    slots = sorted(manager.slots.values(), key=lambda slot: slot.entry.name != manager.active)
    shown = (slot for slot in slots if caller.may_use(*slot.entry.names))
    found: list[Card] = [card for slot in shown for card in _cards(slot, slot.entry.name == manager.active)]
    adapters, parents = await manager.adapters.listed(), dict(manager.slots)

    def of_adapters() -> list[Card]:
        mine = (each for each in adapters if caller.may_use(*each.names))
        return [
            AdapterCard(
                id=manager.adapters.called(each),
                created=each.created,
                root=each.root,
                parent=parents[each.base].entry.names[0],
                status=parents[each.base].state.value,
                revision=each.revision or UNSET,
                pinned=each.pinned,
            )
            for each in mine
        ]

    made = of_adapters() if len(adapters) <= _FEW else await in_thread(of_adapters, "models")
    return [*found, *made]


def _cards(slot: ModelSlot, default: bool) -> list[LoadedCard | UnloadedCard]:
    if slot.model is None:
        failed = slot.state is ModelState.FAILED
        failure = next(kind for each, kind in FAILURES if isinstance(slot.error, each)) if failed else UNSET
        return [
            UnloadedCard(
                id=name,
                created=0,
                root=slot.entry.name,
                status=slot.state.value,
                default=default,
                loading=load_progress(slot) or UNSET,
                failure=failure,
            )
            for name in slot.entry.names
        ]
    given, info = slot.entry.settings.default_sampling, slot.model.engine.model_info
    known = {name: getattr(info, name) for name in _KNOWN}
    return [
        LoadedCard(
            **msgspec.structs.asdict(card) | {"default_sampling": {**(card.default_sampling or {}), **given} or UNSET},
            status=slot.state.value,
            default=default,
            **known,
        )
        for card in slot.model.adapter.models().data
    ]


def slot_status(slot: ModelSlot) -> SlotStatus:
    admission = slot.model.admission if slot.model else None
    return SlotStatus(
        id=slot.entry.names[0],
        status=slot.state.value,
        in_flight=slot.in_flight,
        running=admission.running if admission else 0,
        waiting=admission.waiting if admission else 0,
        waiting_for_load=len(slot.waiters),
        loaded_at=slot.loaded_at,
        load_seconds=slot.load_seconds,
        idle_seconds=time.monotonic() - slot.last_used if slot.model and not slot.in_flight else None,
        memory_bytes=slot.model.memory if slot.model else 0,
        state_bytes=slot.model.engine.model_info.state_bytes if slot.model else 0,
        index_bytes=slot.model.engine.model_info.index_bytes if slot.model else 0,
        error=str(slot.error)[:MAX_ERROR] if slot.error else None,
        loading=load_progress(slot),
    )


def load_progress(slot: ModelSlot) -> LoadProgress | None:
    """Progress of a model that is being loaded; None in other states."""
    progress = slot.progress if slot.state is ModelState.LOADING else None
    return None if progress is None else LoadProgress(what=str(progress), percent=progress.percent)


class QueuedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that waits for a model or for a place in its engine; without its content.

    Attributes:
        id: its `x-request-id`.
        model: first name of the model.
        queued_at: Unix time in seconds at which the server got it.
        waits_for: "model" until the model is loaded, "place" until its engine has room for the sequences.
        key: label of its API key; "none" without a key.
        sequences: number of its sequences; 1 while it waits for the model.
        priority: requests with a lower value run first; 0 while it waits for the model.
    """

    id: str
    model: str
    queued_at: float
    waits_for: str
    key: str
    sequences: int
    priority: int
    object: str = "queued_request"


class Queues(msgspec.Struct, frozen=True, kw_only=True):
    """The waiting requests, the oldest first; `counts` has their number for every model, by the model's first name."""

    counts: dict[str, int]
    data: tuple[QueuedRequest, ...]
    object: str = "list"


def queues(slots: Iterable[ModelSlot]) -> Queues:
    """The waiting requests of all models, for operators."""
    unix = time.time() - time.monotonic()
    counts: dict[str, int] = {}
    data: list[QueuedRequest] = []
    for slot in slots:
        name = slot.entry.names[0]
        places = slot.model.admission.queue if slot.model else ()
        waiting = [("model", each) for each in slot.arrivals.values()] + [("place", each) for each in places]
        counts[name] = len(waiting)
        data += [
            QueuedRequest(
                id=each.id,
                model=name,
                queued_at=unix + each.arrival_time,
                waits_for=what,
                key=each.key,
                sequences=each.sequences,
                priority=each.priority,
            )
            for what, each in waiting
        ]
    return Queues(counts=counts, data=tuple(sorted(data, key=lambda each: each.queued_at)))


def status(manager: ModelManager) -> ManagerStatus:
    slots = list(manager.slots.values())
    active = manager.slots[manager.active]
    failures = [str(slot.error)[:MAX_ERROR] for slot in slots if slot.error]
    words = {ModelState.UNLOADED: "Idle", ModelState.READY: "Ready", ModelState.FAILED: "Error"}
    word = "Switching" if manager.switch_requested_at is not None else words.get(active.state, "Loading")
    return ManagerStatus(
        active_model=active.entry.names[0],
        status=word,
        last_error=failures[0] if failures else None,
        in_flight_requests=sum(slot.in_flight for slot in slots),
        switch_requested_at=manager.switch_requested_at,
        queue_lengths={slot.entry.names[0]: len(slot.waiters) for slot in slots},
        models=tuple(slot_status(slot) for slot in slots),
    )


def anthropic_card(card: Card) -> dict[str, object]:
    """Convert a card to the format of Anthropic's API."""
    created = datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    most = card.max_model_len if isinstance(card, LoadedCard) else None
    return {
        "type": "model", "id": card.id, "display_name": card.id, "created_at": created, "max_input_tokens": most,
        "lifecycle": "active",
    }  # fmt: skip


def anthropic_list(listed: Sequence[Card]) -> dict[str, object]:
    """Return all cards as one page of Anthropic's list format."""
    data = [anthropic_card(card) for card in listed]
    ends = (listed[0].id, listed[-1].id) if listed else (None, None)  # an API key may allow no model at all
    return {"data": data, "has_more": False, "first_id": ends[0], "last_id": ends[1]}


# ---- bodies of `/v1/models/add`, `/remove`, `/load`, `/unload` and `/select` -----------------------------------------


class NewModelRequest(WireModel):
    """A model, as an entry of `models` in models.yaml describes it.

    Attributes:
        name: name of the model on this server.
        hf_id, local_path: exactly one of the two: a Hugging Face id, or a folder or file on the server's machine.
        weight_file: file of the weights, if the repository or folder has several.
        params: settings of the model by their names in models.yaml.
    """

    name: Name
    hf_id: Name | None = None
    local_path: Name | None = None
    weight_file: Name | None = None
    params: dict[str, Any] | None = None


class ModelRequest(WireModel):
    """Body of a request that names a model; `model_id` is the Rust candle-vllm's name of `model`."""

    model: Name | None = None
    model_id: Name | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelRequest:
        if (self.model is None) == (self.model_id is None):
            raise invalid("model", "is needed: the name of a model (or model_id, not both)")
        return self

    @property
    def name(self) -> str:
        """The name from either field."""
        name = self.model or self.model_id
        assert name is not None
        return name
