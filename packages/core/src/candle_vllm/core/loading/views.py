# SPDX-License-Identifier: MIT
"""Views of stored tensors: select and reorder rows, columns and experts of a file's tensors for a model.

A family's table of names assigns views to tensors (`WeightName`). A view reads the file when the resulting tensor is
read; quantised rows stay quantised. Letters in shapes: R rows, C columns, X experts, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.group_codes import Blocks
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.quantization.tensors import Backend, Packed, StoredTensor, Viewed

View: TypeAlias = Callable[[StoredTensor, Any], StoredTensor]
"""Converts a stored tensor, given the model's config."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spare(Viewed):
    """A tensor without effect, such as a bias of zeros; the model may have no parameter for it."""

    def raw(self) -> np.ndarray:
        return self.source.raw()

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        return self.source.load(dtype)


def spare(stored: StoredTensor) -> Spare:
    """Mark a tensor as having no effect."""
    return Spare(stored.name, stored.shape, stored.type_name, stored.nbytes, stored)


# ---- rows ------------------------------------------------------------------------------------------------------------


def entry(stored: StoredTensor, index: int) -> StoredTensor:
    """Select an entry of the outermost dimension: an expert's matrix [R, C] of [X, R, C], or its bias [R] of [X, R]."""
    if len(stored.shape) < 2:
        raise stored.misshapen("one more dimension is needed")
    return dataclasses.replace(stored.rows(index, index + 1), shape=stored.shape[1:])


def row_part(index: int, count: int) -> View:
    """Select the index-th of `count` equal parts of the rows: gate or up of a fused tensor."""

    def view(stored: StoredTensor, _config: Any) -> StoredTensor:
        size = stored.shape[0] // count if stored.shape else 0
        if stored.shape and stored.shape[0] % count:
            raise stored.misshapen(f"{count} equal parts are needed")
        return stored.rows(index * size, (index + 1) * size)

    return view


def qkv_rows(part: str, *, grouped: bool = False) -> View:
    """Select the rows of part "q", "k" or "v" of a fused matrix or bias, whose sizes are in the config.

    If `grouped`, the rows are grouped by KV head: the query heads that share it, its key, its value.
    """

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        if hasattr(config, "heads"):  # layers may differ; an MTP layer's config has one layer, with a later number
            layer = next((int(part) for part in stored.name.split(".") if part.isdecimal()), 0) % config.num_layers
            heads, kv_heads = config.heads(layer)
            size = config.head_dims[layer] if hasattr(config, "head_dims") else size
        q, kv = heads * size, kv_heads * size
        if stored.shape[:1] != (q + 2 * kv,):
            raise stored.misshapen(f"the model's config asks for {q} rows of q and {kv} each of k and v")
        if grouped:
            each = heads // kv_heads
            some = {"q": slice(each), "k": slice(each, each + 1), "v": slice(each + 1, None)}[part]
            return stored.select(np.arange(q + 2 * kv).reshape(-1, each + 2, size)[:, some].reshape(-1))
        return stored.rows(*{"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[part])

    return view


def every_other(first: int) -> View:
    """Select rows first, first + 2, ...: gate or up of a fused tensor whose gate and up rows alternate."""

    def view(stored: StoredTensor, _config: Any) -> StoredTensor:
        return stored.select(np.arange(first, stored.shape[0] if stored.shape else 0, 2))

    return view


def half_split(heads: str) -> View:
    """Reorder query or key rows [H * D, ...] to half-split rotary order, if the config says that they are interleaved.

    The pairs of the first `config.rope.dim` rows of every head are rows 2i and 2i + 1 in the file; the kernels rotate
    rows i and i + dim / 2. `heads` is the config's attribute that counts the heads.
    Source: the inverse of the permutation in llama.cpp's converter for Llama.
    """

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        count, size, turned = getattr(config, heads), config.head_dim, config.rope.dim
        if not config.interleaved_rotary or not stored.shape or stored.shape[0] != count * size:
            return stored  # the loader reports a wrong shape
        head = np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2), np.arange(turned, size)])
        return stored.select((np.arange(count)[:, None] * size + head).reshape(-1))

    return view


# ---- columns ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _InColumnOrder(Viewed):
    """A quantised matrix as stored, whose column i is multiplied by element `order[i]` of an input."""

    order: np.ndarray

    def raw(self) -> np.ndarray:
        raise UnsupportedModelError(
            f"{self.path}: {self.type_name} tensor {self.name} has columns in another order than its inputs, and its "
            "blocks cannot be reordered"
        )

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        return np.ascontiguousarray(self.source.load(dtype)[:, np.argsort(self.order)])

    def pack_for(self, backend: Backend[Packed]) -> Packed:
        kind = GGMLQuantizationType[self.type_name]
        return backend.blocks(self, lambda: Blocks(kind, self.source.raw(), self.order))


