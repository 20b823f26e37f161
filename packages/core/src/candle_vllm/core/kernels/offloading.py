# SPDX-License-Identifier: MIT
"""Move a model's weights between device and host memory, and list the tensors of its caches.

While an engine sleeps, its weights are in host memory, or freed and loaded again later. With offloading, some weights
are always in host memory, and the GPU reads them over the bus.

Tensor objects stay the same when their data moves. CUDA graphs contain addresses, so they must be captured again
afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from candle_vllm.core.kernels.attention.rows import PagedCache, WindowedCache
from candle_vllm.core.kernels.states import StateCache

_OURS = "candle_vllm."
PIECE_BYTES = 256 << 20
_ALIGNMENT = 256
LayerCache: TypeAlias = PagedCache | tuple[StateCache, ...]


def tensors_in(*roots: object) -> list[torch.Tensor]:
    """Return every tensor of layers once, in the same order for every model that is built alike.

    Layers of other packages are callable objects, see `layers/adapters.py`.
    """
    return list(_tensors(roots, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen:
        return
    if isinstance(value, torch.Tensor):
        seen.add(id(value))
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each, seen)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()), seen)
    elif (type(value).__module__.startswith(_OURS) or callable(value)) and not isinstance(value, type):
        seen.add(id(value))
        if dataclasses.is_dataclass(value):
            yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)], seen)
        yield from _tensors(list(getattr(value, "__dict__", {}).values()), seen)


def tensors_of(caches: Sequence[LayerCache]) -> list[torch.Tensor]:
    """Return the tensors [blocks or pages, ...] of layers' caches, each once: keys of all layers, then values."""
    paged = [cache for cache in caches if isinstance(cache, PagedCache)]
    parts = [part for parts in zip(*paged) for part in parts]
    return list({id(part): part for part in parts if part.numel()}.values())


def states_of(caches: Sequence[LayerCache]) -> list[torch.Tensor]:
    """Return the tensors [slots, ...] of layers with a state: the states, and the stored inputs of draft tokens."""
    parts = [each for cache in caches if not isinstance(cache, PagedCache) for part in cache for each in part]
    return [part for part in parts if part.numel()]


def block_parts(caches: Sequence[LayerCache], block: int, page_of: Any = ()) -> list[torch.Tensor]:
    """Return views uint8 [size] of a block, one for each cache tensor; `page_of[pool][block]` is its page in a pool."""
    pools = {id(part): cache.pool for cache in caches if isinstance(cache, WindowedCache) for part in cache}
    pages = {name: int(page_of[pool][block]) for name, pool in pools.items()}
    parts = [part[pages.get(id(part), block)] for part in tensors_of(caches)]
    return [part.view(torch.uint8).view(-1) for part in parts]


def state_parts(caches: Sequence[LayerCache], slot: int) -> list[torch.Tensor]:
    """Return views uint8 [size] of the layers' states in a slot; empty if no layer has a state."""
    parts = [part.states for cache in caches if not isinstance(cache, PagedCache) for part in cache]
    return [part[slot].view(torch.uint8).view(-1) for part in parts if part.numel()]


def block_bytes(caches: Sequence[LayerCache]) -> int:
    """Return the bytes of one block of layers' caches."""
    return sum(part[0].numel() * part.itemsize for part in tensors_of(caches))


