# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Scales, zeros and floats out of the layout, and what the kernels share; inside step 6 of a request's life.

A small float becomes a float16 by moving its bits: e5m2 is the upper half of one; e4m3 and e2m1, whose exponents are
shorter, are its number divided by 2^8 and by 2^14, subnormal ones included. FLOATS is 0 for whole numbers, 1 for e4m3,
2 for e5m2, 3 for e2m1.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.triton_codes import moved
from candle_vllm.core.kernels.group_linear.layout import PART, GroupMatrix, Numbers
from candle_vllm.core.kernels.triton_build import Build


@triton.jit
def step_words(scales, step, group, row, inside, N, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """The words of a step for some rows: one for each unit, up to four. N is int64."""
    k = step * (PARTS * 32)
    w0 = tl.load(scales + (k // group) * N + row, mask=inside, other=0)
    w1 = w0
    w2 = w0
    w3 = w0
    if PARTS // UNIT > 1:
        w1 = tl.load(scales + ((k + UNIT * 32) // group) * N + row, mask=inside, other=0)
    if PARTS // UNIT > 2:
        w2 = tl.load(scales + ((k + 64) // group) * N + row, mask=inside, other=0)
        w3 = tl.load(scales + ((k + 96) // group) * N + row, mask=inside, other=0)
    return w0, w1, w2, w3


@triton.jit
def scale_and_zero(
    w0,
    w1,
    w2,
    w3,
    unit: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    BF16: tl.constexpr,
    FLOATS: tl.constexpr,
):
    """Scale and zero of a unit in fp32; the zero is a constant where groups have none of their own."""
    word = w0 if unit == 0 else (w1 if unit == 1 else (w2 if unit == 2 else w3))
    if FLOATS:
        scale = word * (1.0 if FLOATS == 2 else 256.0)  # see `float_tile`
    elif BF16:
        scale = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = ZERO
    if ZEROS:
        zero = ((word >> 16) & 0xFFFF).to(tl.float32)
    return scale, zero


@triton.jit
def inner_words(inner, step, row, inside, N, FLOATS: tl.constexpr):
    """The words of e2m1's inner scales of a step for some rows. N is int64."""
    first = row
    second = row
    if FLOATS == 3:
        place = inner + (step * N + row) * 2
        first = tl.load(place, mask=inside, other=0)
        second = tl.load(place + 1, mask=inside, other=0)
    return first, second


@triton.jit
def halves_of(word):
    """Two float16 in an int32, the lower first."""
    return word.to(tl.int16).to(tl.float16, bitcast=True), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def float_halves(words, p: tl.constexpr, FLOATS: tl.constexpr):
    """The two floats of part p in each element, exactly, as float16; divided as the head of the file says."""
    if FLOATS == 3:
        word = moved(words, 4 * p, 9) & 0x0E000E00 | moved(words, 4 * p + 3, 15) & -0x7FFF8000
    elif FLOATS == 2:
        word = moved(words, 8 * p, 8) & -0x00FF0100
    else:
        word = moved(words, 8 * p, 7) & 0x3F803F80 | moved(words, 8 * p, 8) & -0x7FFF8000
    return halves_of(word)


@triton.jit
def wide_floats(words, i0, i1, p: tl.constexpr, FLOATS: tl.constexpr):
    """The same in fp32, times the inner scale of e2m1; all but e5m2 divided by 256."""
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


@triton.jit
def float_tile(words, i0, i1, p: tl.constexpr, FLOATS: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr):
    """As dtype [ROWS, 32], from words [ROWS, 16]; exact, for there are six significant bits at most."""
    if FLOATS == 3 or dtype != tl.float16:
        first, second = wide_floats(words, i0, i1, p, FLOATS)
        first = first.to(dtype)
        second = second.to(dtype)
    else:
        first, second = float_halves(words, p, FLOATS)
    return tl.reshape(tl.join(first, second), (ROWS, 32))


@triton.jit
def scaled_tile(words, i0, i1, scale, p: tl.constexpr, FLOATS: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr):
    """The same times the scales [ROWS] of `scale_and_zero`, rounded to fp32 and then to dtype."""
    first, second = wide_floats(words, i0, i1, p, FLOATS)
    return tl.reshape(tl.join(first * scale[:, None], second * scale[:, None]), (ROWS, 32)).to(dtype)


FLOATS = MappingProxyType({"int": 0, "e4m3": 1, "e5m2": 2, "e2m1": 3})
"""The kernels' constant of this name, by `GroupMatrix.numbers`."""


def constants_of(matrix: GroupMatrix) -> dict[str, Any]:
    """What the kernels know of a matrix when they are compiled."""
    return {
        "BITS": matrix.bits,
        "PARTS": matrix.parts,
        "UNIT": matrix.unit,
        "ZEROS": matrix.zeros,
        "ZERO": float(matrix.zero),
        "SCALE_BF16": matrix.scale_dtype == torch.bfloat16,
        "FLOATS": FLOATS[matrix.numbers],
        "PADDED": matrix.columns % matrix.step != 0,
    }


def without_numbers(bits: int, group: int, zeros: bool, columns: int = 4096, numbers: Numbers = "int") -> GroupMatrix:
    """A matrix for `constants_of` where something is compiled ahead of time."""
    if numbers != "int":
        words = torch.empty(0)
        return GroupMatrix(1, columns, bits, group, torch.float32, words, words, numbers=numbers)
    words = torch.empty(0, dtype=torch.int32 if zeros else torch.int16)
    return GroupMatrix(1, columns, bits, group, torch.float16 if zeros else torch.bfloat16, words, words)


def scale_type(matrix: GroupMatrix) -> str:
    """Triton's type of the plane of scales."""
    return {torch.int16: "*i16", torch.int32: "*i32", torch.float32: "*fp32"}[matrix.scales.dtype]


def build(kernel: Any, matrix: GroupMatrix, dtype: str, constants: dict[str, Any], form: str, **options: Any) -> Build:
    """A form of a kernel for a matrix `without_numbers`."""
    types = dict.fromkeys(("T", "N", "K", "group", "x_stride", "out_stride", "steps", "split_steps"), "i32")
    types |= {"x": f"*{dtype}", "codes": "*i32", "scales": scale_type(matrix), "out": f"*{dtype}"}
    types["bias"] = f"*{dtype}"
    if constants.get("SPLIT"):
        types["out"] = "*fp32"
    missing = {} if constants["BIAS"] else {"bias": None}
    if matrix.numbers == "e2m1":
        types["inner"] = "*i32"
    else:
        missing["inner"] = None
    kind = f"{matrix.bits}bits" if matrix.numbers == "int" else matrix.numbers
    shared = matrix.group // PART
    return Build(
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types and name not in missing},
        {**constants, **missing},
        aligned=("N", "K", "group", "x_stride", "out_stride"),
        label=f"{kind}-{shared}parts{'-zeros' if matrix.zeros else ''}-{constants['TOKENS']}-{form}",
        **options,
    )
