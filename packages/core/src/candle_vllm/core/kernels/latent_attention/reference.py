# SPDX-License-Identifier: MIT
"""Latent attention in plain torch, one sequence at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from candle_vllm.core.kernels.attention.rows import AttentionRows

_QUERIES = 64  # queries at a time, so that the scores of a long prompt stay small


def latent_attention(
    q_rope: torch.Tensor, q_latent: torch.Tensor, cache: torch.Tensor, rows: AttentionRows, *, scale: float
) -> torch.Tensor:
    """See the contract in the package."""
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    size, rope = cache.shape[1], q_rope.shape[2]
    for row, context in enumerate(rows.context_lens):
        start, end = rows.query_start[row], rows.query_start[row + 1]
        table = rows.block_tables[row, : -(-context // size)]
        keys = cache[table].flatten(0, 2)[:context].float()  # [C, R + L]
        for first in range(start, end, _QUERIES):
            last = min(first + _QUERIES, end)
            q = torch.cat([q_rope[first:last], q_latent[first:last]], -1).float()  # [Q, H, R + L]
            scores = torch.matmul(q, keys.T) * scale  # [Q, H, C]
            at = torch.arange(context - (end - first), context - (end - last), device=q.device)
            hidden = torch.arange(context, device=q.device) > at[:, None]  # [Q, C]
            scores.masked_fill_(hidden[:, None], float("-inf"))
            out[first:last] = torch.matmul(scores.softmax(-1), keys[:, rope:]).to(out.dtype)
    return out


def latent_write(rope: torch.Tensor, latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """See the contract in the package."""
    there = slots >= 0
    cache.flatten(0, 2)[slots[there]] = torch.cat([rope, latent], -1)[there].to(cache.dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor, *, row_by_row: bool = False) -> torch.Tensor:
    """See the contract in the package; `row_by_row` computes each token separately."""
    if row_by_row and len(x) > 1:
        return torch.cat([head_linear(row, weight) for row in x.split(1)])
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
