# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""What the latent attention kernels of the GPU share: reading rows, a step of the softmax.

A tile is N neighbouring positions of one sequence. Rows of the cache are read as their two parts, for R + L is no power
of two; the latent part, once read, serves as keys and as values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_queries(q, places, valid, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One part of the queries [M, PADDED] at `places` [M], zero where not `valid` and behind SIZE."""
    dims = tl.arange(0, PADDED)
    return tl.load(q + places[:, None] + dims[None, :], mask=valid[:, None] & (dims[None, :] < SIZE), other=0.0)


@triton.jit
def load_part(
    cache,
    slots,
    first,
    end,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Numbers START .. START + SIZE - 1 of cache rows, [N, PADDED]; zero behind SIZE and, where MASKED, from `end` on.

    What stands behind the end of a sequence may be NaN, which a probability of 0 would not hide.
    """
    dims = tl.arange(0, PADDED)
    at = cache + slots[:, None] * WIDTH + START + dims[None, :]
    if MASKED:
        keys = first + tl.arange(0, slots.shape[0])
        tile = tl.load(at, mask=(keys[:, None] < end) & (dims[None, :] < SIZE), other=0.0)
    elif SIZE != PADDED:
        tile = tl.load(at, mask=dims[None, :] < SIZE, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def attend_latent_tile(
    q_rope,  # [M, RP]
    q_latent,  # [M, LP]
    tops,  # [M] fp32, the largest score of each row so far
    sums,  # [M] fp32, the sum of exp2(factor * (score - top))
    values,  # [M, LP] fp32, the sum of those times the latent rows
    rope,  # [N, RP]
    latent,  # [N, LP]
    positions,  # [M] int32, of the queries
    first,  # position of the first key
    factor,  # > 0: scores times this are exponents of 2
    MASKED: tl.constexpr,
):
    """One tile's rows into the state of M queries."""
    scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
    scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
    if MASKED:
        keys = first + tl.arange(0, latent.shape[0])
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_tops = tl.maximum(tops, tl.max(scores, 1))
    base = tl.where(new_tops == float("-inf"), 0.0, new_tops) * factor
    # In this form a product and a difference become one fma in tiles with and without a mask, hence the same bits.
    weights = tl.exp2(scores * factor - base[:, None])
    keep = tl.exp2(tops * factor - base)
    sums = sums * keep + tl.sum(weights, 1)
    values = tl.dot(weights.to(latent.dtype), latent, values * keep[:, None], input_precision="ieee")
    return new_tops, sums, values
