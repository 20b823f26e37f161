# SPDX-License-Identifier: MIT
"""Linear layers with weights in groups on a GPU (step 6 of a request's life).

`linear_exact` is for few rows, and for any number of rows with `invariant`. Groups wider than 32 cost less, because
scales are applied once for a whole unit (`GroupMatrix.unit`). Codes that are floats are exact in x's dtype and need no
sums of x. `linear` is for many rows: weights are rounded first. Both use a codec of the matrix's form of groups.

A small float becomes a float16 by moving its bits: e5m2 is the upper half of a float16. e4m3 and e2m1 have shorter
exponents, so the float16 is the value divided by 2^8 (e4m3) or 2^14 (e2m1), subnormal numbers included. FLOATS is 0 for
integers, 1 for e4m3, 2 for e5m2, 3 for e2m1. Terms (part, step, unit): see `layout.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.triton import code_pairs, moved, scaled_codes
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, Numbers
from candle_vllm.core.kernels.linear.triton import CODED_CUT, Tile, launch, tile_for
from candle_vllm.core.kernels.linear.triton_products import Codec, Operand, exact, rounded

# The first tile with enough tokens is used, else the last. Chosen by counting registers of the compiled code, not yet
# measured on a GPU. No tile of `exact` has 64 rows for four warps: Hopper would use wgmma, which rounds differently.
TILES = (Tile(8, 32, 1, 4), Tile(16, 64, 2, 5), Tile(32, 64, 2, 4), Tile(64, 32, 4, 4), Tile(128, 32, 8, 3))
ROUNDED_TILES = (Tile(32, 128, 4, 3), Tile(64, 128, 8, 3), Tile(128, 128, 8, 3))


@triton.jit
def scale_and_zero(words, unit: tl.constexpr, FORM: tl.constexpr):
    """Return the scale (of e4m3 and e2m1 times 256) and the zero of a unit in fp32; the zero may be a constant."""
    FLOATS: tl.constexpr = FORM.kind
    word = words[0] if unit == 0 else (words[1] if unit == 1 else (words[2] if unit == 2 else words[3]))
    if FLOATS:
        scale = word * (1.0 if FLOATS == 2 else 256.0)  # see `wide_floats`
    elif FORM.scale_bf16:
        scale = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    ZERO: tl.constexpr = FORM.zero
    zero = ZERO
    if FORM.zeros:
        zero = ((word >> 16) & 0xFFFF).to(tl.float32)
    return scale, zero


@triton.jit
def halves_of(word):
    """Return the two float16 of an int32, the lower first."""
    return word.to(tl.int16).to(tl.float16, bitcast=True), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def float_halves(words, p: tl.constexpr, FLOATS: tl.constexpr):
    """Return the two floats of part p in each element as float16, exact, divided as the module's docstring says."""
    if FLOATS == 3:
        word = moved(words, 4 * p, 9) & 0x0E000E00 | moved(words, 4 * p + 3, 15) & -0x7FFF8000
    elif FLOATS == 2:
        word = moved(words, 8 * p, 8) & -0x00FF0100
    else:
        word = moved(words, 8 * p, 7) & 0x3F803F80 | moved(words, 8 * p, 8) & -0x7FFF8000
    return halves_of(word)


@triton.jit
def wide_floats(words, i0, i1, p: tl.constexpr, FLOATS: tl.constexpr):
    """Return `float_halves` in fp32, times the inner scale of e2m1; divided by 256, except e5m2."""
    first, second = float_halves(words, p, FLOATS)
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if FLOATS == 3:
        pair = (i0 if p < 2 else i1) >> (16 * (p % 2))
        low, high = halves_of((pair & 0x7F) << 7 | (pair & 0x80) << 8 | (pair & 0x7F00) << 15 | (pair & 0x8000) << 16)
        upper = (tl.arange(0, 16) >= 8)[None, :]
        scale = tl.where(upper, (high.to(tl.float32) * 16384.0)[:, None], (low.to(tl.float32) * 16384.0)[:, None])
        first *= scale
        second *= scale
    return first, second


# ---- the codec -------------------------------------------------------------------------------------------------------


