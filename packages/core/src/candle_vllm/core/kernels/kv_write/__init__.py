"""Writing new keys and values into the paged cache.

Contract: key and value [T, K, D] of the cache's dtype, key_cache and value_cache [B, S, K, D], slots [T] int64, all
different, slot = block * S + offset. Writes in place; every other slot keeps its contents. An exact copy.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.kv_write import reference


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Copies each token's key and value to its slot."""
    assert key.shape == value.shape
    assert key_cache.shape == value_cache.shape
    assert key.shape[1:] == key_cache.shape[2:]
    reference.kv_write(key, value, key_cache, value_cache, slots)
