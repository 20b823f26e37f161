# SPDX-License-Identifier: MIT
"""Inventory for operators (runs in a thread): served models, known names, downloads, sizes, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from candle_vllm.core.devices import choose_device
from candle_vllm.core.errors import ModelNotFoundError
from candle_vllm.server.models.downloads import MIB, downloaded, find_downloaded, room_of
from candle_vllm.server.models.library import file_bytes
from candle_vllm.server.models.loader import LEAST_CACHE, WORKSPACE, held_by
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.pulls import Pull, failure_code
from candle_vllm.server.models.slot import ModelSlot
from candle_vllm.server.settings.model_names import KNOWN, read_name
from candle_vllm.server.settings.table import ModelOptions


class StockedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A served model.

    Attributes:
        id: its first name.
        size: bytes of its weights: in memory if it is loaded, otherwise of its files; 0 without files on this machine.
        needed: minimum memory in bytes; null if the size is unknown.
        fits: now, alone (if all others are unloaded) or never; null if it is loaded, or its size is unknown.
        removable: whether clients may remove it with its files: it was downloaded and is neither default nor active.
    """

    id: str
    size: int
    needed: int | None
    fits: str | None
    removable: bool


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model for which this program has a short name.

    Attributes:
        name, model: its short name, and its name on Hugging Face.
        needed, fits: as in `StockedModel`.
        served: name of the same model among the served ones; null if it is not served.
    """

    name: str
    model: str
    needed: int
    fits: str
    served: str | None


class PullStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A running, waiting or unsuccessful download of a model.

    Attributes:
        model, asked: its name once it is downloaded, and the name in the request.
        state: waiting, downloading, verifying, stopping, stopped or failed.
        done, total: bytes that are downloaded, or verified in the state "verifying", and their total.
        needed, fits: as in `StockedModel`.
        failure, error: reason of the failure, as a code and as text.
    """

    model: str
    asked: str
    state: str
    done: int
    total: int
    needed: int
    fits: str
    failure: str | None = None
    error: str | None = None


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """The models of a server and of its machine.

    Attributes:
        changes: whether clients may download and remove models over HTTP.
        memory_free, memory_most: bytes that are free for models now, and if all models are unloaded.
        disk_free: free bytes on the disk of the models.
        models, known, pulls: served models, models with a short name, downloads.
    """

    changes: bool
    memory_free: int
    memory_most: int
    disk_free: int
    models: tuple[StockedModel, ...]
    known: tuple[KnownModel, ...]
    pulls: tuple[PullStatus, ...]


def take_stock(
    manager: ModelManager, slots: Sequence[ModelSlot], settings: ModelOptions, pulls: Sequence[Pull], *, changes: bool
) -> Inventory:
    """Return the inventory; `slots` are the served models in order, `changes` is whether clients may change them."""
    room = room_of(settings, 0)
    held = held_by(manager.loaded, choose_device(settings.device or "auto"))

    def fits(needed: int) -> str:
        return "now" if needed <= room.free else "alone" if needed <= room.free + held else "never"

    here = downloaded(settings) if changes else []

    def removable(slot: ModelSlot) -> bool:
        try:
            find_downloaded(settings, slot.entry.name, here)
        except ModelNotFoundError:
            return False
        return slot.entry.name not in (manager.catalogue.default.name, manager.active)

    def stocked(slot: ModelSlot) -> StockedModel:
        loaded = slot.model
        size = file_bytes(slot.entry.settings) if loaded is None else loaded.engine.model_info.weight_bytes
        needed = size + WORKSPACE + LEAST_CACHE if size else None
        return StockedModel(
            id=slot.entry.names[0],
            size=size,
            needed=needed,
            fits=None if needed is None or loaded is not None else fits(needed),
            removable=removable(slot),
        )

    def told(pull: Pull) -> PullStatus:
        progress, failed = pull.progress, pull.error
        return PullStatus(
            model=pull.plan.name,
            asked=pull.asked,
            state=pull.state.value,
            done=progress.done if progress else 0,
            total=progress.total if progress else pull.plan.weight_bytes,
            needed=pull.room.needed,
            fits=fits(pull.room.needed),
            failure=None if failed is None else failure_code(failed),
            error=None if failed is None else str(failed)[:2000],
        )

    names = {slot.entry.name.casefold(): slot.entry.names[0] for slot in slots}
    known = (
        KnownModel(
            name=name,
            model=(model := str(read_name(name))),
            needed=row.mib * MIB,
            fits=fits(row.mib * MIB),
            served=names.get(model.casefold()),
        )
        for name, row in KNOWN.items()
    )
    return Inventory(
        changes=changes,
        memory_free=room.free,
        memory_most=room.free + held,
        disk_free=room.disk,
        models=tuple(stocked(slot) for slot in slots),
        known=tuple(known),
        pulls=tuple(told(pull) for pull in pulls),
    )
