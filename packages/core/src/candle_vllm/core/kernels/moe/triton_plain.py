# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Experts with bfloat16 or float16 matrices on a GPU (step 6 of a request's life).

Few pairs (decoding): a program takes some rows of one expert's matrix and every token that asked for that expert. There
is a program for each pair; those whose expert an earlier pair has are done at once. So weights are read once, and
nothing has to be sorted. With one or two warps, Hopper too uses the plain tensor instructions, whose results do not
depend on the number of tokens.

Many pairs: a program takes some rows of one expert's matrix and a block of its pairs. The weights are the left factor,
so that small blocks of tokens fill the tensor cores as well as large ones, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

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
    TENSOR_CORES,
    Build,
    capability,
    cdiv,
    next_power_of_2,
    stages,
)

# By tokens of a tile: rows of the matrix, numbers along K, warps, stages. Not measured yet.
FEW_TILES: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {8: (32, 128, 1, 4), 16: (32, 128, 1, 4), 32: (64, 64, 2, 4), 64: (64, 64, 2, 4)}
)
MANY_TILES: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {16: (128, 64, 4, 4), 32: (128, 64, 4, 4), 64: (128, 64, 4, 4), 128: (256, 64, 8, 3)}
)
_SERVERS = (80, 90, 100)  # on others the largest tile leaves no room for a second block, and spills
_OTHER_MANY = (128, 64, 8, 3)
# Without tensor cores: the largest that do not spill.
FEW_PLAIN: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {8: (32, 32, 2, 1), 16: (32, 32, 4, 1), 32: (32, 32, 8, 1), 64: (32, 32, 8, 1)}
)
MANY_PLAIN: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {16: (64, 32, 4, 1), 32: (64, 32, 8, 1), 64: (64, 32, 8, 1), 128: (32, 32, 8, 1)}
)
TOGETHER = 8  # tiles of rows that are taken with each other, so that their tokens stay in the cache


