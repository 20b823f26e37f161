# SPDX-License-Identifier: MIT
"""Multi-head latent attention (MLA) over a paged cache that has one latent row for each token.

A **latent row** of the cache is [rope | latent], R + L elements shared by all heads: the rotated part of the key, and a
latent vector. The other elements of each head's keys, and all elements of its values, are linear projections of the
latent vector. These are never computed: the projection matrices are applied to the queries and to the result instead
("absorbed"). A query is [nope | rope], of which only rope is rotated.

Contract of `latent_attention`: q_rope [T, H, R] is rotated, q_latent [T, H, L] is nope in latent space; cache
[B, S, 1, R + L] has their dtype and already holds the new tokens' rows; T, B, S and `rows` as in `kernels/attention`.
The token at position p attends to 0..p, or only to those of them that an indexer chose.

    score(h, j) = scale * (q_rope[h] . rope[j] + q_latent[h] . latent[j])
    y[h] = sum over j of softmax(score(h))[j] * latent[j]                             y [T, H, L], in new memory

Scores and sums are fp32. A token's bits depend on its own sequence alone. On a GPU `scale` is positive, L is at least
16, R is 0 or at least 16, S is a power of two and at least 16, and the conditions of `kernels/attention` for
`DeviceRows` apply too.

Sparse attention: an **indexer** has H queries [D] and H weights for each token, and a key [D] for each position. It
scores the positions j = 0..p in fp32. The token attends to the `top` positions with the largest scores, among equal
scores the lower positions. Except in recorded steps, a token's bits then also depend on whether the step has a context
longer than `top`. Source: DeepSeek-AI, 2025, DeepSeek-V3.2.

    score(j) = sum over h of weights[h] * relu(q[h] . key[j])

**Pooled keys**: the indexer scores groups of `pool` neighbouring positions, a power of two that divides S, by a key of
each group. A position's row [key | gate] has a gate for each element of its key; element d of a group's key is

    sum over i of softmax over i of (gate[i, d] + places[i, d]) * key[i, d]

for its positions i and `places` [pool, D] fp32. The row of the group's last position has the group's key instead of its
own. The token attends to the top // pool whole groups with the largest scores, and to all positions after the last
whole group; `top` is pool - 1 more than a multiple of `pool`. Source: transformers' `Glm5NextTextIndexer`.

`latent_write` writes rows to the cache, `head_linear` multiplies every head by its own matrix. `cpu.py` has the
compiled operations of recorded steps. Source: DeepSeek-AI, 2024, arXiv:2405.04434, section 2.1 and appendix C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.dispatch import on_gpu

if TYPE_CHECKING:
    import torch


def latent_attention(
    q_rope: torch.Tensor,
    q_latent: torch.Tensor,
    cache: torch.Tensor,
    rows: AttentionRows | DeviceRows,
    *,
    scale: float,
    chosen: torch.Tensor | None = None,
    pool: int = 1,
) -> torch.Tensor:
    """Return the weighted latent vectors [T, H, L] of every head; the last dimension of the queries is contiguous.

    With `chosen` [T, top], tokens attend to these positions, ascending; at position p only the first p + 1 count, and
    only `layout.attended` of them with a `pool`.
    """
    assert q_rope.shape[:2] == q_latent.shape[:2]
    assert cache.shape[2:] == (1, q_rope.shape[2] + q_latent.shape[2])
    if chosen is not None:
        import torch

        from candle_vllm.core.kernels.latent_attention import reference

        parts = reference.chosen_rows(cache, rows, chosen, pool)
        return torch.cat([latent_attention(q_rope[p], q_latent[p], c, own, scale=scale) for p, c, own in parts])
    if on_gpu(q_rope):
        from candle_vllm.core.kernels.latent_attention import triton

        rows = rows.on_device() if isinstance(rows, AttentionRows) else rows
        return triton.latent_attention(q_rope, q_latent, cache, rows, scale=scale)
    rows = rows.on_host() if isinstance(rows, DeviceRows) else rows
    from candle_vllm.core.kernels.latent_attention import reference

    return reference.latent_attention(q_rope, q_latent, cache, rows, scale=scale)


def latent_write(rope: torch.Tensor, latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows [rope | latent], of rope [T, R] and latent [T, L], to their slots [T]; negative slots are skipped."""
    assert rope.shape[0] == latent.shape[0] == slots.shape[0]
    assert cache.shape[2:] == (1, rope.shape[1] + latent.shape[1])
    if on_gpu(rope):
        from candle_vllm.core.kernels.latent_attention import triton_write

        triton_write.latent_write(rope, latent, cache, slots)
        return
    from candle_vllm.core.kernels.latent_attention import reference

    reference.latent_write(rope, latent, cache, slots)


def head_linear(x: torch.Tensor, weight: torch.Tensor, *, invariant: bool = False) -> torch.Tensor:
    """Return y[t, h] = weight[h] x[t, h], [T, H, O], for x [T, H, I] and weight [H, O, I], all of one dtype.

    In x and y the elements of a head are contiguous, and other strides are arbitrary. With `invariant`, which is
    slower and needs a contiguous weight on a GPU, a token's bits do not depend on the other tokens.
    """
    assert x.shape[1:] == (weight.shape[0], weight.shape[2])
    if on_gpu(x) and invariant:
        from candle_vllm.core.kernels.latent_attention import triton_heads

        return triton_heads.head_linear(x, weight)
    from candle_vllm.core.kernels.latent_attention import reference

    return reference.head_linear(x, weight, row_by_row=invariant)
