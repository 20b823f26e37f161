# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Experts with matrices of floats of 8 or 4 bits on a GPU (step 6 of a request's life).

The experts' rows stand behind each other in one `GroupMatrix`. Programs share out the work as in `triton_plain.py`, and
read weights as `kernels/group_linear` does: with few pairs the floats meet x exactly and scales meet sums, with many a
tile of weights is scaled and rounded to x's dtype first.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, Numbers
from candle_vllm.core.kernels.group_linear.triton_codes import (
    constants_of,
    float_tile,
    inner_words,
    scale_and_zero,
    scale_type,
    scaled_tile,
    step_words,
    without_numbers,
)
from candle_vllm.core.kernels.moe.arguments import MoeSizes
from candle_vllm.core.kernels.moe.triton_sort import Blocks
from candle_vllm.core.kernels.moe.triton_tiles import (
    activation_number,
    block_pairs,
    few_pairs,
    finished,
    store_tile,
    tile_height,
    tile_of,
    tile_rows,
)
from candle_vllm.core.kernels.triton_build import (
    OPTIONS,
    WITH_TENSOR_CORES,
    Build,
    cdiv,
    next_power_of_2,
    stages,
)

# By tokens of a tile: rows of the matrix, warps, stages. Not measured yet. For few pairs no four warps with 64 rows,
# which would be given Hopper's own instruction.
FEW_TILES: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {8: (32, 1, 4), 16: (64, 2, 4), 32: (32, 2, 4), 64: (32, 4, 4)}
)
MANY_TILES: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {16: (128, 4, 3), 32: (128, 4, 3), 64: (128, 8, 3), 128: (128, 8, 3)}
)
TOGETHER = 8  # tiles of rows that are taken with each other, so that their tokens stay in the cache


