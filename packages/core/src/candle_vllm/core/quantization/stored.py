# SPDX-License-Identifier: MIT
"""One logical tensor for a matrix with several stored parts (codes, scales): quantised safetensors, and NVFP4 of GGUF.

Each format has a `WeightSource`, which reads rows of the parts. A `QuantisedTensor` is a matrix, or several of the same
shape, of which the views of `loading/views.py` may select rows. Data is read when it is used.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.quantization.group_codes import Blocks, GroupCodes
from candle_vllm.core.quantization.plain import ELEMENTS, convert
from candle_vllm.core.quantization.scaled_codes import ScaledCodes
from candle_vllm.core.quantization.tensors import Backend, Packed, StoredTensor
from candle_vllm.core.threads import in_chunks

Codes = TypeVar("Codes", GroupCodes, ScaledCodes)
Scheme = TypeVar("Scheme")

FLOATS = ("F16", "BF16", "F32")
"""Types of stored scales."""

CHUNK = 1 << 19
"""Weights in a chunk of rows, so that a chunk's data stays in the CPU cache."""


class WeightSource(ABC, Generic[Codes]):
    """The parts of one matrix [R, K] in a format's own layout.

    Attributes:
        parts: the stored tensors.
        align: reads begin and end at multiples of this row number; the end may exceed the number of rows.
        span: number of columns that share an fp32 scale (FP8, NVFP4), K for one scale per row; None for other codes.
        decodes: no kernel takes the codes, so packing decodes them; memory is planned for plain elements.
    """

    parts: tuple[StoredTensor, ...]
    align: int = 1
    span: int | None = None
    decodes: bool = False

    @abstractmethod
    def read(self, first: int, last: int) -> Codes:
        """Read rows first to last - 1."""

    def decode(self, first: int, last: int) -> np.ndarray:
        """Decode rows first to last - 1 to float32 [last - first, K]."""
        return self.read(first, last).dequantise()

    def pack_for(self, backend: Backend[Packed], tensor: QuantisedTensor) -> Packed:
        """Pack a tensor, whose source is this one or some of its columns, for a backend; a `span` means floats."""
        if tensor.span is None:
            return backend.codes(tensor, tensor.codes, tensor.blocks)
        return backend.floats(tensor, tensor.span, tensor.codes)

    def column_step(self) -> int:
        """Return the number at whose multiples columns can be split; reads the first rows."""
        return self.read(0, self.align).column_step