class ColumnOrder:
    """View of a matrix [R, C] whose stored column i is multiplied by element `order(config)[i]` of an input."""

    def __init__(self, order: Callable[[Any], np.ndarray]) -> None:
        self._order = order

    def __call__(self, stored: StoredTensor, config: Any) -> StoredTensor:
        """Return the matrix with its columns in the order of inputs; unchanged if they are stored in this order."""
        order = self._order(config)
        if stored.shape[1:] != order.shape:
            raise stored.misshapen(f"the model's config asks for {order.size} columns")
        if np.array_equal(order, np.arange(len(order))):
            return stored
        if stored.dtype is None:
            return _InColumnOrder(stored.name, stored.shape, stored.type_name, stored.nbytes, stored, order)
        return computed(stored, stored.shape, lambda values: values[:, np.argsort(order)])

    def undone(self, stored: StoredTensor, config: Any) -> StoredTensor:
        """Undo the view: return an unquantised matrix with its columns in the stored order."""
        order = self._order(config)
        return computed(stored, stored.shape, lambda values: values[:, order])


# ---- values ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Computed(Viewed):
    """Unquantised tensor whose elements a function computes when they are requested."""

    compute: Callable[[], np.ndarray]

    def raw(self) -> np.ndarray:
        values = self.compute()
        assert values.shape == self.shape
        return rows_of_bytes(values, self.shape)


def computed_by(
    stored: StoredTensor, shape: tuple[int, ...], type_name: str, compute: Callable[[], np.ndarray]
) -> Viewed:
    """Make a tensor of the plain `type_name` whose elements `compute` returns; it has the name and file of `stored`."""
    nbytes = math.prod(shape) * ELEMENTS[type_name].itemsize
    return _Computed(stored.name, shape, type_name, nbytes, stored, compute)


def computed(
    stored: StoredTensor,
    shape: tuple[int, ...],
    compute: Callable[[np.ndarray], np.ndarray],
    type_name: str | None = None,
) -> Viewed:
    """Make a tensor of `shape` whose elements `compute` derives from the elements of a stored one.

    `compute` gets and returns an array of the element type `type_name`; None keeps the stored type. A quantised tensor
    is decoded, by default to F32.
    """
    name = type_name or stored.dtype or "F32"
    return computed_by(stored, shape, name, lambda: compute(stored.load(name)))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Made(StoredTensor):
    """Unquantised tensor that is in no file; errors name the file `source`."""

    source: Path

    @property
    def path(self) -> Path:
        return self.source

    def release(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant(Made):
    """Tensor of constant elements."""

    values: np.ndarray

    def raw(self) -> np.ndarray:
        return rows_of_bytes(self.values, self.shape)


def rows_of_bytes(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Convert elements of a tensor of `shape` to the form of `StoredTensor.raw`."""
    return np.ascontiguousarray(values).reshape(max(1, math.prod(shape[:-1])), -1).view(np.uint8)


def constant(name: str, values: np.ndarray, source: Path) -> StoredTensor:
    """Make a float32 tensor of constant elements."""
    return Constant(name, values.shape, "F32", 4 * values.size, source, values.astype(np.float32))


def parts_of_experts(stored: StoredTensor, count: int) -> list[StoredTensor]:
    """Split one matrix [R, C] into the matrices [R, C / X] of X = `count` experts; an expert has every X-th column.

    The whole matrix is reordered once, when a part is read for the first time.
    """
    rows, each = stored.shape[0], stored.shape[1] // count

    @functools.cache
    def ordered() -> np.ndarray:
        values = stored.load(None).reshape(rows, each, count)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def part(index: int) -> StoredTensor:
        return computed_by(stored, (rows, each), stored.dtype or "F32", lambda: ordered()[index])

    return list(map(part, range(count)))


def plus_one(stored: StoredTensor, _config: Any) -> StoredTensor:
    """Add 1 in fp32, for norms that Hugging Face stores as the difference from 1 (Gemma)."""
    return computed(stored, stored.shape, lambda values: values + np.float32(1), "F32")


def transposed(stored: StoredTensor, _config: Any) -> StoredTensor:
    """Transpose an unquantised matrix [R, C] to [C, R], or each matrix of [X, R, C]."""
    if len(stored.shape) < 2:
        return stored  # the loader reports a wrong shape
    if stored.dtype is None:
        raise UnsupportedModelError(f"{stored.path}: {stored.type_name} tensor {stored.name} cannot be transposed")
    shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2])
    return computed(stored, shape, lambda values: values.swapaxes(-1, -2))


def flattened(stored: StoredTensor, _config: Any) -> StoredTensor:
    """Reshape depthwise kernels [C, 1, taps] to [C, taps], the shape in GGUF files."""
    if len(stored.shape) != 3 or stored.shape[1] != 1:
        return stored  # the loader reports a wrong shape
    return dataclasses.replace(stored, shape=(stored.shape[0], stored.shape[2]))


def as_row(stored: StoredTensor, _config: Any) -> StoredTensor:
    """Reshape a vector [C] to a matrix [1, C] (GGUF's gate of a shared expert)."""
    if len(stored.shape) != 1:
        return stored
    return computed(stored, (1, *stored.shape), lambda values: values[None])


def chain(*views: View) -> View:
    """Compose several views, applied in order."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        for each in views:
            stored = each(stored, config)
        return stored

    return view
