"""Views of stored tensors: the rows, experts and orders in which a model wants what a file holds.

Stands before step 1 of a request's life. A family's table of names says which view a tensor passes on its way
(`WeightName`). Nothing is read before the view itself is asked; quantised rows stay as they are.
Letters: R rows, C columns, X experts, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.quantization.tensors import StoredTensor, Viewed

View: TypeAlias = Callable[[StoredTensor, Any], StoredTensor]
"""What a family's table does with a stored tensor on its way, given the model's config."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spare(Viewed):
    """A tensor that adds nothing, such as a bias of zeros: a model need not have a place for it."""

    def raw(self) -> np.ndarray:
        return self.source.raw()

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        return self.source.load(dtype)


def spare(stored: StoredTensor) -> Spare:
    """Marks a tensor as one that adds nothing."""
    return Spare(stored.name, stored.shape, stored.type_name, stored.nbytes, stored)


# ---- rows ------------------------------------------------------------------------------------------------------------


def entry(stored: StoredTensor, index: int) -> StoredTensor:
    """One entry of the outermost dimension: an expert's matrix [R, C] of [X, R, C], or its bias [R] of [X, R]."""
    if len(stored.shape) < 2:
        raise WeightsError(f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}; one more is wanted")
    return dataclasses.replace(stored.rows(index, index + 1), shape=stored.shape[1:])


def row_part(index: int, count: int) -> View:
    """The index-th of `count` equal parts of the rows: gate and up of a fused tensor."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        del config
        size = stored.shape[0] // count if stored.shape else 0
        if stored.shape and stored.shape[0] % count:
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}; {count} equal parts are wanted"
            )
        return stored.rows(index * size, (index + 1) * size)

    return view


def qkv_rows(part: str) -> View:
    """The rows of "q", "k" or "v" in a matrix or bias that holds all three behind each other; sizes by the config."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if stored.shape[:1] != (q + 2 * kv,):
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}; the model's config asks for "
                f"{q} rows of q and {kv} each of k and v"
            )
        return stored.rows(*{"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[part])

    return view


def every_other(first: int) -> View:
    """Rows first, first + 2, ...: gate or up of a fused tensor in which they alternate."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        del config
        return stored.select(np.arange(first, stored.shape[0] if stored.shape else 0, 2))

    return view


def half_split(heads: str) -> View:
    """Query or key rows [H * D, ...] to half-split rotary order, where the config says that they are interleaved.

    The pairs of the first `config.rope.dim` rows of every head are rows 2i and 2i + 1 in the file; the kernels rotate
    rows i and i + dim / 2. Source: the permutation of llama.cpp's converter for Llama, turned back.

    Args:
        heads: the config's attribute that counts the heads.
    """

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        count, size, turned = getattr(config, heads), config.head_dim, config.rope.dim
        if not config.interleaved_rotary or not stored.shape or stored.shape[0] != count * size:
            return stored  # a wrong shape is named by the loader
        head = np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2), np.arange(turned, size)])
        return stored.select((np.arange(count)[:, None] * size + head).reshape(-1))

    return view


# ---- values ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Computed(Viewed):
    """Plain numbers that a function makes of another tensor's."""

    compute: Callable[[np.ndarray], np.ndarray]

    def raw(self) -> np.ndarray:
        made = self.compute(self.source.load(self.type_name))
        assert made.shape == self.shape
        return np.ascontiguousarray(made).view(np.uint8).reshape(max(1, math.prod(self.shape[:-1])), -1)


def computed(
    stored: StoredTensor,
    shape: tuple[int, ...],
    compute: Callable[[np.ndarray], np.ndarray],
    type_name: str | None = None,
) -> Viewed:
    """A tensor that `compute` makes of the stored numbers, which are given to it as `StoredTensor.load` has them.

    Args:
        stored: the numbers; quantised ones are decoded.
        shape: of the result.
        compute: changes no number's type.
        type_name: of the numbers; None keeps the stored one, F32 for a quantised tensor.
    """
    name = type_name or stored.dtype or "F32"
    return _Computed(stored.name, shape, name, math.prod(shape) * ELEMENTS[name].itemsize, stored, compute)


def plus_one(stored: StoredTensor, config: Any) -> StoredTensor:
    """Numbers plus 1, in fp32: norms that Hugging Face stores as the distance from 1 (Gemma)."""
    del config
    return computed(stored, stored.shape, lambda values: values + np.float32(1), "F32")


def transposed(stored: StoredTensor, config: Any) -> StoredTensor:
    """A plain matrix [R, C] as [C, R]; of [X, R, C] every one."""
    del config
    if len(stored.shape) < 2:
        return stored  # a wrong shape is named by the loader
    if stored.dtype is None:
        raise UnsupportedModelError(f"{stored.path}: {stored.type_name} tensor {stored.name} cannot be transposed")
    shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2])
    return computed(stored, shape, lambda values: values.swapaxes(-1, -2))


def as_row(stored: StoredTensor, config: Any) -> StoredTensor:
    """Numbers [C] as a matrix [1, C] (GGUF's gate of a shared expert)."""
    del config
    if len(stored.shape) != 1:
        return stored
    return computed(stored, (1, *stored.shape), lambda values: values[None])


def chain(*views: View) -> View:
    """Several views, one after the other."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        for each in views:
            stored = each(stored, config)
        return stored

    return view
