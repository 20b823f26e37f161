# SPDX-License-Identifier: MIT
"""Latent attention on a GPU: checks, and the choice of the kernel for each sequence.

As in `attention/triton.py`, `triton_decode` computes the first `decodes` sequences of a step, `triton_prefill` the
later sequences, and the host never waits for the GPU.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.attention.rows import DeviceRows
from candle_vllm.core.kernels.attention.triton import check_rows
from candle_vllm.core.kernels.latent_attention.triton_decode import decode
from candle_vllm.core.kernels.latent_attention.triton_prefill import prefill


def latent_attention(
    q_rope: torch.Tensor, q_latent: torch.Tensor, cache: torch.Tensor, rows: DeviceRows, *, scale: float
) -> torch.Tensor:
    """See the contract in the package."""
    block_size = cache.shape[1]
    assert q_rope.stride(2) == q_latent.stride(2) == 1
    assert q_rope.dtype == q_latent.dtype == cache.dtype
    assert q_latent.shape[2] >= 16
    assert q_rope.shape[2] == 0 or q_rope.shape[2] >= 16
    assert block_size >= 16, "a block has a power of two of slots, at least 16"
    assert block_size & (block_size - 1) == 0
    assert cache.is_contiguous()
    assert all(x.device == cache.device for x in (q_rope, q_latent))
    check_rows(rows, q_latent)
    assert scale > 0
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    if rows.decodes:
        decode(q_rope, q_latent, cache, out, rows, scale=scale)
    first = rows.decodes if rows.decoding is None else 0
    if len(q_latent) > first:
        prefill(q_rope, q_latent, cache, out, rows, first, scale=scale)
    return out
