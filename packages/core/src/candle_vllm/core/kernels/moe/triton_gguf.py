# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Experts with GGUF's quantised matrices on a GPU (step 6 of a request's life).

The experts' rows stand behind each other in one `GgufMatrix`. Programs share out the work as in `triton_plain.py`, and
read weights as `kernels/gguf_linear` does: with few pairs the codes meet x exactly and scales meet the sums of a group,
with many a tile of weights is scaled and rounded to x's dtype first.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix, Planes
from candle_vllm.core.kernels.gguf_linear.triton_codes import (
    float_code,
    high_words,
    pair_tile,
    scale_of,
    scale_words,
    spread,
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
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.triton_build import (
    OPTIONS,
    TENSOR_CORES,
    WITH_TENSOR_CORES,
    Build,
    capability,
    cdiv,
    next_power_of_2,
    stages,
)

# By tokens of a tile: rows of the matrix, warps, stages. Not measured yet. For few pairs no four warps with 64 rows,
# which would be given Hopper's own instruction.
FEW_TILES: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {8: (32, 1, 4), 16: (64, 2, 4), 32: (32, 2, 3), 64: (32, 4, 3)}
)
MANY_TILES: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {16: (128, 4, 3), 32: (128, 4, 3), 64: (128, 8, 3), 128: (128, 8, 3)}
)
# Without tensor cores: the largest that do not spill.
FEW_PLAIN: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {8: (32, 4, 1), 16: (32, 8, 1), 32: (32, 8, 1), 64: (32, 8, 1)}
)
MANY_PLAIN: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {16: (64, 4, 1), 32: (64, 8, 1), 64: (64, 8, 1), 128: (32, 8, 1)}
)
TOGETHER = 8  # tiles of rows that are taken with each other, so that their tokens stay in the cache


@triton.jit
def _codes(low, high, step, height, row, elements, inside, HIGH: tl.constexpr):
    """Elements of both planes for a step, as they are stored."""
    lows = tl.load(low + (step * height + row)[:, None] * 16 + elements, mask=inside[:, None], other=0)
    highs = lows
    if HIGH > 0:
        highs = high_words(high, step, height, row[:, None], elements, inside[:, None], HIGH)
    return lows, highs


