# SPDX-License-Identifier: MIT
"""The sums of a tile: some rows of a matrix times some rows of x, along K (step 6 of a request's life).

Every kernel that multiplies by a stored matrix, of a linear layer or of experts, has two parts: an outer part, which
selects a program's rows and tokens, and one of three product functions, passed as a constant:

- `plain`: weights of x's dtype, unchanged.
- `exact`: codes are multiplied by x exactly, and the sums by scales, in fp32. An integer's bits become those of the
  float magic + code (bf16: magic 128, fp16: 1024); magic times the sum of x, by a product with ones, is subtracted.
- `rounded`: a tile of weights is scaled, rounded to x's dtype in registers, and multiplied.

A `Codec`, also a constant, extracts codes and scales from planes: each format and product is compiled separately.

The argument `tile` of a product is a tuple of

    x_at     pointers to the starts of rows of x, [1, T]
    planes   planes of the matrix, see `Operand`
    row      rows of the matrix, int64 [R], valid where `inside` is set
    inside   mask [R]
    asked    mask [T] of the valid rows of x
    height   number of rows of the matrix, int64
    K        columns
    pitch    see `Operand`

Letters: R rows and T tokens of a tile. K is divided into **steps** of `parts` times 32 weights (for a plain matrix, a
step is one weight), and with FOLD into **stretches** of `split_steps` steps, whose sums are added to 0 in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True, eq=False, kw_only=True)
class Codec:
    """Functions that read a matrix of codes. One object per kind of matrix: it is part of a kernel's cache key.

    In the device functions, g is a part of a step, `part` the index of `width` weights in each 32, and `planes` (low,
    high, scales, supers); supers has the scales of super-blocks (float16 pairs of GGUF's K and IQ types).

    Attributes:
        words: (planes, step, row, inside, height, pitch, FORM): a tuple, the stored words of a step's scales.
        codes: (planes, step, element, row, inside, height, FORM, EXACT): a tuple for `tile` or `rounded`, the stored
            words at the indices `element` of a step; a word has two codes of each part.
        scale: (words, unit, part, OFFSET, FORM): (scale, shift) of a unit, fp32 [R]; `shift` multiplies sums of x.
        tile: (codes, words, at, g, FORM, dtype, ROWS): [R, width] for `exact`, from bit `at` of a code on.
        rounded: (codes, words, g, FORM, dtype, ROWS): weights [R, 32] for `rounded`.
        low, high: bits of a code in each result of `codes`; high may be 0. `exact` splits 8-bit integers in two.
        parts: number of parts of a step, of 32 weights each.
        unit: number of parts of a step that always share a scale.
        width: weights that `exact` multiplies at a time: 32, or fewer if fewer share a scale.
        floats: whether codes are floats, which need no shift.
    """

    words: Callable[..., Any]
    codes: Callable[..., Any]
    scale: Callable[..., Any]
    tile: Callable[..., Any]
    rounded: Callable[..., Any]
    low: int
    high: int
    parts: int
    unit: int = 1
    width: int = 32
    floats: bool = False

    @cached_property
    def cache_key(self) -> str:
        """Triton's key for compiled kernels with this constant: sources of the functions, and the other fields."""
        return "-".join(getattr(value, "cache_key", str(value)) for value in vars(self).values())


class Operand(NamedTuple):
    """A matrix [rows, columns] as a launch passes it; kernels that are compiled ahead get types instead of tensors.

    Attributes:
        planes: low, high (e2m1: inner scales), scales, supers; None if the format lacks it. A plain matrix is `low`.
        pitch: row stride of a plain matrix, in elements; weights per scale of a matrix with groups; otherwise None.
        steps: number of steps of K.
        form: a `Codec`, or for a plain matrix the number of columns that are multiplied at a time.
    """

    planes: tuple[Any, Any, Any, Any]
    rows: int
    columns: int
    pitch: int | None
    steps: int
    form: Codec | int

    @property
    def padded(self) -> bool:
        """Whether K is not a whole number of steps, or, for a plain matrix, of loop iterations."""
        return self.columns % (self.form if isinstance(self.form, int) else self.form.parts * 32) != 0


def plain_operand(weight: Any, rows: int, columns: int, pitch: int, at_a_time: int) -> Operand:
    """Return the operand of a plain matrix, whose first plane is `weight`; see `Operand`."""
    return Operand((weight, None, None, None), rows, columns, pitch, columns, at_a_time)


@triton.jit
def plain(tile, first, last, split_steps, FORM: tl.constexpr, PADDED: tl.constexpr, FOLD: tl.constexpr):
    """Return fp32 [R, T], the sum over the steps from `first` to `last`."""
    x_at, planes, row, inside, asked, _height, K, pitch = tile
    column = tl.arange(0, FORM)
    weight_at = planes[0] + row[:, None] * pitch + column[None, :]
    operands = x_at + column[:, None], weight_at, inside, asked, K
    if FOLD:
        total = tl.zeros((inside.shape[0], asked.shape[0]), tl.float32)
        for start in tl.range(first, last, split_steps):
            total += _chain(operands, start, tl.minimum(start + split_steps, last), FORM, PADDED)
    else:
        total = _chain(operands, first, last, FORM, PADDED)
    return total


@triton.jit
def _chain(operands, start, stop, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Return the sums of one stretch: a sequence of tensor instructions that begins at 0."""
    x_at, weight_at, inside, asked, K = operands
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((inside.shape[0], asked.shape[0]), tl.float32)
    for k in tl.range(start, stop, COLUMNS):
        left = inside[:, None]
        right = asked[None, :]
        if PADDED:
            left = left & (k + column < K)[None, :]
            right = right & (k + column < K)[:, None]
        weights = tl.load(weight_at + k, mask=left, other=0.0)
        numbers = tl.load(x_at + k, mask=right, other=0.0)
        sums = tl.dot(weights, numbers, sums, input_precision="ieee")
    return sums


@triton.jit
def exact(tile, first, last, split_steps, FORM: tl.constexpr, PADDED: tl.constexpr, FOLD: tl.constexpr):
    """Return fp32 [R, T], the sum over the steps from `first` to `last`. Products with a scale are explicit fused
    operations, so that all variants of a kernel round in the same way."""
    x_at, planes, row, inside, asked, height, K, pitch = tile
    ROWS: tl.constexpr = inside.shape[0]
    TOKENS: tl.constexpr = asked.shape[0]
    WIDTH: tl.constexpr = FORM.width
    E: tl.constexpr = WIDTH // 2  # words at a time; a word has two codes of each part
    PARTS: tl.constexpr = FORM.parts
    UNIT: tl.constexpr = FORM.unit
    EIGHT: tl.constexpr = FORM.low + FORM.high == 8
    FLOATS: tl.constexpr = FORM.floats
    dtype: tl.constexpr = x_at.dtype.element_ty
    MAGIC: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    OFFSET: tl.constexpr = MAGIC * 17 if EIGHT else MAGIC
    element = tl.arange(0, E)
    column = tl.arange(0, WIDTH)
    x_at += column[:, None]
    # Joined as the codes are: Triton 3.6 derives x's layout from this, and prefetches x only if both products agree.
    half = tl.full((ROWS, E), 1.0, tl.float32).to(dtype)
    ones = tl.reshape(tl.join(half, half), (ROWS, WIDTH))
    zeros = tl.zeros((ROWS, TOKENS), tl.float32)
    stretch = zeros  # sums of the current stretch
    total = zeros  # sums of the earlier stretches
    # Triton prefetches only the operands of dot products, so a step's scales are loaded during the step before.
    ahead = FORM.words(planes, first, row, inside, height, pitch, FORM)
    for step in tl.range(first, last):
        words = ahead
        after = tl.minimum(step + 1, last - 1)
        ahead = FORM.words(planes, after, row, inside, height, pitch, FORM)
        for part in tl.static_range(32 // WIDTH):
            elements = (part * E + element)[None, :]
            codes = FORM.codes(planes, step, elements, row, inside, height, FORM, True)
            for unit in tl.static_range(PARTS // UNIT):
                scale, shift = FORM.scale(words, unit, part, OFFSET, FORM)
                sums = zeros
                dots = zeros
                upper = zeros
                for inner in tl.static_range(UNIT):
                    k = step * (PARTS * 32) + (unit * UNIT + inner) * 32 + part * WIDTH
                    right = asked[None, :]
                    if PADDED:
                        right = right & (k + column < K)[:, None]
                    numbers = tl.load(x_at + k, mask=right, other=0.0)
                    if not FLOATS:
                        sums = tl.dot(ones, numbers, sums)
                    weights = FORM.tile(codes, words, 0, unit * UNIT + inner, FORM, dtype, ROWS)
                    dots = tl.dot(weights, numbers, dots)
                    if EIGHT and not FLOATS:  # the upper four bits
                        weights = FORM.tile(codes, words, 4, unit * UNIT + inner, FORM, dtype, ROWS)
                        upper = tl.dot(weights, numbers, upper)
                if not FLOATS:
                    if EIGHT:
                        dots += upper * 16.0
                    stretch = tl.fma(sums, tl.broadcast_to(shift[:, None], (ROWS, TOKENS)), stretch)
                stretch = tl.fma(dots, tl.broadcast_to(scale[:, None], (ROWS, TOKENS)), stretch)
        if FOLD:  # noqa: SIM102 - known when this is compiled
            if (step + 1) % split_steps == 0:
                total += stretch
                stretch = zeros
    if FOLD:
        stretch += total
    return stretch


@triton.jit
def rounded(tile, first, last, _split_steps, FORM: tl.constexpr, PADDED: tl.constexpr, _FOLD: tl.constexpr):
    """Return fp32 [R, T], the sum over the steps from `first` to `last`, in one stretch."""
    x_at, planes, row, inside, asked, height, K, pitch = tile
    ROWS: tl.constexpr = inside.shape[0]
    PARTS: tl.constexpr = FORM.parts
    dtype: tl.constexpr = x_at.dtype.element_ty
    element = tl.arange(0, 16)[None, :]
    column = tl.arange(0, 32)
    x_at += column[:, None]
    total = tl.zeros((ROWS, asked.shape[0]), tl.float32)
    for step in tl.range(first, last):
        words = FORM.words(planes, step, row, inside, height, pitch, FORM)
        codes = FORM.codes(planes, step, element, row, inside, height, FORM, False)
        for g in tl.static_range(PARTS):
            weights = FORM.rounded(codes, words, g, FORM, dtype, ROWS)
            k = step * (PARTS * 32) + g * 32
            right = asked[None, :]
            if PADDED:
                right = right & (k + column < K)[:, None]
            total = tl.dot(weights, tl.load(x_at + k, mask=right, other=0.0), total)
    return total
