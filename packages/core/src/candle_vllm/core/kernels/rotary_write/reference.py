# SPDX-License-Identifier: MIT
"""Norms of heads, rotary and the cache write in plain torch, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from candle_vllm.core.kernels.kv_write.reference import kv_write
from candle_vllm.core.kernels.rms_norm.reference import rms_norm
from candle_vllm.core.kernels.rotary.reference import rotary

if TYPE_CHECKING:
    from candle_vllm.core.kernels.rms_norm import HeadNorms


def rotary_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    *,
    norms: HeadNorms | None = None,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """See the contract in the package."""
    if norms is not None:
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    q, k = rotary(q, positions, *tables), rotary(k, positions, *tables)
    kv_write(k, v, *caches, slots, cache_scales=cache_scales)
    return q
