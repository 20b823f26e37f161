# SPDX-License-Identifier: MIT
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

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import GGML_QUANT_SIZES, GGMLQuantizationType
from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain
from candle_vllm.core.quantization.scaled_codes import ScaledCodes

Packed = TypeVar("Packed", covariant=True)


class Backend(Protocol[Packed]):
    """What makes matrices of its own of stored ones [N, K], by how they are stored; `StoredTensor.pack_for` chooses.

    Raises:
        UnsupportedModelError: it has no kernel for such a matrix, and cannot do without one.
    """

    def plain(self, stored: StoredTensor) -> Packed:
        """Of numbers that are stored one by one."""
        ...

    def blocks(self, stored: StoredTensor, read: Callable[[], Blocks]) -> Packed:
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
        type_name: how it is stored: "Q4_1", "F32", "BF16", "F16", "I8", ..., see `dtype`.
        nbytes: bytes that are stored for it.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int

    @property
    def dtype(self) -> str | None:
        """The type of elements that are stored one by one, one of `ELEMENTS`; None for quantised blocks or codes."""
        return self.type_name if self.type_name in ELEMENTS else None

    @property
    def quantised(self) -> bool:
        """Its numbers are those of quantised blocks or codes, be they decoded by a view."""
        return self.dtype is None

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

    def file_places(self) -> np.ndarray | None:
        """The byte of the file where each number begins, int64 [*shape]; None where they are decoded or computed."""
        return None

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        """The values, contiguous, in memory of their own.

        Args:
            dtype: their type, one of `ELEMENTS`; None keeps that of elements that are stored one by one. Others are
                computed in float32, and rounded where a narrower type is asked for.

        Raises:
            UnsupportedModelError: nothing decodes the stored type.
        """
        if self.dtype is not None:
            return read_plain(self.raw(), self.dtype, self.shape, dtype or self.dtype)
        try:
            return ggml.dequantize(self.raw(), GGMLQuantizationType[self.type_name], self.shape, dtype or "F32")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.path}: tensor {self.name!r}: {error}") from error

    @property
    def column_step(self) -> int:
        """Columns can be cut at multiples of this: what shares a scale, or bytes, stays together."""
        return self._unit[0]

    @property
    def block_type(self) -> GGMLQuantizationType | None:
        """The ggml type of whose blocks its bytes are; None of numbers one by one, and of what several tensors mean."""
        return None if self.dtype is not None else GGMLQuantizationType[self.type_name]

    @property
    def span(self) -> int | None:
        """Columns that share a scale of small floats; None where other things are stored."""
        return None

    @property
    def _unit(self) -> tuple[int, int]:
        """Numbers that are stored together, and their bytes."""
        if self.dtype is not None:
            return 1, ELEMENTS[self.dtype].itemsize
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]

    def select(self, order: np.ndarray) -> StoredTensor:
        """Entries of the outermost dimension by their numbers, int64 [R']."""
        nbytes = self.nbytes // max(1, self.shape[0]) * len(order)
        shape = (len(order), *self.shape[1:])
        return _Rows(self.name, shape, self.type_name, nbytes, self, order)

    def rows(self, first: int, last: int) -> StoredTensor:
        """Entries `first` to `last` - 1 of the outermost dimension.

        Raises:
            WeightsError: there are fewer.
        """
        self._check_cut("rows", first, last, self.shape[:1])
        return self.select(np.arange(first, last))

    def columns(self, first: int, last: int) -> StoredTensor:
        """Entries `first` to `last` - 1 of the innermost dimension; multiples of `column_step`, or its end.

        Raises:
            WeightsError: there are fewer, or what is stored together would be cut.
        """
        self._check_columns(first, last)
        nbytes = self.nbytes * (last - first) // self.shape[-1]
        shape = (*self.shape[:-1], last - first)
        return _Columns(self.name, shape, self.type_name, nbytes, self, first)

    def _check_cut(self, what: str, first: int, last: int, size: tuple[int, ...]) -> None:
        if not size or not 0 <= first < last <= size[0]:
            raise WeightsError(
                f"{self.path}: tensor {self.name} has shape {list(self.shape)}; {what} {first} to {last - 1} are wanted"
            )

    def _check_columns(self, first: int, last: int) -> None:
        self._check_cut("columns", first, last, self.shape[-1:])
        step = self.column_step
        if first % step or (last % step and last != self.shape[-1]):
            raise WeightsError(
                f"{self.path}: {self.type_name} tensor {self.name} cannot be cut at columns {first} and {last}: "
                f"{step} are stored together"
            )

    def pack_for(self, backend: Backend[Packed]) -> Packed:
        """A matrix [N, K] as a backend multiplies it; errors as `Backend`."""
        if self.dtype is not None:
            return backend.plain(self)
        return backend.blocks(self, lambda: Blocks(GGMLQuantizationType[self.type_name], self.raw()))

    @abstractmethod
    def release(self) -> None:
        """The tensor has been taken over: its pages of the file need not stay in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Viewed(StoredTensor):
    """A tensor that is made of another.

    Attributes:
        source: the other.
    """

    source: StoredTensor

    @property
    def path(self) -> Path:
        """See `StoredTensor.path`."""
        return self.source.path

    @property
    def quantised(self) -> bool:
        """See `StoredTensor.quantised`."""
        return self.dtype is None or self.source.quantised

    @abstractmethod
    def raw(self) -> np.ndarray: ...

    def release(self) -> None:
        """See `StoredTensor.release`; what other views of the same tensor still need is read again."""
        self.source.release()


@dataclass(frozen=True, slots=True, eq=False)
class _Rows(Viewed):
    """Entries of the outermost dimension, in any order."""

    index: np.ndarray

    def raw(self) -> np.ndarray:
        data = self.source.raw()
        return data.reshape(self.source.shape[0], -1)[self.index].reshape(max(1, math.prod(self.shape[:-1])), -1)

    def file_places(self) -> np.ndarray | None:
        places = self.source.file_places()
        return None if places is None else places[self.index]


@dataclass(frozen=True, slots=True, eq=False)
class _Columns(Viewed):
    """Neighbours of the innermost dimension, whole blocks of it."""

    first: int

    def raw(self) -> np.ndarray:
        size, width = self._unit
        start, stop = (column // size * width for column in (self.first, self.first + self.shape[-1]))
        return np.ascontiguousarray(self.source.raw()[:, start:stop])
