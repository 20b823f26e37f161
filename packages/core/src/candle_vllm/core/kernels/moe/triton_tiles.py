# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Device functions that the kernels of experts share: which rows and tokens a program has, and the gate; inside
step 6 of a request's life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import triton
import triton.language as tl

from candle_vllm.core.kernels.moe.arguments import Activation


@triton.jit
def tile_rows(tile, expert, N, GATED: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile of an expert's matrix: the rows in the matrix of all experts, int64, and which of them there are.

    GATED: eight rows of the gate and the eight of up that meet them take turns, as the tensor cores' registers do.
    """
    if GATED:
        inner = tl.arange(0, ROWS)
        place = tile * (ROWS // 2) + inner // 16 * 8 + inner % 8
        return (expert * 2 + inner // 8 % 2) * N + place, place < N
    place = tile * ROWS + tl.arange(0, ROWS)
    return expert * N + place, place < N


@triton.jit
def finished(
    total, bias, row, inside, GATED: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
):
    """A tile's sums [ROWS, TOKENS], or act(gate) * up [ROWS / 2, TOKENS] of them; `row` and `inside` as `tile_rows`."""
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), 0, 2, 3, 1))
        if ACT == 2:  # gpt-oss; NaN stays NaN
            gate = tl.where(gate > 7.0, 7.0, gate)
            up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        inner = gate
        if ACT == 2:
            inner = 1.702 * gate
        if ACT == 1:
            # 0.5 (1 + tanh(z)) is the sigmoid of 2z; 2 sqrt(2 / pi) = 1.5957...
            inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        total = tl.reshape(gate / (1.0 + tl.exp(-inner)) * up, (ROWS // 2, TOKENS))
    return total


@triton.jit
def store_tile(out, total, tile, target, asked, N, HEIGHT: tl.constexpr):
    """Writes a finished tile [HEIGHT, TOKENS] to the columns of the rows `target` of out [.., N]."""
    row = tile * HEIGHT + tl.arange(0, HEIGHT)
    there = (row < N)[:, None] & asked[None, :]
    tl.store(out + target[None, :] * N + row[:, None], total.to(out.dtype.element_ty), mask=there)


@triton.jit
def few_pairs(experts, pair, T, X, TOP: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr):
    """Of a pair of few: its expert; whether the expert is valid and no pair before asks for it; and for each token the
    token's pair with that expert, or -1."""
    expert = tl.load(experts + pair)
    token = tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    number = token * TOP + slot
    same = tl.load(experts + number, mask=(token < T) & (slot < TOP), other=-1) == expert
    first = tl.min(tl.min(tl.where(same, number, pair), 1), 0)
    wanted = (expert >= 0) & (expert < X) & (first == pair)
    return expert.to(tl.int64), wanted, tl.max(tl.where(same, number, -1), 1)


@triton.jit
def tile_of(program, blocks, row_tiles, TOGETHER: tl.constexpr):
    """A program's block and its tile of rows: programs that run at the same time share a few of both."""
    bunch = program // (TOGETHER * blocks)
    inner = program % (TOGETHER * blocks)
    height = tl.minimum(row_tiles - bunch * TOGETHER, TOGETHER)
    return inner // height, bunch * TOGETHER + inner % height


@triton.jit
def block_pairs(order, table, block, blocks, TOKENS: tl.constexpr):
    """Of a block of one expert: which of its places are taken, their numbers in the order, and their pairs."""
    place = tl.load(table + blocks + block) + tl.arange(0, TOKENS)
    asked = tl.arange(0, TOKENS) < tl.load(table + 2 * blocks + block)
    pair = tl.load(order + place, mask=asked, other=0)
    return asked, place.to(tl.int64), pair.to(tl.int64)


def activation_number(gate: str | None) -> int:
    """The constant ACT of `finished`."""
    return 0 if gate is None else get_args(Activation).index(gate)


def tile_height(constants: Mapping[str, Any]) -> int:
    """Rows of the result that a tile makes."""
    return constants["ROWS"] // 2 if constants["GATED"] else constants["ROWS"]