class HostWeights:
    """Weights in pinned host memory, which a GPU reads over the bus.

    With unified addressing, a pinned host address is also a device address: the CUDA array interface turns it into a
    device tensor, which kernels use like any other. For a CPU device the memory is not pinned.

    Args:
        device: device that reads the weights.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._pieces: list[tuple[torch.Tensor, torch.Tensor]] = []  # the same memory as host tensor and device tensor
        self._used = 0  # used bytes of the last piece

    def take(self, *roots: object) -> None:
        """Move the data of all tensors of layers or matrices to this memory, where each tensor is contiguous."""
        with torch.no_grad():
            for tensor in tensors_in(*roots):
                held, there = (place.view(tensor.dtype).view(tensor.shape) for place in self._room(tensor.nbytes))
                held.copy_(tensor)
                tensor.set_(there.untyped_storage(), int(there.storage_offset()), there.size(), there.stride())

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in this memory."""
        return any(tensor.untyped_storage().data_ptr() == piece.data_ptr() for _, piece in self._pieces)

    @property
    def nbytes(self) -> int:
        """Number of allocated bytes."""
        return sum(piece.numel() for _, piece in self._pieces)

    def drop(self) -> None:
        """Release the memory; it is freed once no tensor uses it."""
        self._pieces, self._used = [], 0

    def become(self, other: HostWeights) -> None:
        """Release this memory and own the memory of `other`."""
        self._pieces, self._used = other._pieces, other._used

    def _room(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._pieces or self._used + size > self._pieces[-1][0].numel():
            # Pinned memory is allocated in powers of two, so small tensors share a piece.
            held = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._pieces.append((held, held if self._device.type == "cpu" else _seen_by(self._device, held)))
            self._used = 0
        start, (held, seen) = self._used, self._pieces[-1]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return held[start : start + size], seen[start : start + size]


class PinnedArray:
    """Pinned bytes in the CUDA array interface, version 3; see its description in Numba's documentation.

    Args:
        held: the bytes, uint8 [n]; this object keeps them alive.
    """

    def __init__(self, held: torch.Tensor) -> None:
        self._held = held
        self.__cuda_array_interface__ = {
            "shape": (held.numel(),),
            "typestr": "|u1",
            "data": (held.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _seen_by(device: torch.device, held: torch.Tensor) -> torch.Tensor:
    seen = torch.as_tensor(PinnedArray(held), device=device)
    assert seen.data_ptr() == held.data_ptr(), "the host's pinned addresses are not the device's"
    return seen


class OffloadedWeights:
    """The tensors of a model, whose data can be moved to host memory or freed.

    Args:
        tensors: tensors of the loaded model.
        stays: memory of the tensors that are always in host memory; None if all tensors are on the device.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], stays: HostWeights | None = None) -> None:
        self._tensors, self._stays = tensors, stays
        self._held: list[tuple[torch.Tensor, list[_Place]]] = []  # bytes of each storage, and its tensors

    @torch.no_grad()
    def to_host(self) -> None:
        """Move the data to host memory, pinned so that copies are fast, and free the device memory.

        If this fails, `to_device` moves back what was moved.
        """
        held_already = [place.tensor for _, places in self._held for place in places]
        _empty(held_already)  # some are on the device again if `to_device` has failed
        ids, shared = set(map(id, held_already)), dict[tuple[torch.device, int], list[torch.Tensor]]()
        for each in self._tensors:
            if id(each) in ids or (self._stays is not None and self._stays.holds(each)):
                continue
            shared.setdefault((each.device, each.untyped_storage().data_ptr()), []).append(each)
        for tensors in shared.values():
            there = _bytes_of(tensors[0].untyped_storage())
            held = torch.empty(there.numel(), dtype=torch.uint8, pin_memory=there.is_cuda)
            held.copy_(there)
            places = [_Place(each, int(each.storage_offset()), each.size(), each.stride()) for each in tensors]
            self._held.append((held, places))
            _empty(tensors)

    @torch.no_grad()
    def to_device(self) -> None:
        """Move the data back to its devices. If this fails, `to_host` frees the device memory again."""
        for data, places in self._held:
            there = data.to(places[0].tensor.device, non_blocking=True, copy=True).untyped_storage()
            for place in places:
                place.tensor.set_(there, place.offset, place.size, place.stride)
        for device in {places[0].tensor.device for _, places in self._held}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._held = []

    @torch.no_grad()
    def drop(self) -> None:
        """Free the data in device and host memory."""
        self._held = []
        _empty(self._tensors)
        if self._stays is not None:
            self._stays.drop()

    @torch.no_grad()
    def adopt(self, fresh: Sequence[torch.Tensor], stays: HostWeights | None = None) -> None:
        """Use the data of the same model after it was loaded again; `fresh` are the new tensors in the same order."""
        if self._stays is not None and stays is not None:
            self._stays.become(stays)
        for each, new in zip(self._tensors, fresh, strict=True):
            each.set_(new.untyped_storage(), int(new.storage_offset()), new.size(), new.stride())


class _Place(NamedTuple):
    """Position of a tensor in a storage."""

    tensor: torch.Tensor
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _empty(tensors: Sequence[torch.Tensor]) -> None:
    for each in tensors:
        each.set_(torch.empty(0, dtype=each.dtype, device=each.device).untyped_storage(), 0, (0,), (1,))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
