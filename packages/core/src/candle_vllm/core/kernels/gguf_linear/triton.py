"""Linear layers and embedding rows with quantised weights on a GPU (step 6 of a request's life).

Few rows (decoding), and any number where a row's bits must be its own: `triton_exact.py`.

Many rows (prefill): a tile of weights is scaled, rounded to x's dtype in registers, and multiplied with a tile of x.
Where Triton does not use the GPU's tensor cores but torch does, pieces of the matrix are decoded, and torch multiplies.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.launch import build, checked, constants_of, planes_of
from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix, Planes
from candle_vllm.core.kernels.gguf_linear.triton_codes import float_code, high_words, scale_of, scale_words
from candle_vllm.core.kernels.gguf_linear.triton_exact import linear_exact
from candle_vllm.core.kernels.linear import linear as plain_linear
from candle_vllm.core.kernels.linear.triton_tiles import tile_of
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.triton_build import (
    OPTIONS,
    TENSOR_CORES,
    WITH_TENSOR_CORES,
    Build,
    capability,
    cdiv,
    stages,
)

__all__ = ["embedding", "linear", "linear_exact"]

# Tile shapes; chosen by counting instructions and registers of the compiled code, not yet measured on a GPU.
LARGE_ROWS = 128
LARGE_TOKENS = 128
LARGE_WARPS = 8
LARGE_STAGES = 3
PIECE = 1 << 24  # weights that are decoded at a time, where torch multiplies
TOGETHER = 8  # row tiles that are taken with each other, so that their x stays in the cache


@triton.jit(do_not_specialize=["T"])
def large_kernel(
    x,  # [T, K]
    low,
    high,
    scales,
    supers,
    bias,  # [N]
    out,  # [T, N], rows contiguous
    T,
    N,
    K,
    x_stride,
    out_stride,
    steps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    PADDED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    G: tl.constexpr = 2 if LOW == 8 else 4
    STEP: tl.constexpr = G * 32
    row_tile, token_tile = tile_of(tl.program_id(0), T, N, ROWS, TOKENS, TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    asked = (token < T)[None, :]
    element = tl.arange(0, 16)
    column = tl.arange(0, 32)
    x_at = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps):
        w0, w1, w2, w3, above = scale_words(scales, supers, step, row64, inside, height, NESTED, WORDS)
        place = (step * height + row64)[:, None] * 16 + element[None, :]
        lows = tl.load(low + place, mask=inside[:, None], other=0)
        highs = lows
        if HIGH > 0:
            highs = high_words(high, step, height, row64[:, None], element[None, :], inside[:, None], HIGH)
        for g in tl.static_range(G):
            scale, minimum = scale_of(w0, w1, w2, w3, above, g, 0, NESTED, MINIMUM, WIDTH, ZERO)
            scale = scale[:, None]
            shift = minimum[:, None] - scale * 2048.0
            if WIDTH == 16:
                scale_2, minimum_2 = scale_of(w0, w1, w2, w3, above, g, 1, NESTED, MINIMUM, WIDTH, ZERO)
                second = (element >= 8)[None, :]
                shift = tl.where(second, (minimum_2 - scale_2 * 2048.0)[:, None], shift)
                scale = tl.where(second, scale_2[:, None], scale)
            even = float_code(lows, highs, g, 0, G, LOW, HIGH) * scale + shift
            odd = float_code(lows, highs, g, 1, G, LOW, HIGH) * scale + shift
            weights = tl.reshape(tl.join(even, odd), (ROWS, 32)).to(x.dtype.element_ty)
            k = step * STEP + g * 32
            wanted = asked
            if PADDED:
                wanted = asked & (k + column < K)[:, None]
            total = tl.dot(weights, tl.load(x_at + k, mask=wanted, other=0.0), total)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    stored = inside[:, None] & asked
    place = out + token[None, :].to(tl.int64) * out_stride + row64[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def embedding_kernel(
    token_ids,  # [T]
    low,
    high,
    scales,
    supers,
    out,  # [T, K]
    N,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One step of one token in a program."""
    G: tl.constexpr = 2 if LOW == 8 else 4
    step = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids + token + tl.arange(0, 1)).to(tl.int64)
    inside = (row >= 0) & (row < N)
    height = tl.cast(N, tl.int64)
    w0, w1, w2, w3, above = scale_words(scales, supers, step, row, inside, height, NESTED, WORDS)
    element = tl.arange(0, 16)
    place = (step * height + row) * 16 + element
    lows = tl.load(low + place, mask=inside, other=0)
    highs = lows
    if HIGH > 0:
        highs = high_words(high, step, height, row, element, inside, HIGH)
    for g in tl.static_range(G):
        scale, minimum = scale_of(w0, w1, w2, w3, above, g, 0, NESTED, MINIMUM, WIDTH, ZERO)
        if WIDTH == 16:
            scale_2, minimum_2 = scale_of(w0, w1, w2, w3, above, g, 1, NESTED, MINIMUM, WIDTH, ZERO)
            scale = tl.where(element >= 8, scale_2, scale)
            minimum = tl.where(element >= 8, minimum_2, minimum)
        even = (float_code(lows, highs, g, 0, G, LOW, HIGH) - 2048.0) * scale + minimum
        odd = (float_code(lows, highs, g, 1, G, LOW, HIGH) - 2048.0) * scale + minimum
        k = (step * G + g) * 32 + tl.arange(0, 32)
        values = tl.reshape(tl.join(even, odd), (32,)).to(out.dtype.element_ty)
        tl.store(out + token * K + k, values, mask=(k < K) if PADDED else None)


