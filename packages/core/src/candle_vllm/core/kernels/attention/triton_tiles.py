# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""What the attention kernels of the GPU share: reading a tile of the paged cache, and one step of the online softmax.

A tile is N neighbouring positions of one sequence and one key-value head, the first a multiple of N. What happens to a
row of queries in a tile depends on that row and the tile alone: a tile of which it sees nothing leaves its state as it
is, to the bit. So its result does not depend on the rows and sequences that are computed beside it.
Source: Dao, 2023, arXiv:2307.08691 (FlashAttention-2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.triton_items import first_seen
from candle_vllm.core.kernels.kv_write.triton import scales_place


@triton.jit
def tile_slots(table, first, end, S: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """Slots [N] int64 of positions first .. first + N - 1; those from `end` on mean nothing where MASKED."""
    keys = tl.arange(0, N)
    if S >= N:
        # Both are powers of two, so that a tile lies in one block: one entry of the table, and rows at fixed distances.
        slots = tl.load(table + first // S).to(tl.int64) * S + first % S + keys
    else:
        at = first + keys
        if MASKED:
            slots = tl.load(table + at // S, mask=at < end, other=0).to(tl.int64) * S + at % S
        else:
            slots = tl.load(table + at // S).to(tl.int64) * S + at % S
    return slots


@triton.jit
def load_tile(
    cache,
    slots,
    first,
    end,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    MASKED: tl.constexpr,
    S: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Keys or values [N, DP] of a head; `cache` points at the head in slot 0. Zero behind D and, where MASKED, `end`.

    In a block of S slots EXTRA numbers of another kind stand behind them.

    What stands behind the end of a sequence may be NaN, which a probability of 0 would not hide.
    """
    dims = tl.arange(0, DP)
    rows = slots * WIDTH
    if EXTRA:
        rows += slots // S * EXTRA
    at = cache + rows[:, None] + dims[None, :]
    if MASKED:
        keys = first + tl.arange(0, slots.shape[0])
        tile = tl.load(at, mask=(keys[:, None] < end) & (dims[None, :] < D), other=0.0)
    elif D != DP:
        tile = tl.load(at, mask=dims[None, :] < D, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_scales(
    cache,
    slots,
    first,
    end,
    head,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    unit,
    MASKED: tl.constexpr,
):
    """The scales [N] fp32 of rows of a head times `unit`, for a cache of `kv_write/scaled_rows`."""
    at = scales_place(cache, slots, K, D, S) + head * S
    if MASKED:
        keys = first + tl.arange(0, slots.shape[0])
        scales = tl.load(at, mask=keys < end, other=0.0)
    else:
        scales = tl.load(at)
    return scales * unit


@triton.jit
def key_unit(dtype: tl.constexpr):
    """What the numbers that `as_queries` makes of a cache of scaled rows are to be multiplied by, beside the scales."""
    return 256.0 if dtype == tl.uint8 else 1.0


@triton.jit
def value_unit(dtype: tl.constexpr):
    """By what scales of values are multiplied, so that a weight times a scale does not leave fp16's range.

    A code over it is 2 at most; what was added up is divided by it, but for uint8, whose numbers are that already.
    """
    return 64.0 if dtype == tl.int8 else 256.0


@triton.jit
def value_rest(dtype: tl.constexpr):
    """What the sums are multiplied by then."""
    return 0.015625 if dtype == tl.int8 else 1.0 if dtype == tl.uint8 else 0.00390625


@triton.jit
def from_e4m3_bits(codes):
    """Codes [...] int16, 0 to 255, of e4m3 as fp16 over 256: the exponents of both begin at the same bit pattern."""
    return (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def as_queries(tile, dtype: tl.constexpr):
    """A tile of the cache in the queries' dtype, exactly: every number of e4m3 is one of fp16 and of bf16.

    Bits of e4m3, uint8, become numbers over 256.

    From e4m3 straight to bf16 some compilers take a slow instruction for each number (F2F), and none by way of fp16 and
    fp32.
    """
    if tile.dtype == tl.uint8:
        tile = from_e4m3_bits(tile.to(tl.int16))
        if dtype == tl.bfloat16:
            tile = tile.to(tl.float32)
    if tile.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        tile = tile.to(tl.float16).to(tl.float32)
    return tile.to(dtype)


@triton.jit
def unpack_pairs(words, stored: tl.constexpr, dtype: tl.constexpr):
    """Words [N, P] int16 of two numbers each: those at even places and those at odd ones, [N, P] in `dtype`."""
    if stored == tl.int8:
        low = words.to(tl.int8)
        high = (words >> 8).to(tl.int8)
    else:
        low = (words & 255).to(tl.uint8).to(stored, bitcast=True)
        high = ((words >> 8) & 255).to(tl.uint8).to(stored, bitcast=True)
    return as_queries(low, dtype), as_queries(high, dtype)


@triton.jit
def weigh_tile(
    q,  # [M, DP]
    tops,  # [M] fp32, the largest score of each row so far
    sums,  # [M] fp32, the sum of exp2(factor * (score - top))
    k,  # [N, DP]
    k_scales,  # [N] fp32 by which the scores are multiplied, or None
    positions,  # [M] int32, of the queries
    first,  # position of the first key
    factor,  # > 0: scores times this are exponents of 2
    cap_in,  # with CAP: the score is cap_out * tanh(cap_in * q k)
    cap_out,
    bias,  # [M] fp32 that a score loses by position of distance, or None
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile's keys into the state of M rows.

    Returns tops, sums, the weights [M, N] of the tile's values, and by what the values before it are multiplied, [M].
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if k_scales is not None:
        scores = scores * k_scales[None, :]
    if CAP:
        scores = cap_out * (1.0 - 2.0 / (tl.exp2(scores * (cap_in * 2.8853900817779268)) + 1.0))
    if bias is not None:
        distance = positions[:, None] - (first + tl.arange(0, k.shape[0]))[None, :]
        scores -= bias[:, None] * distance.to(tl.float32)
    if MASKED:
        keys = first + tl.arange(0, k.shape[0])
        seen = keys[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (keys[None, :] >= first_seen(positions, WINDOW)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_tops = tl.maximum(tops, tl.max(scores, 1))
    base = tl.where(new_tops == float("-inf"), 0.0, new_tops) * factor
    # In this form a product and a difference become one fma in tiles with and without a mask, hence the same bits.
    weights = tl.exp2(scores * factor - base[:, None])
    keep = tl.exp2(tops * factor - base)
    return new_tops, sums * keep + tl.sum(weights, 1), weights, keep


@triton.jit
def add_values(weights, v, v_scales, values, keep):
    """Values [M, DP] fp32 with those of a tile, v [N, DP]; weights and keep are of `weigh_tile`, as are scales."""
    if v_scales is not None:
        weights = weights * v_scales[None, :]
    return tl.dot(weights.to(v.dtype), v, values * keep[:, None], input_precision="ieee")


@triton.jit
def attend_tile(
    q,
    tops,
    sums,
    values,  # [M, DP] fp32, the sum of the weights so far times the values
    k,
    v,  # [N, DP]
    k_scales,
    v_scales,
    positions,
    first,
    factor,
    cap_in,
    cap_out,
    bias,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile's keys and values into the state of M rows; see `weigh_tile`."""
    tops, sums, weights, keep = weigh_tile(
        q, tops, sums, k, k_scales, positions, first, factor, cap_in, cap_out, bias, CAP, WINDOW, MASKED
    )
    return tops, sums, add_values(weights, v, v_scales, values, keep)
