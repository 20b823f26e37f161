# SPDX-License-Identifier: MIT
"""What stands between the projections of a layer and its attention: norms of heads, rotary, and the cache write.

Contract: q [T, H, D], k and v [T, K, D] of one float dtype, positions [T], cos and sin [P, R/2] as in `kernels/rotary`,
caches and slots as in `kernels/kv_write`, `norms` the weights [D] of queries and of keys and their eps as in
`kernels/rms_norm`, or None. Returns q, normed and rotated, [T, H, D] in new memory; the keys, likewise, and the values
are in the cache. The result is that of `rms_norm`, `rotary_pair` and `kv_write` one after the other, each of which
rounds to q's dtype, but for the order in which a norm's squares are summed. A row's result has the same bits whatever
the other rows are. On a GPU it is one launch, for it is launches that a step of few rows is made of.

Without tables nothing is rotated: norms and the cache write follow each other, and without norms q comes back as it is.
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
    """Rotates queries, and writes rotated keys and the values.

    Args:
        q, k, v, positions, slots: see above.
        tables: cos and sin, or None.
        caches: of keys and of values.
        norms: of heads, where the model has them.
        cache_scales: of keys and of values, where the cache is float8.
    """
    assert k.shape == v.shape
    assert (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2])
    assert k.dtype == v.dtype == q.dtype
    assert k.shape[1] == caches[0].shape[2]
    if tables is None:
        if norms is not None:
            q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
        key_scale, value_scale = cache_scales or (None, None)
        kv_write(k, v, *caches, slots, key_scale=key_scale, value_scale=value_scale)
        return q
    assert 2 * tables[0].shape[1] <= q.shape[2]
    from candle_vllm.core.kernels.rotary_write import reference

    write = reference.rotary_write
    if on_gpu(q):
        from candle_vllm.core.kernels.rotary_write import triton

        write = triton.rotary_write
    return write(q, k, v, positions, tables, caches, slots, norms=norms, cache_scales=cache_scales)