class _Columns(WeightSource[Codes]):
    """Columns of another source."""

    def __init__(self, source: WeightSource[Codes], first: int, last: int) -> None:
        self.parts, self.align, self.decodes = source.parts, source.align, source.decodes
        self.span = None if source.span is None else min(source.span, last - first)
        self._source, self._first, self._last = source, first, last

    def read(self, first: int, last: int) -> Codes:
        return self._source.read(first, last).cut(self._first, self._last)

    def decode(self, first: int, last: int) -> np.ndarray:
        # The whole matrix's decoder combines scales in the order that its format requires.
        return self._source.decode(first, last)[:, self._first : self._last]

    def pack_for(self, backend: Backend[Packed], tensor: QuantisedTensor) -> Packed:
        return self._source.pack_for(backend, tensor)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantisedTensor(StoredTensor):
    """A tensor [..., R, K] that is encoded in several stored tensors; its `dtype` is None.

    Attributes:
        source: source of its rows.
        index: the source's row numbers, int64; None for all rows.
    """

    source: WeightSource[Any]
    index: np.ndarray | None = None

    @property
    def path(self) -> Path:
        return self.source.parts[0].path

    def select(self, order: np.ndarray) -> QuantisedTensor:
        """Select entries of the outermost dimension by index."""
        each = math.prod(self.shape[1:-1])
        index = (order[:, None] * each + np.arange(each)).reshape(-1)
        if self.index is not None:
            index = self.index[index]
        nbytes = self.nbytes // max(1, self.shape[0]) * len(order)
        return dataclasses.replace(self, shape=(len(order), *self.shape[1:]), nbytes=nbytes, index=index)

    @property
    def column_step(self) -> int:
        return self.source.column_step()

    def columns(self, first: int, last: int) -> QuantisedTensor:
        self._check_columns(first, last)
        nbytes = self.nbytes * (last - first) // self.shape[-1]
        source = _Columns(self.source, first, last)
        return dataclasses.replace(self, shape=(*self.shape[:-1], last - first), nbytes=nbytes, source=source)

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        wanted = dtype or "F32"
        out = np.empty((self._rows, self.shape[-1]), ELEMENTS[wanted])

        def job(first: int, last: int) -> None:
            start, stop, inside = self._place(first, last)
            values = self.source.decode(start, stop)[inside]
            convert(values.reshape(-1), "F32", out[first:last].reshape(-1), wanted)

        self._in_chunks(job)
        return out.reshape(self.shape)

    def raw(self) -> np.ndarray:
        """Return the rows as blocks of a ggml type, see `blocks`, with columns in the original order.

        Raises:
            UnsupportedModelError: no ggml type represents the rows exactly, or only with reordered columns.
        """
        found = self.blocks()
        if found is None or found.order is not None:
            raise UnsupportedModelError(f"{self.path}: {self.type_name} tensor {self.name} fits no ggml type exactly")
        return found.raw

    def blocks(self) -> Blocks | None:
        """Convert exactly to blocks of a ggml type with kernels; None if no type fits, for FP8, NVFP4 or `decodes`."""
        if self.span is not None or self.source.decodes:  # FP8 and NVFP4 with fp32 scales are not converted
            return None
        found: dict[int, Blocks | None] = {}

        def job(first: int, last: int) -> None:
            found[first] = self._read(first, last).blocks()

        self._in_chunks(job)
        chunks = [chunk for _, chunk in sorted(found.items()) if chunk is not None]
        if not chunks or len(chunks) < len(found):
            return None
        widest = max((chunk.type for chunk in chunks), key=lambda each: each.block[1])  # Q4_0 fits some chunks only
        return Blocks(widest, np.concatenate([chunk.as_type(widest) for chunk in chunks]), chunks[0].order)

    def pack_for(self, backend: Backend[Packed]) -> Packed:
        return self.source.pack_for(backend, self)

    def codes(self) -> Any:
        """Return all rows as the source reads them, `GroupCodes` or `ScaledCodes`; may be a view of the file."""
        return self._read(0, self._rows)

    @property
    def span(self) -> int | None:
        return self.source.span

    def decodes(self, unit: int) -> bool:
        span = self.span
        return self.source.decodes or (span is not None and span < self.shape[-1] and span % unit != 0)

    @property
    def block_type(self) -> None:
        return None

    def release(self) -> None:
        for part in self.source.parts:
            part.release()

    @property
    def _rows(self) -> int:
        return math.prod(self.shape[:-1])

    def _read(self, first: int, last: int) -> Any:
        """Read rows in the form of `codes`."""
        start, stop, inside = self._place(first, last)
        return self.source.read(start, stop).take(inside)

    def _place(self, first: int, last: int) -> tuple[int, int, np.ndarray | slice]:
        """Return the aligned range of source rows to read for rows of this tensor, and the selection in that range."""
        wanted = np.arange(first, last) if self.index is None else self.index[first:last]
        align = self.source.align
        start, stop = int(wanted.min()), int(wanted.max()) + 1
        start, stop = start // align * align, -(-stop // align) * align
        whole = self.index is None and (start, stop) == (first, last)
        return start, stop, slice(None) if whole else wanted - start

    def _in_chunks(self, job: Callable[[int, int], None]) -> None:
        step = max(1, CHUNK // max(1, self.shape[-1]))
        step = -(-step // self.source.align) * self.source.align
        in_chunks(job, self._rows, step)


class LayerTensors:
    """Stored tensors of one quantised layer, taken by name with a check of their type.

    Args:
        layer: prefix of the names, such as "model.layers.0.mlp.down_proj".
        path: file that errors name for a missing tensor.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], layer: str, path: Path) -> None:
        self._tensors = tensors
        self.layer = layer
        self.path = path
        self.taken: list[StoredTensor] = []

    def find(self, end: str, *type_names: str) -> StoredTensor | None:
        """Return the tensor `layer` + `end`, which must have one of `type_names`; None if it is not stored."""
        found = self._tensors.get(self.layer + end)
        if found is None:
            return None
        if found.type_name not in type_names:
            raise InvalidFileError(
                f"{found.path}: tensor {found.name} is {found.type_name}; it must be {' or '.join(type_names)}"
            )
        self.taken.append(found)
        return found

    def get(self, end: str, *type_names: str) -> StoredTensor:
        """As `find`, but the tensor must exist."""
        found = self.find(end, *type_names)
        if found is None:
            raise InvalidFileError(f"{self.path}: tensor {self.layer + end} is missing, a part of a quantised layer")
        return found

    def read_by_first(
        self, schemes: Sequence[Scheme], read: Callable[[LayerTensors, Scheme], QuantisedTensor]
    ) -> tuple[LayerTensors, QuantisedTensor]:
        """Read the layer by the first scheme that its parts fit; if no scheme fits, raise the first scheme's error."""
        errors: list[InvalidFileError] = []
        for scheme in schemes:
            own = LayerTensors(self._tensors, self.layer, self.path)
            try:
                return own, read(own, scheme)
            except InvalidFileError as error:
                errors.append(error)
        raise errors[0]

    def shape_error(self, part: StoredTensor, wanted: object, why: str) -> InvalidFileError:
        """Return the error for a part whose shape does not fit the other parts."""
        return InvalidFileError(
            f"{part.path}: tensor {part.name} has shape {list(part.shape)}; it must be {wanted}: {why}"
        )

    def check_shape(self, part: StoredTensor, wanted: tuple[int, ...], why: str) -> None:
        """Raise `shape_error` unless a part has the shape `wanted`."""
        if part.shape != wanted:
            raise self.shape_error(part, list(wanted), why)

    def matrix_shape(self, part: StoredTensor, wanted: str, why: str) -> tuple[int, int]:
        """Return the shape of a part; raise `shape_error` if it is not a matrix, or empty."""
        if len(part.shape) != 2 or 0 in part.shape:
            raise self.shape_error(part, wanted, why)
        return part.shape[0], part.shape[1]

    def tensor(
        self, type_name: str, shape: tuple[int, ...], source: WeightSource[Any], name: str | None = None
    ) -> QuantisedTensor:
        """Return the logical tensor of the parts that were taken."""
        source.parts = tuple(self.taken)
        nbytes = sum(part.nbytes for part in self.taken)
        return QuantisedTensor(name or f"{self.layer}.weight", shape, type_name, nbytes, source)


def numbers(part: StoredTensor, dtype: type[np.generic]) -> np.ndarray:
    """Return a stored tensor as an array of its shape; a view into the file if it is aligned."""
    data = part.raw().reshape(-1)
    if data.ctypes.data % np.dtype(dtype).itemsize:
        data = data.copy()
    return data.view(dtype).reshape(part.shape)


def floats(part: StoredTensor, where: Any = ...) -> np.ndarray:
    """Return stored floats, or those at the numpy index `where`, as a float32 array."""
    if part.type_name.startswith("F8"):
        return part.load()[where]
    if part.type_name == "BF16":
        return (numbers(part, np.uint16)[where].astype(np.uint32) << 16).view(np.float32)
    kind = np.float16 if part.type_name == "F16" else np.float32
    return numbers(part, kind)[where].astype(np.float32)
