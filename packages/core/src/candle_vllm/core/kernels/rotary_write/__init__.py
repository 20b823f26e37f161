# SPDX-License-Identifier: MIT
"""The operations between a layer's projections and its attention: norms of heads, rotary embedding and cache write.

Contract: q is [T, H, D], k and v are [T, K, D] of one float dtype; positions [T], cos and sin [P, R/2] are those of
`kernels/rotary`, caches and slots those of `kernels/kv_write`; `norms` has weights [D] for queries and keys and their
eps, as in `kernels/rms_norm`, or is None. The result is q, normalised and rotated, [T, H, D] in new memory; keys,
normalised and rotated too, and values are written to the cache. The results equal `rms_norm`, `rotary_pair` and
`kv_write` one after the other, each rounded to q's dtype, except for the order in which a norm's squares are summed. A
token's bits do not depend on other tokens. On a GPU it is one launch, because launches take most of the time of a step
with few tokens. Without tables nothing is rotated, and norms are separate launches; without both, q itself is returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.kv_write import kv_write
from candle_vllm.core.kernels.rms_norm import HeadNorms, rms_norm

if TYPE_CHECKING:
    import torch


def rotary_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    *,
    norms: HeadNorms | None = None,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the rotated queries, and write rotated keys and values; see above.

    Args:
        tables: cos and sin, or None.
        caches: the caches of keys and of values.
        cache_scales: the scales of keys and of values in a float8 cache.
    """
    assert k.shape == v.shape
    assert (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2])
    assert k.dtype == v.dtype == q.dtype
    assert k.shape[1] == caches[0].shape[2]
    if tables is None:
        if norms is not None:
            q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
        kv_write(k, v, *caches, slots, cache_scales=cache_scales)
        return q
    assert 2 * tables[0].shape[1] <= q.shape[2]
    from candle_vllm.core.kernels.rotary_write import reference

    write = reference.rotary_write
    if on_gpu(q):
        from candle_vllm.core.kernels.rotary_write import triton

        write = triton.rotary_write
    return write(q, k, v, positions, tables, caches, slots, norms=norms, cache_scales=cache_scales)
