"""A tensor of a checkpoint as it is stored, and the way from plain elements to numbers.

Stands before step 1 of a request's life. Files are little-endian, and so is every machine that this library runs on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from gguf import GGMLQuantizationType

from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes
from candle_vllm.core.quantization.scaled_codes import ScaledCodes

Packed = TypeVar("Packed", covariant=True)

COPY_CHUNK = 1 << 18
"""Elements that are converted at a time: the scratch stays in the cache, and small beside the result."""

SERIAL_ELEMENTS = 1 << 15
"""Elements up to which torch's elementwise operations stay on one thread (its grain size)."""


class Backend(Protocol[Packed]):
    """What makes matrices of its own of stored ones [N, K], by how they are stored; `StoredTensor.pack_for` chooses.

    Raises:
        UnsupportedModelError: it has no kernel for such a matrix, and cannot do without one.
    """

    def plain(self, stored: StoredTensor) -> Packed:
        """Of numbers that are stored one by one."""
        ...

    def blocks(self, stored: StoredTensor, blocks: Blocks) -> Packed:
        """Of blocks of a ggml type, whose columns may have an order of their own."""
        ...

    def codes(
        self, stored: StoredTensor, read: Callable[[], GroupCodes], blocks: Callable[[], Blocks | None]
    ) -> Packed:
        """Of whole numbers in groups, which may be blocks too."""
        ...

    def floats(self, stored: StoredTensor, span: int, read: Callable[[], ScaledCodes]) -> Packed:
        """Of small floats with scales for `span` columns."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor(ABC):
    """One tensor of a checkpoint: still in its file, or made of what is there when it is asked for.

    Attributes:
        name: as the file has it, or the name under which a family's table looks for it.
        shape: torch order, outermost first: a linear weight is [out, in]. () for a single number.
        type_name: how it is stored: "Q4_1", "F32", "BF16", "F16", "I8", ...
        dtype: the torch dtype of the stored elements; None for a type stored in quantised blocks or codes.
        nbytes: bytes that are stored for it.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    dtype: torch.dtype | None
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file to blame in messages."""

    @abstractmethod
    def raw(self) -> np.ndarray:
        """The stored bytes, uint8 [rows, bytes per row], not to be written to.

        A row is one run along the innermost dimension; the outer dimensions are flattened.
        """

    @abstractmethod
    def load(self, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """The values in `dtype`, contiguous, in memory of their own; None keeps the stored dtype."""

    def pack_for(self, backend: Backend[Packed]) -> Packed:
        """A matrix [N, K] as a backend multiplies it; errors as `Backend`."""
        if self.dtype is not None:
            return backend.plain(self)
        return backend.blocks(self, Blocks(GGMLQuantizationType[self.type_name], self.raw()))

    @abstractmethod
    def release(self) -> None:
        """The tensor has been taken over: its pages of the file need not stay in memory."""


def load_plain(raw: np.ndarray, stored: torch.dtype, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Copies unquantised elements out of a file, converting them where the dtypes differ.

    Args:
        raw: the bytes, uint8, contiguous; need not be aligned.
        stored: dtype of the elements in the file.
        shape: of the result.
        dtype: of the result; a narrower one rounds as torch does.
    """
    out = torch.empty(shape, dtype=dtype)
    flat, data = out.view(-1), raw.reshape(-1)
    if dtype == stored:
        flat.view(torch.uint8).numpy()[:] = data
        return out
    scratch = torch.empty(min(COPY_CHUNK, flat.numel()), dtype=stored)
    scratch_bytes = scratch.view(torch.uint8).numpy()
    for first in range(0, flat.numel(), COPY_CHUNK):
        part = flat[first : first + COPY_CHUNK]
        count, start = part.numel() * stored.itemsize, first * stored.itemsize
        scratch_bytes[:count] = data[start : start + count]
        convert(scratch[: part.numel()], part)
    return out


def convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies a flat tensor into one of another dtype, on the calling thread alone.

    In pieces so small that torch does not share them among threads: meeting at a barrier each time costs more than
    it gains, on a busy machine a hundred times as much.
    """
    for part, piece in zip(target.split(SERIAL_ELEMENTS), source.split(SERIAL_ELEMENTS), strict=True):
        part.copy_(piece)
