# SPDX-License-Identifier: MIT
"""Shared code of the GPU's attention kernels: reading a tile of the paged cache, and one step of the online softmax.

A tile is N neighbouring positions of one sequence and one key-value head; its first position is a multiple of N. The
update of a query's softmax state depends only on the query and the tile; a fully masked tile leaves the state's bits
unchanged. So a result does not depend on other rows and sequences of the step.
Source: Dao, 2023, arXiv:2307.08691 (FlashAttention-2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.triton_items import first_seen
from candle_vllm.core.kernels.kv_write.triton import scales_place


@triton.jit
def tile_slots(table, first, end, S: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """Return slots [N] int64 of positions first .. first + N - 1; with MASKED, slots from `end` on are meaningless."""
    keys = tl.arange(0, N)
    if S >= N:
        # Both are powers of two, so a tile is within one block: one entry of the table, and rows at fixed distances.
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
    """Load keys or values [N, DP] of a head; `cache` points at the head in slot 0, EXTRA elements follow each S slots.

    Elements beyond D and, if MASKED, of positions from `end` on are 0, because memory may hold NaN there.
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
    """Load the scales [N] fp32 of a head's rows in a cache of `kv_write/scaled_rows`; return them times `unit`."""
    at = scales_place(cache, slots, K, D, S) + head * S
    if MASKED:
        keys = first + tl.arange(0, slots.shape[0])
        scales = tl.load(at, mask=keys < end, other=0.0)
    else:
        scales = tl.load(at)
    return scales * unit


@triton.jit
def key_unit(dtype: tl.constexpr):
    """Return the true value of an element of this type divided by the result of `as_queries`."""
    return 256.0 if dtype == tl.uint8 else 1.0


@triton.jit
def value_unit(dtype: tl.constexpr):
    """Return the factor by which the values' scales are multiplied, so that weight times scale is in fp16's range.

    The largest code divided by the factor is below 2. `value_rest` cancels the factor.
    """
    return 64.0 if dtype == tl.int8 else 256.0


@triton.jit
def value_rest(dtype: tl.constexpr):
    """Return the factor of the sums that cancels `value_unit`; for uint8, `as_queries` has divided already."""
    return 0.015625 if dtype == tl.int8 else 1.0 if dtype == tl.uint8 else 0.00390625


@triton.jit
def from_e4m3_bits(codes):
    """Convert e4m3 codes [...] int16, 0 to 255, to fp16 values / 256 by shifting bits; subnormals stay exact."""
    return (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def as_queries(tile, dtype: tl.constexpr):
    """Convert a tile of the cache to the queries' dtype, exactly; e4m3 bits in uint8 become their values / 256.

    For e4m3 to bf16 some compilers use a slow instruction (F2F) for each element; through fp16 and fp32 they do not.
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
    """Split words [N, P] int16 of two elements each; return the even and the odd elements, [N, P] in `dtype`."""
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
    tops,  # [M] fp32, the maximum score of each query so far
    sums,  # [M] fp32, the sum of exp2(factor * (score - top))
    k,  # [N, DP]
    k_scales,  # [N] fp32, factors of the scores, or None
    positions,  # [M] int32, positions of the queries
    first,  # position of the first key
    scoring,  # a tuple, see below
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    EXTENT: tl.constexpr,  # distances with relative logits; 0 without them
    MASKED: tl.constexpr,
):
    """Update the softmax state of M queries with the keys of one tile.

    `scoring` has these elements:
        factor: > 0: scores times `factor` are exponents of 2.
        cap_in, cap_out: with CAP, the score is cap_out * tanh(cap_in * q k).
        bias: [M] fp32, subtracted from a score for each position of distance; with EXTENT int32, see `logits`; or None.
        logits: with EXTENT, a pointer to relative logits, in which `bias` are the rows' first elements.

    Returns tops, sums, the weights [M, N] of the tile's values, and the factor [M] of the values of earlier tiles.
    """
    factor, cap_in, cap_out, bias, logits = scoring
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if k_scales is not None:
        scores = scores * k_scales[None, :]
    if CAP:
        scores = cap_out * (1.0 - 2.0 / (tl.exp2(scores * (cap_in * 2.8853900817779268)) + 1.0))
    if bias is not None:
        distance = positions[:, None] - (first + tl.arange(0, k.shape[0]))[None, :]
        if EXTENT:
            there = (distance >= 0) & (distance < EXTENT)
            scores += tl.load(logits + (bias[:, None] + distance), mask=there, other=0.0) * (
                1.4426950408889634 / factor
            )
        else:
            scores -= bias[:, None] * distance.to(tl.float32)
    if MASKED:
        keys = first + tl.arange(0, k.shape[0])
        seen = keys[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (keys[None, :] >= first_seen(positions, WINDOW)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    return soften(scores, tops, sums, factor)


@triton.jit
def soften(scores, tops, sums, factor):
    """Update tops and sums [M] by a tile's scores [M, N]; see `weigh_tile`, which returns the same."""
    new_tops = tl.maximum(tops, tl.max(scores, 1))
    base = tl.where(new_tops == float("-inf"), 0.0, new_tops) * factor
    # In this form, product and difference become one fma with and without a mask, so the bits are the same.
    weights = tl.exp2(scores * factor - base[:, None])
    keep = tl.exp2(tops * factor - base)
    return new_tops, sums * keep + tl.sum(weights, 1), weights, keep


@triton.jit
def add_values(weights, v, v_scales, values, keep):
    """Add a tile's values v [N, DP] to values [M, DP] fp32; weights, keep and scales are those of `weigh_tile`."""
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
    scoring,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    EXTENT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Update the softmax state of M queries with one tile's keys and values; see `weigh_tile`."""
    tops, sums, weights, keep = weigh_tile(
        q, tops, sums, k, k_scales, positions, first, scoring, CAP, WINDOW, EXTENT, MASKED
    )
    return tops, sums, add_values(weights, v, v_scales, values, keep)
