# SPDX-License-Identifier: MIT
"""Paged attention: causal attention of new tokens over a cache that is kept in blocks.

Contract: q [T, H, D]; key_cache and value_cache [B, S, K, D] of q's dtype, already holding the new tokens' keys and
values; H is a multiple of K, and query head h reads key-value head h // (H / K). `rows` says which tokens belong to
which sequence and where its blocks are. The token at position p sees positions 0..p, or, with a window w, only
p - w + 1..p. With a soft cap c, a score s becomes c * tanh(s / c) before it is masked. With sinks [H] fp32, each head's
number joins its softmax as one score more, uncapped and always seen, whose probability goes to no value. With slopes
[H] fp32, a head's score loses its slope times the distance of query and key, behind the soft cap (ALiBi). Where `rows`
says so, on the CPU alone, a token sees some positions behind its own as well: those of a picture see each other. Scores
and sums are fp32. y [T, H, D] has q's dtype, in new memory.

A cache of float8_e4m3fn, as `kernels/kv_write` writes it, comes with `cache_scales`, those of keys and of values, [1]
float32 each, by which its numbers are multiplied. One whose rows have scales of their own is [B, S, K, D + 4], see
`kernels/kv_write/scaled_rows`.

On a GPU D is 256 at most, and even where the cache has 8 bits, and S a power of two from 16 on. Where the step's
numbers are on the device (`DeviceRows`) nothing waits for it, and launches depend on the shapes of tensors and on
`decodes` only, so that they can be captured: the rows of y from query_start[R] on hold anything, sequences among the
first `decodes` without context get zeros. With `decoding` it is a number on the device that says how many sequences
decode, so that one captured launch serves every mix of decodes and prompts: sequences behind the last one (query_start
stands still, no context) get nothing.
Sources: Vaswani et al., 2017, arXiv:1706.03762; Kwon et al., 2023, arXiv:2309.06180 (pages); Gemma Team, 2024,
arXiv:2408.00118 (soft cap); OpenAI, 2025, arXiv:2508.10925 (sinks); Press et al., 2021, arXiv:2108.12409 (ALiBi).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.dispatch import on_gpu

if TYPE_CHECKING:
    import torch


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: AttentionRows | DeviceRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for every sequence of the step."""
    assert q.shape[1] % key_cache.shape[2] == 0
    assert all(each is None or each.shape == q.shape[1:2] for each in (sinks, slopes))
    options = {"scale": scale, "window": window, "softcap": softcap, "cache_scales": cache_scales}
    options |= {"sinks": sinks, "slopes": slopes}
    if on_gpu(q):
        from candle_vllm.core.kernels.attention import triton

        rows = rows.on_device() if isinstance(rows, AttentionRows) else rows
        return triton.paged_attention(q, key_cache, value_cache, rows, **options)
    from candle_vllm.core.kernels.attention import torch_decode

    rows = rows.on_host() if isinstance(rows, DeviceRows) else rows
    return torch_decode.paged_attention(q, key_cache, value_cache, rows, **options)
