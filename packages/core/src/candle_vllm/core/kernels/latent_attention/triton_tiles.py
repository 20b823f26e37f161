# SPDX-License-Identifier: MIT
"""Code that the latent attention kernels of the GPU share: reading rows, a step of the softmax.

A tile is N neighbouring positions of one sequence. The two parts of a cache row are read separately, because R + L is
rarely a power of two. The latent part is read once and used as keys and as values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.triton_tiles import add_values, soften


@triton.jit
def load_queries(q, places, valid, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Load one part of the queries [M, PADDED] at `places` [M]; zero if not `valid`, and beyond SIZE."""
    dims = tl.arange(0, PADDED)
    return tl.load(q + places[:, None] + dims[None, :], mask=valid[:, None] & (dims[None, :] < SIZE), other=0.0)


@triton.jit
def attend_latent_tile(
    q_rope,  # [M, RP]
    q_latent,  # [M, LP]
    tops,  # [M] fp32, the maximum score of each query so far
    sums,  # [M] fp32, the sum of exp2(factor * (score - top))
    values,  # [M, LP] fp32, the sum of these exponentials times the latent rows
    rope,  # [N, RP]
    latent,  # [N, LP]
    positions,  # [M] int32, positions of the queries
    first,  # position of the first key
    factor,  # > 0: scores times `factor` are exponents of 2
    MASKED: tl.constexpr,
):
    """Update the softmax state of M queries with the rows of one tile."""
    scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
    scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
    if MASKED:
        keys = first + tl.arange(0, latent.shape[0])
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    tops, sums, weights, keep = soften(scores, tops, sums, factor)
    return tops, sums, add_values(weights, latent, None, values, keep)
