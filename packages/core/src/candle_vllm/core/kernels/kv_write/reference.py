# SPDX-License-Identifier: MIT
"""Write to the paged cache, in plain torch."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.kv_write.scaled_rows import has_row_scales, write_rows


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See the contract in the package."""
    slots, there = slots.long(), slots >= 0
    if not bool(there.all()):
        key, value, slots = key[there], value[there], slots[there]
    for rows, cache, scale in zip((key, value), (key_cache, value_cache), cache_scales or (None, None)):
        if has_row_scales(cache, rows.shape[2]):
            write_rows(rows, cache, slots)
        elif scale is None:
            cache.flatten(0, 1).index_copy_(0, slots, rows)
        else:
            largest = torch.finfo(cache.dtype).max
            small = (rows.float() / scale).clamp(-largest, largest).to(cache.dtype)
            # As bytes, because torch does not index fp8 on every device.
            cache.view(torch.uint8).flatten(0, 1).index_copy_(0, slots, small.view(torch.uint8))
