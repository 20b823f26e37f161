# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Scales and zeros out of the layout, and what the kernels share; inside step 6 of a request's life."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.group_linear.layout import PART, GroupMatrix
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
def scale_and_zero(w0, w1, w2, w3, unit: tl.constexpr, ZEROS: tl.constexpr, ZERO: tl.constexpr, BF16: tl.constexpr):
    """Scale and zero of a unit in fp32; the zero is a constant where groups have none of their own."""
    word = w0 if unit == 0 else (w1 if unit == 1 else (w2 if unit == 2 else w3))
    if BF16:
        scale = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = ZERO
    if ZEROS:
        zero = ((word >> 16) & 0xFFFF).to(tl.float32)
    return scale, zero


def constants_of(matrix: GroupMatrix) -> dict[str, Any]:
    """What the kernels know of a matrix when they are compiled."""
    return {
        "BITS": matrix.bits,
        "PARTS": matrix.parts,
        "UNIT": matrix.unit,
        "ZEROS": matrix.zeros,
        "ZERO": float(matrix.zero),
        "SCALE_BF16": matrix.scale_dtype == torch.bfloat16,
        "PADDED": matrix.columns % matrix.step != 0,
    }


def without_numbers(bits: int, group: int, zeros: bool, columns: int = 4096) -> GroupMatrix:
    """A matrix for `constants_of` where something is compiled ahead of time."""
    words = torch.empty(0, dtype=torch.int32 if zeros else torch.int16)
    return GroupMatrix(1, columns, bits, group, torch.float16 if zeros else torch.bfloat16, words, words)


def build(kernel: Any, matrix: GroupMatrix, dtype: str, constants: dict[str, Any], form: str, **options: Any) -> Build:
    """A form of a kernel for a matrix `without_numbers`."""
    types = dict.fromkeys(("T", "N", "K", "group", "x_stride", "out_stride", "steps", "split_steps"), "i32")
    types |= {"x": f"*{dtype}", "codes": "*i32", "scales": "*i32" if matrix.zeros else "*i16", "out": f"*{dtype}"}
    types["bias"] = f"*{dtype}"
    if constants.get("SPLIT"):
        types["out"] = "*fp32"
    missing = {} if constants["BIAS"] else {"bias": None}
    shared = matrix.group // PART
    return Build(
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types and name not in missing},
        {**constants, **missing},
        aligned=("N", "K", "group", "x_stride", "out_stride"),
        label=f"{matrix.bits}bits-{shared}parts{'-zeros' if matrix.zeros else ''}-{constants['TOKENS']}-{form}",
        **options,
    )