@triton.jit(do_not_specialize=["T"])
def few_kernel(
    x,  # [T, K], or where not GATED [pairs, K]
    low,  # planes of X * N rows, or where GATED X * 2N
    high,
    scales,
    supers,
    bias,  # [X, N], or where GATED [X, 2N]
    experts,  # [T, TOP]
    out,  # [pairs, N]
    T,
    X,
    N,
    K,
    x_stride,
    steps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
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
    G: tl.constexpr = 2 if LOW == 8 else 4
    E: tl.constexpr = WIDTH // 2  # elements that meet x at a time
    dtype: tl.constexpr = x.dtype.element_ty
    MAGIC: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    OFFSET: tl.constexpr = MAGIC * 17 if LOW == 8 else MAGIC
    asked = pair >= 0
    pair = pair.to(tl.int64)
    tile = tl.program_id(0)
    row, inside = tile_rows(tile, expert, N, GATED, ROWS)
    height = tl.cast(N, tl.int64) * X * (2 if GATED else 1)
    element = tl.arange(0, E)
    column = tl.arange(0, WIDTH)
    source = tl.arange(0, TOKENS).to(tl.int64) if GATED else pair
    x_at = x + source[None, :] * x_stride + column[:, None]
    # Joined as the codes are: Triton 3.6 arranges K by that, and fetches x ahead only where one arrangement serves all.
    half = tl.full((ROWS, E), 1.0, tl.float32).to(dtype)
    ones = tl.reshape(tl.join(half, half), (ROWS, WIDTH))
    zeros = tl.zeros((ROWS, TOKENS), tl.float32)
    total = zeros
    # Triton fetches ahead only what a dot product takes, so a step's scales are asked for during the one before.
    n0, n1, n2, n3, next_above = scale_words(scales, supers, 0, row, inside, height, NESTED, WORDS)
    for step in tl.range(0, steps):
        w0, w1, w2, w3, above = n0, n1, n2, n3, next_above
        after = tl.minimum(step + 1, steps - 1)
        n0, n1, n2, n3, next_above = scale_words(scales, supers, after, row, inside, height, NESTED, WORDS)
        for part in tl.static_range(32 // WIDTH):
            elements = (part * E + element)[None, :]
            lows, highs = _codes(low, high, step, height, row, elements, inside, HIGH)
            lows = spread(lows, LOW)
            if HIGH > 0:
                highs = spread(highs, HIGH)
            for g in tl.static_range(G):
                scale, minimum = scale_of(w0, w1, w2, w3, above, g, part, NESTED, MINIMUM, WIDTH, ZERO)
                k = (step * G + g) * 32 + part * WIDTH
                right = asked[None, :]
                if PADDED:
                    right = right & (k + column < K)[:, None]
                tile_x = tl.load(x_at + k, mask=right, other=0.0)
                sums = tl.dot(ones, tile_x, zeros)
                dots = tl.dot(pair_tile(lows, highs, 0, g, LOW, HIGH, dtype, ROWS, WIDTH), tile_x, zeros)
                if LOW == 8:  # the upper four bits
                    dots += tl.dot(pair_tile(lows, highs, 4, g, LOW, HIGH, dtype, ROWS, WIDTH), tile_x, zeros) * 16
                minimum -= scale * OFFSET
                total = tl.fma(sums, tl.broadcast_to(minimum[:, None], (ROWS, TOKENS)), total)
                total = tl.fma(dots, tl.broadcast_to(scale[:, None], (ROWS, TOKENS)), total)
    total = finished(total, bias, row, inside, GATED, ACT, ROWS, TOKENS)
    store_tile(out, total, tile, pair, asked, N, ROWS // 2 if GATED else ROWS)


@triton.jit(do_not_specialize=["blocks"])
def many_kernel(
    x,  # where GATED [T, K], else [places, K]
    low,  # as above
    high,
    scales,
    supers,
    bias,
    order,  # [pairs]
    table,  # [3, blocks]
    out,  # where GATED [places, N], else [pairs, N]
    blocks,
    X,
    N,
    K,
    x_stride,
    steps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
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
    G: tl.constexpr = 2 if LOW == 8 else 4
    asked, at, pair = block_pairs(order, table, block, blocks, TOKENS)
    source = pair // TOP if GATED else at
    row, inside = tile_rows(tile, expert, N, GATED, ROWS)
    height = tl.cast(N, tl.int64) * X * (2 if GATED else 1)
    element = tl.arange(0, 16)
    column = tl.arange(0, 32)
    x_at = x + source[None, :] * x_stride + column[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps):
        w0, w1, w2, w3, above = scale_words(scales, supers, step, row, inside, height, NESTED, WORDS)
        lows, highs = _codes(low, high, step, height, row, element[None, :], inside, HIGH)
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
            k = (step * G + g) * 32
            right = asked[None, :]
            if PADDED:
                right = right & (k + column < K)[:, None]
            total = tl.dot(weights, tl.load(x_at + k, mask=right, other=0.0), total)
    total = finished(total, bias, row, inside, GATED, ACT, ROWS, TOKENS)
    store_tile(out, total, tile, at if GATED else pair, asked, N, ROWS // 2 if GATED else ROWS)


def few(
    x: torch.Tensor,
    matrix: GgufMatrix,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    out: torch.Tensor,
    sizes: MoeSizes,
    gate: str | None,
) -> None:
    """out [pairs, N] from x [T, K] where `gate` names an activation, else from x [pairs, K]."""
    tokens = next(size for size in FEW_TILES if sizes.tokens <= size)
    tile = _tile(tokens, capability(x.device), few=True)
    constants = _constants(matrix.planes, matrix.columns, sizes.top_k, gate, tokens, tile)
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
        x.stride(0),
        matrix.planes.steps(matrix.columns),
        SLOTS=next_power_of_2(sizes.top_k),
        **constants,
        **_options(tile),
        **OPTIONS,
    )


def many(
    x: torch.Tensor,
    matrix: GgufMatrix,
    bias: torch.Tensor | None,
    blocks: Blocks,
    out: torch.Tensor,
    sizes: MoeSizes,
    gate: str | None,
) -> None:
    """out [places, N] from x [T, K] where `gate` names an activation, else out [pairs, N] from x [places, K]."""
    tile = _tile(blocks.most, capability(x.device), few=False)
    constants = _constants(matrix.planes, matrix.columns, sizes.top_k, gate, blocks.most, tile)
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
        x.stride(0),
        matrix.planes.steps(matrix.columns),
        TOGETHER=TOGETHER,
        **constants,
        **_options(tile),
        **OPTIONS,
    )


def _planes_of(x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    assert matrix.device == x.device
    assert bias is None or (bias.is_contiguous() and bias.device == x.device)
    return matrix.low, matrix.high, matrix.scales, matrix.supers, bias


def _tile(tokens: int, capability: int, *, few: bool) -> tuple[int, int, int]:
    tables = (FEW_TILES, MANY_TILES) if capability >= TENSOR_CORES else (FEW_PLAIN, MANY_PLAIN)
    return tables[0 if few else 1][tokens]


def _constants(
    planes: Planes, columns: int, top_k: int, gate: str | None, tokens: int, tile: tuple[int, int, int]
) -> dict[str, Any]:
    layout, rows = planes.layout, tile[0]
    return {
        "LOW": planes.low,
        "HIGH": planes.high,
        "WORDS": planes.words,
        "WIDTH": layout.width,
        "NESTED": layout.nested,
        "MINIMUM": layout.minimum,
        "ZERO": layout.zero,
        "PADDED": columns % planes.step != 0,
        "TOP": top_k,
        "GATED": gate is not None,
        "ACT": activation_number(gate),
        "TOKENS": tokens,
        "ROWS": rows,
    }


def _options(tile: tuple[int, int, int]) -> dict[str, int]:
    _, warps, deep = tile
    return {"num_warps": warps, "num_stages": stages(deep)}


def _build(
    kernel: Any,
    kind: PackedKind,
    gate: str | None,
    tokens: int,
    capabilities: tuple[int, ...] = WITH_TENSOR_CORES,
    bias: bool = False,
) -> Build:
    planes, tile = PLANES[kind], _tile(tokens, capabilities[0], few=kernel is few_kernel)
    elements = {1: "*i16", 2: "*i16", 4: "*i32", 8: "*i32"}
    types = {"low": elements[planes.low]} | dict.fromkeys(("scales", "experts", "order", "table"), "*i32")
    types |= dict.fromkeys(("T", "X", "N", "K", "x_stride", "steps", "blocks"), "i32")
    types |= dict.fromkeys(("x", "out"), "*bf16")
    if bias:
        types["bias"] = "*fp32"
    if planes.high:
        types["high"] = elements[planes.high]
    if planes.layout.nested:
        types["supers"] = "*i32"
    extra = {"SLOTS": 8} if kernel is few_kernel else {"TOGETHER": TOGETHER}
    missing = {name: None for name in ("high", "supers", "bias") if name not in types}
    return Build(
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types},
        {**_constants(planes, 2048, 8, gate, tokens, tile), **extra, **missing},
        **_options(tile),
        aligned=("N", "K", "x_stride"),
        label=f"{kind.name}x{tokens}{'-' + gate if gate else ''}{'-bias' if bias else ''}",
        capabilities=capabilities,
    )


_HOPPER, _TURING = (90,), (75,)

AOT = (
    *(_build(few_kernel, kind, "silu", 16, _HOPPER) for kind in PackedKind),
    _build(few_kernel, PackedKind.Q4_K, "silu", 8),
    _build(few_kernel, PackedKind.Q6_K, None, 8),
    _build(few_kernel, PackedKind.Q4_K, "gelu_tanh", 32),
    _build(few_kernel, PackedKind.Q4_K, "silu", 64, _HOPPER),
    _build(few_kernel, PackedKind.Q5_K, None, 64, _HOPPER),
    *(_build(many_kernel, kind, "silu", 128, _HOPPER) for kind in PackedKind),
    *(_build(many_kernel, PackedKind.Q4_K, "silu", tokens) for tokens in MANY_TILES),
    *(_build(many_kernel, PackedKind.Q6_K, None, tokens) for tokens in (16, 128)),
    _build(few_kernel, PackedKind.Q5_0, "swiglu_oai", 16, bias=True),
    _build(few_kernel, PackedKind.Q5_0, None, 8, bias=True),
    _build(many_kernel, PackedKind.Q5_0, "swiglu_oai", 128, bias=True),
    *(_build(few_kernel, kind, "silu", 8, _TURING) for kind in PackedKind),
    *(_build(few_kernel, PackedKind.Q4_K, "gelu_tanh", tokens, _TURING) for tokens in (16, 32, 64)),
    *(_build(many_kernel, kind, "silu", 128, _TURING) for kind in PackedKind),
    *(_build(many_kernel, PackedKind.Q4_K, None, tokens, _TURING) for tokens in (16, 32, 64)),
    _build(few_kernel, PackedKind.Q5_0, "swiglu_oai", 16, _TURING, bias=True),
)