def linear(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """For any number of rows, weights rounded first; see the contract in the package."""
    checked(x, matrix, bias, out)
    tokens = len(x)
    if out is None:
        out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    if capability(x.device) < TENSOR_CORES:
        return _linear_in_pieces(x, matrix, bias, out)
    constants = _large_constants(matrix.planes, matrix.columns, bias is not None, tokens)
    tiles = cdiv(matrix.rows, constants["ROWS"]) * cdiv(tokens, constants["TOKENS"])
    large_kernel[(tiles,)](
        x,
        *planes_of(matrix),
        bias,
        out,
        tokens,
        matrix.rows,
        matrix.columns,
        x.stride(0),
        out.stride(0),
        matrix.planes.steps(matrix.columns),
        **constants,
        num_warps=LARGE_WARPS,
        num_stages=stages(LARGE_STAGES),
        **OPTIONS,
    )
    return out


def _linear_in_pieces(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """The same numbers by way of the GPU's memory."""
    height = max(1, PIECE // matrix.columns)
    for first in range(0, matrix.rows, height):
        last = min(first + height, matrix.rows)
        weights = embedding(torch.arange(first, last, device=x.device), matrix, x.dtype)
        plain_linear(x, weights, None if bias is None else bias[first:last], out=out[:, first:last])
    return out


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """See the contract in the package."""
    assert token_ids.dim() == 1
    assert token_ids.is_contiguous()
    assert token_ids.dtype in (torch.int32, torch.int64)
    assert token_ids.device == matrix.device
    out = torch.empty((len(token_ids), matrix.columns), dtype=dtype, device=matrix.device)
    if len(token_ids):
        embedding_kernel[(len(token_ids), matrix.planes.steps(matrix.columns))](
            token_ids,
            *planes_of(matrix),
            out,
            matrix.rows,
            matrix.columns,
            **constants_of(matrix.planes, matrix.columns),
            num_warps=1,
            **OPTIONS,
        )
    return out


def _large_constants(planes: Planes, columns: int, bias: bool, tokens: int) -> dict[str, Any]:
    found = constants_of(planes, columns)
    wide = 32 if tokens <= 32 else 64 if tokens <= 64 else LARGE_TOKENS
    return {**found, "BIAS": bias, "ROWS": LARGE_ROWS, "TOKENS": wide, "TOGETHER": TOGETHER}


def _large_build(kind: PackedKind, dtype: str, columns: int, tokens: int, capabilities: tuple[int, ...]) -> Build:
    constants = _large_constants(PLANES[kind], columns, True, tokens)
    options = {"num_warps": LARGE_WARPS, "num_stages": LARGE_STAGES, "capabilities": capabilities}
    return build(large_kernel, kind, dtype, constants, **options)


AOT = (
    *(_large_build(kind, "bf16", 4096, 512, (90,)) for kind in PackedKind if kind.name.endswith("K")),
    *(_large_build(kind, "bf16", 4096, 512, (80, 100, 120)) for kind in (PackedKind.Q4_K, PackedKind.Q3_K)),
    _large_build(PackedKind.Q8_0, "fp16", 4096, 32, WITH_TENSOR_CORES),
    _large_build(PackedKind.Q5_1, "bf16", 4128, 64, WITH_TENSOR_CORES),
    build(embedding_kernel, PackedKind.Q6_K, "bf16", constants_of(PLANES[PackedKind.Q6_K], 4096), num_warps=1),
)
