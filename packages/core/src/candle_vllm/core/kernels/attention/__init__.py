"""Paged attention: causal attention of new tokens over a cache that is kept in blocks.

Contract: q [T, H, D]; key_cache and value_cache [B, S, K, D] of q's dtype, already holding the new tokens' keys and
values; H is a multiple of K, and query head h reads key-value head h // (H / K). `rows` says which tokens belong to
which sequence and where its blocks are. The token at position p sees positions 0..p, or, with a window w, only
p - w + 1..p. Scores and sums are fp32. y [T, H, D] has q's dtype, in new memory.
Sources: Vaswani et al., 2017, arXiv:1706.03762; Kwon et al., 2023, arXiv:2309.06180 (pages).
"""

from __future__ import annotations

import dataclasses

import torch

from candle_vllm.core.kernels.attention import reference


@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """Where the tokens of one step belong.

    Attributes:
        query_start: R + 1 offsets into the step's tokens; sequence r has query_start[r]..query_start[r + 1].
        context_lens: R lengths, in tokens, the new ones included.
        block_tables: [R, most blocks] int64; a row's tail beyond its context is not read.
    """

    query_start: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: AttentionRows,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for every sequence of the step."""
    assert q.shape[1] % key_cache.shape[2] == 0
    assert q.shape[2] == key_cache.shape[3]
    return reference.paged_attention(q, key_cache, value_cache, rows, scale=scale, window=window)
