# SPDX-License-Identifier: MIT
"""Tensor of a checkpoint as it is stored, and its conversion to arrays.

Files are little-endian, and so is every machine that this library supports.
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
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain
from candle_vllm.core.quantization.scaled_codes import ScaledCodes

Packed = TypeVar("Packed", covariant=True)


class Backend(Protocol[Packed]):
    """Makes a backend's own matrices from stored ones [N, K]; `StoredTensor.pack_for` calls the method that fits.

    Raises:
        UnsupportedModelError: the backend needs a kernel for such a matrix and has no kernel for it.
    """

    def plain(self, stored: StoredTensor) -> Packed:
        """Pack a matrix of plain elements."""

    def blocks(self, stored: StoredTensor, read: Callable[[], Blocks]) -> Packed:
        """Pack blocks of a ggml type, whose columns may be reordered."""

    def codes(
        self, stored: StoredTensor, read: Callable[[], GroupCodes], blocks: Callable[[], Blocks | None]
    ) -> Packed:
        """Pack integer codes in groups, which may be convertible to blocks."""

    def floats(self, stored: StoredTensor, span: int, read: Callable[[], ScaledCodes]) -> Packed:
        """Pack small floats with a scale for each `span` columns."""

    def decoded(self, stored: StoredTensor, why: str) -> Packed:
        """Pack a quantised matrix as plain elements; `why` is for the log."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor(ABC):
    """One tensor of a checkpoint: in its file, or computed when it is requested.

    Attributes:
        name: name in the file, or the name under which a family's table finds it.
        shape: shape in torch's order, outermost first: a linear weight is [out, in]; () for a scalar.
        type_name: stored type: "Q4_1", "F32", "BF16", "F16", "I8", ..., see `dtype`.
        nbytes: its stored bytes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int

    @property
    def dtype(self) -> str | None:
        """Type of plain elements, one of `ELEMENTS`; None for quantised blocks or codes."""
        return self.type_name if self.type_name in ELEMENTS else None

    @property
    def quantised(self) -> bool:
        """Whether its elements come from quantised blocks or codes, even if a view decodes them."""
        return self.dtype is None

    @property
    def stays_in_file(self) -> bool:
        """Whether the tensor is a table of which the model reads single rows, and which is not quantised at load."""
        return False

    def in_parts(self) -> tuple[StoredTensor, ...]:
        """Return tensors whose rows, one after the other, are the rows of this one, to hold less in memory at once."""
        return (self,)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file that error messages name."""

    @abstractmethod
    def raw(self) -> np.ndarray:
        """Return the stored bytes, uint8 [rows, bytes per row]; read-only.

        A row is a run along the innermost dimension; the outer dimensions are flattened.
        """

    def file_places(self) -> np.ndarray | None:
        """Return the offset of each element in the file, int64 [*shape]; None if elements are decoded or computed."""
        return None

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        """Return the elements, contiguous and newly allocated.

        Args:
            dtype: type of the result, one of `ELEMENTS`; None keeps the type of plain elements. Quantised elements are
                computed in float32, and rounded to a narrower type.

        Raises:
            UnsupportedModelError: no decoder exists for the stored type.
        """
        if self.dtype is not None:
            return read_plain(self.raw(), self.dtype, self.shape, dtype or self.dtype)
        try:
            return ggml.dequantize(self.raw(), GGMLQuantizationType[self.type_name], self.shape, dtype or "F32")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.path}: tensor {self.name!r}: {error}") from error

    @property
    def column_step(self) -> int:
        """Columns can be split only at multiples of this number: elements that share a scale or byte stay together."""
        return self._unit[0]

    @property
    def block_type(self) -> GGMLQuantizationType | None:
        """The ggml type of its blocks; None for plain elements, and for a tensor encoded in several stored ones."""
        return None if self.dtype is not None else GGMLQuantizationType[self.type_name]

    @property
    def span(self) -> int | None:
        """Columns that share a scale of small floats; None for other stored types."""
        return None

    def decodes(self, unit: int) -> bool:  # noqa: ARG002
        """Whether packing decodes the codes, with kernels that take scales for multiples of `unit` columns."""
        return False

    @property
    def _unit(self) -> tuple[int, int]:
        """Return the number of elements that are stored together, and their bytes."""
        if self.dtype is not None:
            return 1, ELEMENTS[self.dtype].itemsize
        return GGMLQuantizationType[self.type_name].block

    def select(self, order: np.ndarray) -> StoredTensor:
        """Select entries of the outermost dimension by index, int64 [R']."""
        nbytes = self.nbytes // max(1, self.shape[0]) * len(order)
        shape = (len(order), *self.shape[1:])
        return _Rows(self.name, shape, self.type_name, nbytes, self, order)

    def rows(self, first: int, last: int) -> StoredTensor:
        """Select entries `first` to `last` - 1 of the outermost dimension.

        Raises:
            WeightsError: the tensor has fewer entries.
        """
        self._check_cut("rows", first, last, self.shape[:1])
        return self.select(np.arange(first, last))

    def columns(self, first: int, last: int) -> StoredTensor:
        """Select columns `first` to `last` - 1; both are multiples of `column_step`, or `last` is the end.

        Raises:
            WeightsError: the tensor has fewer entries, or elements that are stored together would be split.
        """
        self._check_columns(first, last)
        nbytes = self.nbytes * (last - first) // self.shape[-1]
        shape = (*self.shape[:-1], last - first)
        return _Columns(self.name, shape, self.type_name, nbytes, self, first)

    def misshapen(self, needed: str) -> WeightsError:
        """Return the error for a shape that lacks what is `needed`."""
        return WeightsError(f"{self.path}: tensor {self.name} has shape {list(self.shape)}; {needed}")

    def _check_cut(self, what: str, first: int, last: int, size: tuple[int, ...]) -> None:
        if not size or not 0 <= first < last <= size[0]:
            raise self.misshapen(f"{what} {first} to {last - 1} are needed")

    def _check_columns(self, first: int, last: int) -> None:
        self._check_cut("columns", first, last, self.shape[-1:])
        step = self.column_step
        if first % step or (last % step and last != self.shape[-1]):
            raise WeightsError(
                f"{self.path}: {self.type_name} tensor {self.name} cannot be cut at columns {first} and {last}: "
                f"{step} columns are stored together"
            )

    def pack_for(self, backend: Backend[Packed]) -> Packed:
        """Pack a matrix [N, K] for a backend; errors as `Backend`."""
        if self.dtype is not None:
            return backend.plain(self)
        return backend.blocks(self, lambda: Blocks(GGMLQuantizationType[self.type_name], self.raw()))

    @abstractmethod
    def release(self) -> None:
        """Release the tensor's file pages from memory, after its data was copied."""


@dataclass(frozen=True, slots=True, eq=False)
class Viewed(StoredTensor):
    """A tensor that is derived from another one, its `source`."""

    source: StoredTensor

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def quantised(self) -> bool:
        return self.dtype is None or self.source.quantised

    def release(self) -> None:
        """See `StoredTensor.release`; data that other views of the same tensor still need is read again."""
        self.source.release()


@dataclass(frozen=True, slots=True, eq=False)
class _Rows(Viewed):
    """Selected entries of the outermost dimension, in any order."""

    index: np.ndarray

    def raw(self) -> np.ndarray:
        data = self.source.raw()
        return data.reshape(self.source.shape[0], -1)[self.index].reshape(max(1, math.prod(self.shape[:-1])), -1)

    def file_places(self) -> np.ndarray | None:
        places = self.source.file_places()
        return None if places is None else places[self.index]


@dataclass(frozen=True, slots=True, eq=False)
class _Columns(Viewed):
    """Adjacent entries of the innermost dimension, in whole blocks."""

    first: int

    def raw(self) -> np.ndarray:
        size, width = self._unit
        start, stop = (column // size * width for column in (self.first, self.first + self.shape[-1]))
        return np.ascontiguousarray(self.source.raw()[:, start:stop])