@triton.jit
def _product(
    x,  # [.., K]
    weight,  # [.., K] contiguous
    source,  # rows of x, int64 [TOKENS], where `asked`
    asked,
    row,  # rows of weight, int64 [ROWS], where `inside`
    inside,
    K,
    x_stride,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows of the matrix times rows of x, fp32 [ROWS, TOKENS]."""
    column = tl.arange(0, STEP)
    x_at = x + source[None, :] * x_stride + column[:, None]
    weight_at = weight + row[:, None] * K + column[None, :]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in tl.range(0, K, STEP):
        left = inside[:, None]
        right = asked[None, :]
        if PADDED:
            left = left & (k + column < K)[None, :]
            right = right & (k + column < K)[:, None]
        weights = tl.load(weight_at + k, mask=left, other=0.0)
        total = tl.dot(weights, tl.load(x_at + k, mask=right, other=0.0), total)
    return total


@triton.jit(do_not_specialize=["T"])
def few_kernel(
    x,  # [T, K], or where not GATED [pairs, K]
    weight,  # [X, N, K], or where GATED [X, 2N, K], contiguous
    bias,  # [X, N] or [X, 2N]
    experts,  # [T, TOP]
    out,  # [pairs, N]
    T,
    X,
    N,
    K,
    x_stride,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    expert, wanted, pair = few_pairs(experts, tl.program_id(1), T, X, TOP, SLOTS, TOKENS)
    if not wanted:
        return
    asked = pair >= 0
    pair = pair.to(tl.int64)
    tile = tl.program_id(0)
    row, inside = tile_rows(tile, expert, N, GATED, ROWS)
    source = tl.arange(0, TOKENS).to(tl.int64) if GATED else pair
    total = _product(x, weight, source, asked, row, inside, K, x_stride, PADDED, TOKENS, ROWS, STEP)
    total = finished(total, bias, row, inside, GATED, ACT, ROWS, TOKENS)
    store_tile(out, total, tile, pair, asked, N, ROWS // 2 if GATED else ROWS)


@triton.jit(do_not_specialize=["blocks"])
def many_kernel(
    x,  # where GATED [T, K], else [places, K]
    weight,  # as above
    bias,
    order,  # [pairs]
    table,  # [3, blocks]
    out,  # where GATED [places, N], else [pairs, N]
    blocks,
    N,
    K,
    x_stride,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    block, tile = tile_of(tl.program_id(0), blocks, tl.cdiv(N, ROWS // 2 if GATED else ROWS), TOGETHER)
    expert = tl.load(table + block).to(tl.int64)
    if expert < 0:
        return
    asked, place, pair = block_pairs(order, table, block, blocks, TOKENS)
    source = pair // TOP if GATED else place
    row, inside = tile_rows(tile, expert, N, GATED, ROWS)
    total = _product(x, weight, source, asked, row, inside, K, x_stride, PADDED, TOKENS, ROWS, STEP)
    total = finished(total, bias, row, inside, GATED, ACT, ROWS, TOKENS)
    store_tile(out, total, tile, place if GATED else pair, asked, N, ROWS // 2 if GATED else ROWS)


def few(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    out: torch.Tensor,
    sizes: MoeSizes,
    gate: str | None,
) -> None:
    """out [pairs, N] from x [T, K] where `gate` names an activation, else from x [pairs, K]."""
    _check(x, weight, bias)
    tokens = few_tokens(sizes.tokens)
    tile = _tile(tokens, capability(x.device), few=True)
    constants = _constants(weight.shape[2], sizes.top_k, gate, tokens, tile)
    rows = out.shape[1]
    few_kernel[(cdiv(rows, tile_height(constants)), sizes.pairs)](
        x,
        weight,
        bias,
        experts,
        out,
        sizes.tokens,
        sizes.experts,
        rows,
        weight.shape[2],
        x.stride(0),
        SLOTS=next_power_of_2(sizes.top_k),
        **constants,
        **_options(tile),
        **OPTIONS,
    )


def many(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: Blocks,
    out: torch.Tensor,
    sizes: MoeSizes,
    gate: str | None,
) -> None:
    """out [places, N] from x [T, K] where `gate` names an activation, else out [pairs, N] from x [places, K]."""
    _check(x, weight, bias)
    tokens = blocks.most
    tile = _tile(tokens, capability(x.device), few=False)
    constants = _constants(weight.shape[2], sizes.top_k, gate, tokens, tile)
    rows = out.shape[1]
    many_kernel[(blocks.count * cdiv(rows, tile_height(constants)),)](
        x,
        weight,
        bias,
        blocks.order,
        blocks.table,
        out,
        blocks.count,
        rows,
        weight.shape[2],
        x.stride(0),
        TOGETHER=TOGETHER,
        **constants,
        **_options(tile),
        **OPTIONS,
    )


def few_tokens(tokens: int) -> int:
    """Tokens of a tile where there are few pairs."""
    return next(size for size in FEW_TILES if tokens <= size)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    assert weight.is_contiguous()
    assert bias is None or (bias.is_contiguous() and bias.device == x.device)
    assert weight.dtype == x.dtype
    assert weight.device == x.device


def _tile(tokens: int, capability: int, *, few: bool) -> tuple[int, int, int, int]:
    if not few and tokens == 128 and capability >= TENSOR_CORES and capability not in _SERVERS:
        return _OTHER_MANY
    tables = (FEW_TILES, MANY_TILES) if capability >= TENSOR_CORES else (FEW_PLAIN, MANY_PLAIN)
    return tables[0 if few else 1][tokens]


def _constants(
    columns: int, top_k: int, gate: str | None, tokens: int, tile: tuple[int, int, int, int]
) -> dict[str, Any]:
    rows, step, *_ = tile
    return {
        "TOP": top_k,
        "GATED": gate is not None,
        "ACT": activation_number(gate),
        "PADDED": columns % step != 0,
        "TOKENS": tokens,
        "ROWS": rows,
        "STEP": step,
    }


def _options(tile: tuple[int, int, int, int]) -> dict[str, int]:
    *_, warps, deep = tile
    return {"num_warps": warps, "num_stages": stages(deep)}


def _build(
    kernel: Any,
    dtype: str,
    columns: int,
    gate: str | None,
    tokens: int,
    bias: str | None = None,
    *,
    capabilities: tuple[int, ...] = _SERVERS,
) -> Build:
    tile = _tile(tokens, capabilities[0], few=kernel is few_kernel)
    extra = {"SLOTS": 8} if kernel is few_kernel else {"TOGETHER": TOGETHER}
    types = dict.fromkeys(("x", "weight", "out"), f"*{dtype}") | dict.fromkeys(("experts", "order", "table"), "*i32")
    if bias is not None:
        types["bias"] = f"*{bias}"
    types |= dict.fromkeys(("T", "X", "N", "K", "x_stride", "blocks"), "i32")
    return Build(
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types},
        {**_constants(columns, 8, gate, tokens, tile), **extra, **({} if bias else {"bias": None})},
        **_options(tile),
        aligned=("N", "K", "x_stride"),
        label=f"{dtype}-{columns}x{tokens}{'-' + gate if gate else ''}{'-bias' if bias else ''}",
        capabilities=capabilities,
    )


AOT = (
    *(_build(few_kernel, "bf16", 2048, gate, tokens) for gate in ("silu", None) for tokens in (8, 16, 64)),
    *(_build(many_kernel, "bf16", 2048, gate, tokens) for gate in ("silu", None) for tokens in MANY_TILES),
    _build(few_kernel, "fp16", 1440, "gelu_tanh", 32),
    _build(many_kernel, "fp16", 1440, "gelu_tanh", 128),
    _build(few_kernel, "bf16", 2880, "swiglu_oai", 16, "fp32"),
    _build(many_kernel, "bf16", 2880, "swiglu_oai", 128, "fp32"),
    _build(few_kernel, "bf16", 2880, None, 8, "fp32"),
    *(_build(few_kernel, "fp16", 2048, "silu", tokens, capabilities=(75,)) for tokens in FEW_PLAIN),
    *(_build(many_kernel, "fp16", 2048, "silu", tokens, capabilities=(75,)) for tokens in MANY_PLAIN),
    *(_build(few_kernel, "bf16", 2048, "silu", tokens, capabilities=(120,)) for tokens in FEW_TILES),
    *(_build(many_kernel, "bf16", 2048, "silu", tokens, capabilities=(120,)) for tokens in MANY_TILES),
    _build(many_kernel, "fp16", 1440, "gelu_tanh", 128, capabilities=(120,)),
    _build(many_kernel, "bf16", 2880, "swiglu_oai", 128, "fp32", capabilities=(120,)),
    _build(few_kernel, "fp16", 2880, "swiglu_oai", 16, "fp32", capabilities=(75,)),
    _build(many_kernel, "fp16", 2880, None, 128, "fp32", capabilities=(75,)),
)
