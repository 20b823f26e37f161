# SPDX-License-Identifier: MIT
"""Convert stored elements to torch tensors: types by name, tensors that share memory, conversions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.quantization.tensors import StoredTensor

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Torch's types by the names in `quantization/plain.py`."""

NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

COPY_CHUNK = 1 << 18
"""Elements that are converted at a time, so that the scratch memory stays in the CPU caches."""

SERIAL_ELEMENTS = 1 << 15
"""Elements up to which torch's elementwise operations stay on one thread (its grain size)."""

_LOOKED_AT = 1 << 26  # elements that are checked for infinity at a time


def tensor_of(values: np.ndarray, name: str) -> torch.Tensor:
    """Return a tensor that shares the memory of a contiguous array, whose elements have the type `name`."""
    return torch.from_numpy(values.reshape(-1).view(np.uint8)).view(DTYPES[name]).view(values.shape)


def normal(
    shape: tuple[int, ...], name: str, device: torch.device | str, spread: float, middle: float, *, seed: int
) -> torch.Tensor:
    """Return normally distributed elements with mean `middle` and standard deviation `spread`, made on a device."""
    values = torch.full(shape, middle, dtype=DTYPES[name], device=device)
    return values.normal_(middle, spread, generator=torch.Generator(device).manual_seed(seed)) if spread else values


@runtime_checkable
class MadeByTorch(Protocol):
    """A stored tensor whose elements are generated on a device, in their stored type."""

    def tensor(self) -> torch.Tensor:
        """Return the elements, on that device."""


def load_tensor(stored: StoredTensor, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """Return a stored tensor's elements, contiguous and new; dtype None is the stored type, or F32 if quantised.

    Raises:
        UnsupportedModelError: the stored type cannot be decoded.
    """
    if isinstance(stored, MadeByTorch):
        made = stored.tensor()
        return made if dtype is None else made.to(dtype)
    if stored.dtype is None and dtype == torch.float16:  # numpy converts to float16 ten times slower than torch
        values = torch.from_numpy(stored.load())
        out = torch.empty(stored.shape, dtype=dtype)
        convert(values.view(-1), out.view(-1))
        return out
    if stored.dtype is None or dtype is None:
        name = stored.dtype or "F32" if dtype is None else NAMES[dtype]
        return tensor_of(stored.load(name), name)
    return load_plain(stored.raw(), stored.dtype, stored.shape, dtype)


def load_plain(raw: np.ndarray, stored: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Copy unquantised elements to a tensor of this shape and dtype, rounded as torch does.

    Args:
        raw: the bytes, uint8, contiguous; need not be aligned.
        stored: type of the elements in the file, one of `plain.ELEMENTS`.
    """
    out = torch.empty(shape, dtype=dtype)
    flat, data = out.view(-1), raw.reshape(-1)
    if dtype == DTYPES[stored]:
        flat.view(torch.uint8).numpy()[:] = data
        return out
    scratch = torch.empty(min(COPY_CHUNK, flat.numel()), dtype=DTYPES[stored])
    scratch_bytes = scratch.view(torch.uint8).numpy()
    for first in range(0, flat.numel(), COPY_CHUNK):
        part = flat[first : first + COPY_CHUNK]
        count, start = part.numel() * scratch.itemsize, first * scratch.itemsize
        scratch_bytes[:count] = data[start : start + count]
        convert(scratch[: part.numel()], part)
    return out


def empty(shape: tuple[int, ...], name: str, device: torch.device | str) -> torch.Tensor:
    """Allocate a tensor of the type `name`."""
    return torch.empty(shape, dtype=DTYPES[name], device=device)


def fill(tensor: torch.Tensor, stored: StoredTensor) -> None:
    """Decode a stored tensor into a tensor of its shape; for a GPU, elements are converted on the device."""
    values = load_tensor(stored, torch.float32 if tensor.device.type == "cpu" else None)
    tensor.copy_(values.to(tensor.device))
    check_range(stored, tensor)


def convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a flat tensor to a tensor of another dtype, in the calling thread.

    The pieces are so small that torch does not divide them among threads, because its barrier takes more time than
    several threads save.
    """
    for part, piece in zip(target.split(SERIAL_ELEMENTS), source.split(SERIAL_ELEMENTS), strict=True):
        part.copy_(piece)


def check_range(stored: StoredTensor, values: torch.Tensor) -> None:
    """Raise UnsupportedModelError for weights that became infinite because they were converted to float16."""
    if values.dtype != torch.float16 or stored.dtype == "F16":
        return
    # In pieces, because the check allocates a byte for each element.
    if any(bool(piece.isinf().any()) for piece in values.flatten().split(_LOOKED_AT)):
        raise UnsupportedModelError(
            f"{stored.path}: tensor {stored.name}: weights are beyond the range of f16, which ends at 65504; set "
            "dtype='bf16' or dtype='f32', or device='cpu' if the GPU supports neither for this model"
        )
