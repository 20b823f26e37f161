# SPDX-License-Identifier: MIT
"""Mixture of experts on a GPU (step 6 of a request's life): gate and up with the activation, down, and the sum.

With few pairs there are three launches; with many four or five, because the pairs are sorted first. Every pair's result
is written separately, and results are added in the order of the token's experts, so no bit depends on the order of
programs.

Terms (pair, place): see the package. All experts' rows are in one matrix, one expert after another. A kernel gets a
product function for the storage format (`kernels/linear/triton_products.py`).

Few pairs (decoding): there is a program for each pair and each tile of some rows of an expert's matrix. It multiplies
the tile by every token that chose the pair's expert, or ends at once if an earlier pair has the same expert, or for a
pair without an expert. So weights are read once, and pairs are not sorted. No tile has 64 rows for four warps, so
Hopper too uses `mma.sync`, whose results do not depend on the number of tokens. Codes are multiplied by x exactly.

Many pairs: a program multiplies a tile by a block of its expert's pairs. The weights are the left factor, so small
blocks of tokens fill the tensor cores as well as large ones, with the same bits. Codes are first scaled and rounded to
x's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.layout import PLANES
from candle_vllm.core.kernels.linear.triton import Tile, tile_for, tile_of
from candle_vllm.core.kernels.linear.triton_products import Operand, exact, plain, rounded
from candle_vllm.core.kernels.matrices import DeviceMatrix, Stored
from candle_vllm.core.kernels.moe.arguments import FEW, Activation, Pairs, is_gated
from candle_vllm.core.kernels.moe.triton_sort import sort_pairs
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.silu_mul.triton import KINDS, gated_product
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability, cdiv, next_power_of_2, stages


class Tiles(NamedTuple):
    """Tiles in order of their number of tokens, for few pairs and for many pairs."""

    few: tuple[Tile, ...]
    many: tuple[Tile, ...]


# Not measured yet. Tiles for few pairs never have 64 rows for four warps, for which Hopper would use `wgmma`.
_ROUNDED = (Tile(16, 128, 4, 3), Tile(32, 128, 4, 3), Tile(64, 128, 8, 3), Tile(128, 128, 8, 3))
PLAIN = Tiles(
    (Tile(8, 32, 1, 4, 128), Tile(16, 32, 1, 4, 128), Tile(32, 64, 2, 4), Tile(64, 64, 2, 4)),
    (Tile(16, 128, 4, 4), Tile(32, 128, 4, 4), Tile(64, 128, 4, 4), Tile(128, 256, 8, 3)),
)
GGUF = Tiles((Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 32, 2, 3), Tile(64, 32, 4, 3)), _ROUNDED)
FLOATS = Tiles((Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 32, 2, 4), Tile(64, 32, 4, 4)), _ROUNDED)
_SERVERS = (80, 90, 100)  # on other GPUs, registers do not hold the largest tile of plain matrices
PLAIN_OTHERS = PLAIN._replace(many=(*PLAIN.many[:-1], Tile(128, 128, 8, 3)))
# Without tensor cores: the largest tiles that do not spill.
_MANY_SLOW = (Tile(16, 64, 4, 1, 32), Tile(32, 64, 8, 1, 32), Tile(64, 64, 8, 1, 32), Tile(128, 32, 8, 1, 32))
PLAIN_SLOW = Tiles(
    (Tile(8, 32, 2, 1, 32), Tile(16, 32, 4, 1, 32), Tile(32, 32, 8, 1, 32), Tile(64, 32, 8, 1, 32)), _MANY_SLOW
)
GGUF_SLOW = Tiles((Tile(8, 32, 4, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)), _MANY_SLOW)
# Tiles for codes that are looked up in a table, which takes registers.
TABLE = GGUF._replace(few=(*GGUF.few[:-1], Tile(64, 16, 4, 3)))
TABLE_SLOW = GGUF_SLOW._replace(few=(*GGUF_SLOW.few[:-1], Tile(64, 16, 8, 1)))
TOGETHER = 8  # tiles of rows whose programs run together, so that their tokens stay in the cache
_PART = 1024  # elements of a program of the sum; not measured yet


@triton.jit
def write_tile(
    x,
    source,  # rows of x, int64 [TOKENS]
    planes,  # see `Operand`
    bias,
    out,
    target,  # rows of out [.., N], int64 [TOKENS]
    asked,  # mask of the tokens
    tile,
    expert,
    X,
    N,
    K,
    pitch,
    x_stride,
    steps,
    PRODUCT: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write a tile of an expert's matrix times rows of x, after bias and activation.

    GATED: eight rows of gate alternate with the eight matching rows of up, as in the registers of the tensor cores; the
    result is act(gate) * up, half as many rows.
    """
    HEIGHT: tl.constexpr = ROWS // 2 if GATED else ROWS
    x_at = x + source[None, :] * x_stride
    if GATED:
        inner = tl.arange(0, ROWS)
        place = tile * (ROWS // 2) + inner // 16 * 8 + inner % 8
        row = (expert * 2 + inner // 8 % 2) * N + place
    else:
        place = tile * ROWS + tl.arange(0, ROWS)
        row = expert * N + place
    inside = place < N
    height = tl.cast(N, tl.int64) * X * (2 if GATED else 1)
    of_product = x_at, planes, row, inside, asked, height, K, pitch  # `tile` is a number here
    total = PRODUCT(of_product, 0, steps, steps, FORM, PADDED, False)
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), 0, 2, 3, 1))
        total = tl.reshape(gated_product(gate, up, ACT), (ROWS // 2, TOKENS))
    elif ACT == 8:
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
        total *= total
    elif ACT == 9:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    row = tile * HEIGHT + tl.arange(0, HEIGHT)
    there = (row < N)[:, None] & asked[None, :]
    tl.store(out + target[None, :] * N + row[:, None], total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["T"])
def few_kernel(
    x,  # [T, K], or if not FIRST [pairs, K]
    low,  # planes of X * N rows, or if GATED X * 2N, see `Operand`
    high,
    scales,
    supers,
    bias,  # [X, N], or if GATED [X, 2N]
    experts,  # [T, TOP]
    out,  # [pairs, N]
    T,
    X,
    N,
    K,
    pitch,
    x_stride,
    steps,
    PRODUCT: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    TOP: tl.constexpr,
    FIRST: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    own = tl.program_id(1)
    expert = tl.load(experts + own)
    token = tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    number = token * TOP + slot
    same = tl.load(experts + number, mask=(token < T) & (slot < TOP), other=-1) == expert
    first = tl.min(tl.min(tl.where(same, number, own), 1), 0)
    wanted = (expert >= 0) & (expert < X) & (first == own)  # no earlier pair has the expert
    expert = expert.to(tl.int64)
    pair = tl.max(tl.where(same, number, -1), 1)  # of each token, the pair with this expert, or -1
    if not wanted:
        return
    asked = pair >= 0
    pair = pair.to(tl.int64)
    tile = tl.program_id(0)
    source = tl.arange(0, TOKENS).to(tl.int64) if FIRST else pair
    planes = (low, high, scales, supers)
    write_tile(
        x, source, planes, bias, out, pair, asked, tile, expert, X, N, K, pitch, x_stride, steps,
        PRODUCT, FORM, PADDED, GATED, ACT, ROWS, TOKENS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def many_kernel(
    x,  # if FIRST [T, K], else [places, K]
    low,  # as above
    high,
    scales,
    supers,
    bias,
    order,  # [pairs]
    table,  # [3, blocks]
    out,  # if FIRST [places, N], else [pairs, N]
    blocks,
    X,
    N,
    K,
    pitch,
    x_stride,
    steps,
    PRODUCT: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    TOP: tl.constexpr,
    FIRST: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    tile, block = tile_of(tl.program_id(0), tl.cdiv(N, ROWS // 2 if GATED else ROWS), blocks, TOGETHER)
    expert = tl.load(table + block).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(table + blocks + block) + tl.arange(0, TOKENS)
    asked = tl.arange(0, TOKENS) < tl.load(table + 2 * blocks + block)
    pair = tl.load(order + place, mask=asked, other=0).to(tl.int64)
    place = place.to(tl.int64)
    source = pair // TOP if FIRST else place
    target = place if FIRST else pair
    planes = (low, high, scales, supers)
    write_tile(
        x, source, planes, bias, out, target, asked, tile, expert, X, N, K, pitch, x_stride, steps,
        PRODUCT, FORM, PADDED, GATED, ACT, ROWS, TOKENS,
    )  # fmt: skip


@triton.jit
def sum_kernel(
    results,  # [T, TOP, E]
    weights,  # [T, TOP]
    experts,  # [T, TOP]
    y,  # [T, E]
    X,
    E,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < E
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP):
        pair = token * TOP + j + tl.arange(0, 1)
        expert = tl.load(experts + pair)
        valid = (expert >= 0) & (expert < X)
        weight = tl.load(weights + pair, mask=valid, other=0.0)
        part = tl.load(results + pair * E + at, mask=inside & valid, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(y + token * E + at, total.to(y.dtype.element_ty), mask=inside)


def expert_linear(
    x: torch.Tensor,
    matrix: DeviceMatrix,
    pairs: Pairs,
    bias: torch.Tensor | None,
    activation: Activation | None,
    invariant: bool,
) -> torch.Tensor:
    """See the contract in the package. Results have a row for each pair, or, for many pairs with an activation, for
    each place."""
    stored, device = matrix.stored, x.device
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert x.stride(1) == 1 or x.shape[1] == 1, "the elements of a row must be contiguous"
    assert pairs.experts.is_contiguous()
    assert pairs.experts.device == device
    assert bias is None or (bias.is_contiguous() and bias.device == device)
    assert stored != "codes", "experts with integer codes are stored as GGUF blocks"
    gated = is_gated(activation)
    rows = matrix.rows // pairs.count // (2 if gated else 1)
    out = torch.empty((pairs.number, rows), dtype=x.dtype, device=device)
    if not pairs.tokens:
        return out
    tiles, few = _tiles(stored, matrix.kind, capability(device)), pairs.number <= FEW and not invariant
    if not few and pairs.blocks is None:
        # A block has about the average number of pairs of an expert. Not measured yet.
        pairs.blocks = sort_pairs(pairs, tile_for(pairs.number // pairs.count, PLAIN.many).tokens)
    blocks = pairs.blocks
    tile = tile_for(pairs.tokens, tiles.few) if few else tile_for(blocks.most, tiles.many)
    operand = matrix.operand(tile.columns)
    assert operand.planes[0].device == device
    assert operand.planes[0].is_contiguous()
    assert stored != "plain" or operand.planes[0].dtype == x.dtype
    row_tiles = cdiv(rows, tile.rows // 2 if gated else tile.rows)
    if few:
        launch, where, counted = few_kernel[(row_tiles, pairs.number)], (pairs.experts,), pairs.tokens
        extra = {"SLOTS": next_power_of_2(pairs.top_k)}
    else:
        launch, where, counted = many_kernel[(blocks.count * row_tiles,)], (blocks.order, blocks.table), blocks.count
        extra = {"TOGETHER": TOGETHER}
    launch(
        x,
        *operand.planes,
        bias,
        *where,
        out,
        counted,
        pairs.count,
        rows,
        operand.columns,
        operand.pitch,
        x.stride(0),
        operand.steps,
        **extra,
        **_constants(operand, _arithmetic(stored, few=few), tile, pairs.top_k, activation),
        num_warps=tile.warps,
        num_stages=stages(tile.stages),
        **OPTIONS,
    )
    return out


def combine(results: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """See the contract in the package."""
    weights, experts, width = pairs.weights, pairs.experts, results.shape[1]
    assert weights.is_contiguous()
    assert weights.device == results.device
    y = torch.empty((pairs.tokens, width), dtype=results.dtype, device=results.device)
    if pairs.tokens:
        constants = {"TOP": pairs.top_k, "BLOCK": _PART}
        grid = (pairs.tokens, cdiv(width, _PART))
        sum_kernel[grid](results, weights, experts, y, pairs.count, width, **constants, num_warps=4, **OPTIONS)
    return y


def _tiles(stored: Stored, kind: str, capability: int) -> Tiles:
    if stored == "floats":
        return FLOATS
    if stored == "gguf" and PLANES[PackedKind[kind]].layout.values is not None:
        return TABLE_SLOW if capability < TENSOR_CORES else TABLE
    if capability < TENSOR_CORES:
        return PLAIN_SLOW if stored == "plain" else GGUF_SLOW
    if stored == "gguf":
        return GGUF
    return PLAIN if capability in _SERVERS else PLAIN_OTHERS


def _arithmetic(stored: Stored, *, few: bool) -> Any:
    return plain if stored == "plain" else exact if few else rounded


def _constants(operand: Operand, product: Any, tile: Tile, top_k: int, gate: Activation | None) -> dict[str, Any]:
    return {
        "PRODUCT": product,
        "FORM": operand.form,
        "PADDED": operand.padded,
        "TOP": top_k,
        "FIRST": gate is not None,
        "GATED": is_gated(gate),
        "ACT": 0 if gate is None else (*KINDS, "relu2", "gelu").index(gate),
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
    }