@triton.jit
def _words(planes, step, row, inside, height, group, FORM: tl.constexpr):
    """Load the words of a step for some rows: one for each unit, up to four, then two of the inner scales of e2m1.

    `height` is int64. Words that the form lacks mean nothing.
    """
    UNITS: tl.constexpr = FORM.parts // FORM.unit
    k = step * (FORM.parts * 32)
    w0 = tl.load(planes[2] + (k // group) * height + row, mask=inside, other=0)
    w1 = w0
    w2 = w0
    w3 = w0
    if UNITS > 1:
        w1 = tl.load(planes[2] + ((k + FORM.unit * 32) // group) * height + row, mask=inside, other=0)
    if UNITS > 2:
        w2 = tl.load(planes[2] + ((k + 64) // group) * height + row, mask=inside, other=0)
        w3 = tl.load(planes[2] + ((k + 96) // group) * height + row, mask=inside, other=0)
    i0 = row
    i1 = row
    if FORM.kind == 3:
        place = planes[1] + (step * height + row) * 2
        i0 = tl.load(place, mask=inside, other=0)
        i1 = tl.load(place + 1, mask=inside, other=0)
    return w0, w1, w2, w3, i0, i1


@triton.jit
def _codes(planes, step, element, row, inside, height, _FORM: tl.constexpr, _EXACT: tl.constexpr):
    place = (step * height + row)[:, None] * 16 + element
    words = tl.load(planes[0] + place, mask=inside[:, None], other=0)
    return words, words


@triton.jit
def _scale(words, unit: tl.constexpr, _part: tl.constexpr, OFFSET: tl.constexpr, FORM: tl.constexpr):
    scale, zero = scale_and_zero(words, unit, FORM)
    return scale, scale * (-OFFSET - zero)


@triton.jit
def _floats(
    codes, words, _at: tl.constexpr, g: tl.constexpr, FORM: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr
):
    """Return part g as dtype [ROWS, 32], exact, with at most six significant bits."""
    if FORM.kind == 3 or dtype != tl.float16:
        first, second = wide_floats(codes[0], words[4], words[5], g, FORM.kind)
        first = first.to(dtype)
        second = second.to(dtype)
    else:
        first, second = float_halves(codes[0], g, FORM.kind)
    return tl.reshape(tl.join(first, second), (ROWS, 32))


@triton.jit
def _rounded(codes, words, g: tl.constexpr, FORM: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr):
    scale, zero = scale_and_zero(words, g // FORM.unit, FORM)
    if FORM.floats:
        first, second = wide_floats(codes[0], words[4], words[5], g, FORM.kind)
        weights = tl.reshape(tl.join(first * scale[:, None], second * scale[:, None]), (ROWS, 32)).to(dtype)
    else:
        weights = scaled_codes(codes, g, scale[:, None], (scale * (-2048.0 - zero))[:, None], FORM, dtype, ROWS)
    return weights


FLOATS = MappingProxyType({"int": 0, "e4m3": 1, "e5m2": 2, "e2m1": 3})
"""The kernels' constant of this name, by `GroupMatrix.numbers`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupCodec(Codec):
    """Codec of matrices with one form of groups.

    Attributes:
        zeros: whether each group has its own zero; otherwise `zero` is the zero of all groups.
        scale_bf16: whether scales are bfloat16, not float16.
        kind: kind of floats, see `FLOATS`.
    """

    zeros: bool
    zero: float
    scale_bf16: bool
    kind: int


@functools.cache
def codec(bits: int, unit: int, zeros: bool, scale_dtype: torch.dtype, numbers: Numbers) -> GroupCodec:
    """Return the codec of matrices of a form; see `GroupMatrix`."""
    return GroupCodec(
        words=_words,
        codes=_codes,
        scale=_scale,
        tile=code_pairs if numbers == "int" else _floats,
        rounded=_rounded,
        low=bits,
        high=0,
        parts=16 // bits,
        unit=unit,
        floats=numbers != "int",
        zeros=zeros,
        zero=float(1 << (bits - 1)),
        scale_bf16=scale_dtype == torch.bfloat16,
        kind=FLOATS[numbers],
    )


def operand(matrix: GroupMatrix) -> Operand:
    planes = matrix.codes, matrix.inner, matrix.scales, None
    found = codec(matrix.bits, matrix.unit, matrix.zeros, matrix.scale_dtype, matrix.numbers)
    return Operand(planes, matrix.rows, matrix.columns, matrix.group, matrix.steps, found)


# ---- the products ----------------------------------------------------------------------------------------------------


def linear_exact(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply exactly: made for few rows, valid for any number; see the contract in the package."""
    return launch(x, operand(matrix), bias, out, exact, tile_for(len(x), TILES), CODED_CUT)


def linear(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply many rows by weights that are rounded first; see the contract in the package."""
    return launch(x, operand(matrix), bias, out, rounded, tile_for(len(x), ROUNDED_TILES))