@triton.jit(do_not_specialize=["T"])
def few_kernel(
    x,  # [T, K], or where not GATED [pairs, K]
    codes,  # planes of X * N rows, or where GATED X * 2N
    scales,
    inner,
    bias,  # [X, N], or where GATED [X, 2N]
    experts,  # [T, TOP]
    out,  # [pairs, N]
    T,
    X,
    N,
    K,
    group,
    x_stride,
    steps,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    FLOATS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    expert, wanted, pair = few_pairs(experts, tl.program_id(1), T, X, TOP, SLOTS, TOKENS)
    if not wanted:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    asked = pair >= 0
    pair = pair.to(tl.int64)
    tile = tl.program_id(0)
    row, inside = tile_rows(tile, expert, N, GATED, ROWS)
    height = tl.cast(N, tl.int64) * X * (2 if GATED else 1)
    element = tl.arange(0, 16)[None, :]
    column = tl.arange(0, 32)
    source = tl.arange(0, TOKENS).to(tl.int64) if GATED else pair
    x_at = x + source[None, :] * x_stride + column[:, None]
    zeros = tl.zeros((ROWS, TOKENS), tl.float32)
    total = zeros
    # Triton fetches ahead only what a dot product takes, so a step's scales are asked for during the one before.
    n0, n1, n2, n3 = step_words(scales, 0, group, row, inside, height, PARTS, UNIT)
    next_0, next_1 = inner_words(inner, 0, row, inside, height, FLOATS)
    for step in tl.range(0, steps):
        w0, w1, w2, w3 = n0, n1, n2, n3
        i0, i1 = next_0, next_1
        after = tl.minimum(step + 1, steps - 1)
        n0, n1, n2, n3 = step_words(scales, after, group, row, inside, height, PARTS, UNIT)
        next_0, next_1 = inner_words(inner, after, row, inside, height, FLOATS)
        words = tl.load(codes + (step * height + row)[:, None] * 16 + element, mask=inside[:, None], other=0)
        for unit in tl.static_range(PARTS // UNIT):
            scale, _ = scale_and_zero(w0, w1, w2, w3, unit, False, 0.0, False, FLOATS)
            dots = zeros
            for part in tl.static_range(UNIT):
                k = step * (PARTS * 32) + (unit * UNIT + part) * 32
                right = asked[None, :]
                if PADDED:
                    right = right & (k + column < K)[:, None]
                tile_x = tl.load(x_at + k, mask=right, other=0.0)
                floats = float_tile(words, i0, i1, unit * UNIT + part, FLOATS, dtype, ROWS)
                dots = tl.dot(floats, tile_x, dots)
            total = tl.fma(dots, tl.broadcast_to(scale[:, None], (ROWS, TOKENS)), total)
    total = finished(total, bias, row, inside, GATED, ACT, ROWS, TOKENS)
    store_tile(out, total, tile, pair, asked, N, ROWS // 2 if GATED else ROWS)


@triton.jit(do_not_specialize=["blocks"])
def many_kernel(
    x,  # where GATED [T, K], else [places, K]
    codes,  # as above
    scales,
    inner,
    bias,
    order,  # [pairs]
    table,  # [3, blocks]
    out,  # where GATED [places, N], else [pairs, N]
    blocks,
    X,
    N,
    K,
    group,
    x_stride,
    steps,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    FLOATS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    block, tile = tile_of(tl.program_id(0), blocks, tl.cdiv(N, ROWS // 2 if GATED else ROWS), TOGETHER)
    expert = tl.load(table + block).to(tl.int64)
    if expert < 0:
        return
    asked, at, pair = block_pairs(order, table, block, blocks, TOKENS)
    source = pair // TOP if GATED else at
    row, inside = tile_rows(tile, expert, N, GATED, ROWS)
    height = tl.cast(N, tl.int64) * X * (2 if GATED else 1)
    element = tl.arange(0, 16)[None, :]
    column = tl.arange(0, 32)
    x_at = x + source[None, :] * x_stride + column[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps):
        w0, w1, w2, w3 = step_words(scales, step, group, row, inside, height, PARTS, UNIT)
        i0, i1 = inner_words(inner, step, row, inside, height, FLOATS)
        words = tl.load(codes + (step * height + row)[:, None] * 16 + element, mask=inside[:, None], other=0)
        for p in tl.static_range(PARTS):
            scale, _ = scale_and_zero(w0, w1, w2, w3, p // UNIT, False, 0.0, False, FLOATS)
            k = step * (PARTS * 32) + p * 32
            right = asked[None, :]
            if PADDED:
                right = right & (k + column < K)[:, None]
            weights = scaled_tile(words, i0, i1, scale, p, FLOATS, x.dtype.element_ty, ROWS)
            total = tl.dot(weights, tl.load(x_at + k, mask=right, other=0.0), total)
    total = finished(total, bias, row, inside, GATED, ACT, ROWS, TOKENS)
    store_tile(out, total, tile, at if GATED else pair, asked, N, ROWS // 2 if GATED else ROWS)


def few(
    x: torch.Tensor,
    matrix: GroupMatrix,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    out: torch.Tensor,
    sizes: MoeSizes,
    gate: str | None,
) -> None:
    """out [pairs, N] from x [T, K] where `gate` names an activation, else from x [pairs, K]."""
    tokens = next(size for size in FEW_TILES if sizes.tokens <= size)
    constants = _constants(matrix, sizes.top_k, gate, tokens, FEW_TILES)
    rows = out.shape[1]
    few_kernel[(cdiv(rows, tile_height(constants)), sizes.pairs)](
        x,
        *_planes_of(x, matrix, bias),
        experts,
        out,
        sizes.tokens,
        sizes.experts,
        rows,
        matrix.columns,
        matrix.group,
        x.stride(0),
        matrix.steps,
        SLOTS=next_power_of_2(sizes.top_k),
        **constants,
        **_options(tokens, FEW_TILES),
        **OPTIONS,
    )


def many(
    x: torch.Tensor,
    matrix: GroupMatrix,
    bias: torch.Tensor | None,
    blocks: Blocks,
    out: torch.Tensor,
    sizes: MoeSizes,
    gate: str | None,
) -> None:
    """out [places, N] from x [T, K] where `gate` names an activation, else out [pairs, N] from x [places, K]."""
    constants = _constants(matrix, sizes.top_k, gate, blocks.most, MANY_TILES)
    rows = out.shape[1]
    many_kernel[(blocks.count * cdiv(rows, tile_height(constants)),)](
        x,
        *_planes_of(x, matrix, bias),
        blocks.order,
        blocks.table,
        out,
        blocks.count,
        sizes.experts,
        rows,
        matrix.columns,
        matrix.group,
        x.stride(0),
        matrix.steps,
        TOGETHER=TOGETHER,
        **constants,
        **_options(blocks.most, MANY_TILES),
        **OPTIONS,
    )


def _planes_of(x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    assert matrix.numbers != "int", "experts of whole numbers come in GGUF's blocks"
    assert matrix.order is None
    assert matrix.device == x.device
    assert bias is None or (bias.is_contiguous() and bias.device == x.device)
    return matrix.codes, matrix.scales, matrix.inner, bias


def _constants(
    matrix: GroupMatrix, top_k: int, gate: str | None, tokens: int, tiles: Mapping[int, tuple[int, int, int]]
) -> dict[str, Any]:
    found = constants_of(matrix)
    return {name: found[name] for name in ("PARTS", "UNIT", "FLOATS", "PADDED")} | {
        "TOP": top_k,
        "GATED": gate is not None,
        "ACT": activation_number(gate),
        "TOKENS": tokens,
        "ROWS": tiles[tokens][0],
    }


def _options(tokens: int, tiles: Mapping[int, tuple[int, int, int]]) -> dict[str, int]:
    _, warps, deep = tiles[tokens]
    return {"num_warps": warps, "num_stages": stages(deep)}


def _build(
    kernel: Any,
    gate: str | None,
    tokens: int,
    capabilities: tuple[int, ...] = (90,),
    numbers: Numbers = "e4m3",
    group: int = 128,
) -> Build:
    tiles, bits = FEW_TILES if kernel is few_kernel else MANY_TILES, 4 if numbers == "e2m1" else 8
    matrix = without_numbers(bits, group, False, 2048, numbers)
    types = dict.fromkeys(("codes", "experts", "order", "table"), "*i32") | {"scales": scale_type(matrix)}
    types |= dict.fromkeys(("T", "X", "N", "K", "group", "x_stride", "steps", "blocks"), "i32")
    types |= dict.fromkeys(("x", "out"), "*bf16")
    missing = {"bias": None} if numbers == "e2m1" else {"bias": None, "inner": None}
    if numbers == "e2m1":
        types["inner"] = "*i32"
    extra = {"SLOTS": 8} if kernel is few_kernel else {"TOGETHER": TOGETHER}
    return Build(
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types},
        {**_constants(matrix, 8, gate, tokens, tiles), **extra, **missing},
        **_options(tokens, tiles),
        aligned=("N", "K", "group", "x_stride"),
        label=f"{numbers}-{group}x{tokens}{'-' + gate if gate else ''}",
        capabilities=capabilities,
    )


AOT = (
    _build(few_kernel, "silu", 8, WITH_TENSOR_CORES),
    _build(few_kernel, "gelu_tanh", 32, numbers="e5m2", group=2048),
    _build(few_kernel, "silu", 64),
    _build(many_kernel, "silu", 128, WITH_TENSOR_CORES),
    _build(many_kernel, None, 16),
    *(_build(few_kernel, "silu", tokens, numbers="e2m1", group=2048) for tokens in (16, 64)),
    _build(many_kernel, "silu", 128, numbers="e2m1", group=2048),
)
