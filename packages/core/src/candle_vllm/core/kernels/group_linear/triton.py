"""Linear layers with weights in groups on a GPU, for many rows (step 6 of a request's life).

A tile of weights is scaled, rounded to x's dtype in registers, and multiplied with a tile of x. For few rows, and where
a row's bits must be its own: `triton_exact.py`.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.launch import checked
from candle_vllm.core.kernels.gguf_linear.triton_codes import float_code
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, Numbers
from candle_vllm.core.kernels.group_linear.triton_codes import (
    build,
    constants_of,
    inner_words,
    scale_and_zero,
    scaled_tile,
    step_words,
    without_numbers,
)
from candle_vllm.core.kernels.linear.triton_tiles import tile_of
from candle_vllm.core.kernels.triton_build import OPTIONS, WITH_TENSOR_CORES, Build, cdiv, stages

# By tokens of a tile: rows of the matrix, warps, stages; the last for all above. Not measured yet.
TILES = MappingProxyType({32: (128, 4, 3), 64: (128, 8, 3), 128: (128, 8, 3)})
TOGETHER = 8  # row tiles that are taken with each other, so that their x stays in the cache


@triton.jit(do_not_specialize=["T"])
def rounded_kernel(
    x,  # [T, K]
    codes,  # [steps, N, 16]
    scales,  # [groups, N]
    inner,  # [steps, N, 2]
    bias,  # [N]
    out,  # [T, N], rows contiguous
    T,
    N,
    K,
    group,
    x_stride,
    out_stride,
    steps,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    FLOATS: tl.constexpr,
    PADDED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tile, token_tile = tile_of(tl.program_id(0), T, N, ROWS, TOKENS, TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    asked = (token < T)[None, :]
    element = tl.arange(0, 16)[None, :]
    column = tl.arange(0, 32)
    x_at = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps):
        w0, w1, w2, w3 = step_words(scales, step, group, row64, inside, height, PARTS, UNIT)
        i0, i1 = inner_words(inner, step, row64, inside, height, FLOATS)
        place = (step * height + row64)[:, None] * 16 + element
        words = tl.load(codes + place, mask=inside[:, None], other=0)
        for p in tl.static_range(PARTS):
            scale, zero = scale_and_zero(w0, w1, w2, w3, p // UNIT, ZEROS, ZERO, SCALE_BF16, FLOATS)
            if FLOATS:
                weights = scaled_tile(words, i0, i1, scale, p, FLOATS, x.dtype.element_ty, ROWS)
            else:
                shift = (scale * (-2048.0 - zero))[:, None]
                even = float_code(words, words, p, 0, PARTS, BITS, 0) * scale[:, None] + shift
                odd = float_code(words, words, p, 1, PARTS, BITS, 0) * scale[:, None] + shift
                weights = tl.reshape(tl.join(even, odd), (ROWS, 32)).to(x.dtype.element_ty)
            k = step * (PARTS * 32) + p * 32
            wanted = asked
            if PADDED:
                wanted = asked & (k + column < K)[:, None]
            total = tl.dot(weights, tl.load(x_at + k, mask=wanted, other=0.0), total)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = out + token[None, :].to(tl.int64) * out_stride + row64[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & asked)


def linear(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """For many rows; see the contract in the package."""
    checked(x, matrix, bias, out)
    tokens = len(x)
    if out is None:
        out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    constants, options = _form(matrix, tokens, bias is not None)
    tiles = cdiv(matrix.rows, constants["ROWS"]) * cdiv(tokens, constants["TOKENS"])
    rounded_kernel[(tiles,)](
        x,
        matrix.codes,
        matrix.scales,
        matrix.inner,
        bias,
        out,
        tokens,
        matrix.rows,
        matrix.columns,
        matrix.group,
        x.stride(0),
        out.stride(0),
        matrix.steps,
        **constants,
        **options,
        **OPTIONS,
    )
    return out


def _form(matrix: GroupMatrix, tokens: int, bias: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options of a launch."""
    wide = next((size for size in TILES if tokens <= size), 128)
    rows, warps, deep = TILES[wide]
    constants = {"BIAS": bias, "ROWS": rows, "TOKENS": wide, "TOGETHER": TOGETHER}
    return constants_of(matrix) | constants, {"num_warps": warps, "num_stages": stages(deep)}


def _build(
    bits: int,
    group: int,
    zeros: bool,
    tokens: int,
    capabilities: tuple[int, ...],
    dtype: str = "bf16",
    columns: int = 4096,
    numbers: Numbers = "int",
) -> Build:
    matrix = without_numbers(bits, group, zeros, columns, numbers)
    constants, options = _form(matrix, tokens, zeros)
    return build(rounded_kernel, matrix, dtype, constants, "many", capabilities=capabilities, **options)


AOT = (
    *(_build(bits, group, zeros, 128, (90,)) for bits in (4, 8) for group in (32, 64, 128) for zeros in (False, True)),
    *(_build(4, 128, True, tokens, WITH_TENSOR_CORES) for tokens in TILES),
    _build(8, 4128, False, 128, WITH_TENSOR_CORES, "fp16", 4128),
    _build(8, 128, False, 128, (90,), numbers="e4m3"),
    _build(8, 4128, False, 128, (90,), "fp16", 4128, "e5m2"),
    _build(4, 4096, False, 128, (90,), numbers="e2m1"),
)
