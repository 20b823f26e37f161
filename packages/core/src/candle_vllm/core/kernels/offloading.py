# SPDX-License-Identifier: MIT
"""What leaves a device: weights while an engine sleeps, and blocks of the KV cache.

Weights go to the host's memory and back, or for good, to be loaded again.

What has a tensor keeps it, and finds numbers in it again; captured work has addresses, and must be captured anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

_OURS = "candle_vllm."


def tensors_in(*roots: object) -> list[torch.Tensor]:
    """Every tensor of layers, each once, in an order that is the same for models that were made alike."""
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
    elif type(value).__module__.startswith(_OURS) and not isinstance(value, type):
        seen.add(id(value))
        if dataclasses.is_dataclass(value):
            yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)], seen)
        yield from _tensors(list(getattr(value, "__dict__", {}).values()), seen)


def block_parts(caches: Sequence[torch.Tensor], block: int) -> list[torch.Tensor]:
    """A block of caches [blocks, ...], as bytes uint8 [size] each, in place."""
    return [cache[block].view(torch.uint8).view(-1) for cache in caches if cache.numel()]


def block_bytes(caches: Sequence[torch.Tensor]) -> int:
    """Bytes of a block of caches [blocks, ...]."""
    return sum(cache[0].numel() * cache.itemsize for cache in caches if cache.numel())


class OffloadedWeights:
    """The tensors of a model, which may be away.

    Args:
        tensors: of the model, as it was loaded.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._held: list[tuple[torch.Tensor, list[_Place]]] = []  # of each storage its bytes, and who has what of them

    @torch.no_grad()
    def to_host(self) -> None:
        """Their numbers go to the host's memory, from which copies are fast, and the device's is given back."""
        shared: dict[int, list[torch.Tensor]] = {}
        for each in self._tensors:
            shared.setdefault(each.untyped_storage().data_ptr(), []).append(each)
        for tensors in shared.values():
            there = _bytes_of(tensors[0].untyped_storage())
            held = torch.empty(there.numel(), dtype=torch.uint8, pin_memory=there.is_cuda)
            held.copy_(there)
            places = [_Place(each, int(each.storage_offset()), each.size(), each.stride()) for each in tensors]
            self._held.append((held, places))
            _empty(tensors)

    @torch.no_grad()
    def to_device(self) -> None:
        """They come back from there."""
        held, self._held = self._held, []
        for data, places in held:
            there = data.to(self._device, non_blocking=True, copy=True).untyped_storage()
            for place in places:
                place.tensor.set_(there, place.offset, place.size, place.stride)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.no_grad()
    def drop(self) -> None:
        """Their numbers are gone, wherever they were."""
        self._held = []
        _empty(self._tensors)

    @torch.no_grad()
    def adopt(self, fresh: Sequence[torch.Tensor]) -> None:
        """They are those of the same model, which was loaded again."""
        for each, new in zip(self._tensors, fresh, strict=True):
            each.set_(new.untyped_storage(), int(new.storage_offset()), new.size(), new.stride())


class _Place(NamedTuple):
    """What a tensor has of a storage."""

    tensor: torch.Tensor
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _empty(tensors: Sequence[torch.Tensor]) -> None:
    for each in tensors:
        each.set_(torch.empty(0, dtype=each.dtype, device=each.device).untyped_storage(), 0, (0,), (1,))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
