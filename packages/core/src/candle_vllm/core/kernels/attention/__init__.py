# SPDX-License-Identifier: MIT
"""Paged attention: causal attention of new tokens over a KV cache of blocks.

Contract: a step has T tokens of R sequences; a layer has H query heads and K KV heads of D elements, and a cache of B
blocks of S slots, one slot a position. q is [T, H, D]; key_cache and value_cache are [B, S, K, D] in q's dtype and
already hold the new tokens' keys and values. H is a multiple of K; query head h reads KV head h // (H / K). `rows` maps
the tokens to sequences, and sequences to blocks. The token at position p attends to positions 0..p; with a window w,
only to p - w + 1..p; with a window -w (chunked attention), to floor(p / w) * w..p. With a soft cap c, a score s becomes
c * tanh(s / c) before it is masked. With sinks [H] fp32, the softmax of each head has one more score, the head's sink:
it is not capped, is never masked, and has no value. With slopes [H] fp32 (ALiBi), a head's slope times the distance of
query and key is subtracted from a score after the soft cap. With relative logits (r [T, H, P], profiles [P, X] fp32) a
score gets the sum over j of r[t, h, j] * profiles[j, d] after the soft cap, if the distance d of query and key is from
0 to X - 1. With `rows.ahead`, which GPU kernels ignore, a token of an image or a prefix also attends to later ones of
it. Scores and sums are fp32. The result y [T, H, D] has q's dtype.

A float8_e4m3fn cache, as `kernels/kv_write` writes it, needs `cache_scales`: two tensors [1] float32, the factor of all
keys and that of all values. A cache with a scale for each key and value is [B, S, K, D + 4] and has no
`cache_scales`, see `kernels/kv_write/scaled_rows`.

On a GPU, D is at most 512 and is even if the cache has 8 bits, and S is a power of two, at least 16. Values shortly
before a window are read with weight 0, so they must be finite. With `DeviceRows`, whose lengths are on the device, no
call waits for the device, and launches depend only on shapes and on `rows.decodes`, so that they can be captured. Rows
of y from query_start[R] on are then undefined, and sequences without context among the first `decodes` get zeros. With
`rows.decoding`, the number of decoding sequences is on the device too, so one captured launch works for every mix of
decodes and prompts; padding sequences without tokens write nothing.
Sources: Vaswani et al., 2017, arXiv:1706.03762; Kwon et al., 2023, arXiv:2309.06180 (pages); Gemma Team, 2024,
arXiv:2408.00118 (soft cap); OpenAI, 2025, arXiv:2508.10925 (sinks); Press et al., 2021, arXiv:2108.12409 (ALiBi);
transformers' `InklingRelativeLogits`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows, ScoreOptions
from candle_vllm.core.kernels.dispatch import on_gpu

if TYPE_CHECKING:
    import torch


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: AttentionRows | DeviceRows,
    **scores: Unpack[ScoreOptions],
) -> torch.Tensor:
    """Compute softmax(q k^T * scale) v for every sequence of the step; see the contract above."""
    assert q.shape[1] % key_cache.shape[2] == 0
    assert all(each is None or each.shape == q.shape[1:2] for each in (scores.get("sinks"), scores.get("slopes")))
    if on_gpu(q):
        from candle_vllm.core.kernels.attention import triton

        rows = rows.on_device() if isinstance(rows, AttentionRows) else rows
        return triton.paged_attention(q, key_cache, value_cache, rows, **scores)
    from candle_vllm.core.kernels.attention import torch_decode

    rows = rows.on_host() if isinstance(rows, DeviceRows) else rows
    return torch_decode.paged_attention(q, key_cache, value_cache, rows, **scores)
