# SPDX-License-Identifier: MIT
"""Attention of encoders in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch.nn import functional

from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.rotary.reference import rotary


def whole_attention(
    qkv: torch.Tensor, heads: int, lengths: Sequence[int], turned: Turned | None = None
) -> torch.Tensor:
    """See the contract in the package."""
    if turned is not None:
        q, k, v = qkv.unflatten(-1, (3 * heads, -1)).chunk(3, dim=1)
        q, k = (rotary(part, turned.places, turned.cos, turned.sin) for part in (q, k))
        qkv = torch.cat([q, k, v], 1).flatten(1)
    out, start = qkv.new_empty(len(qkv), qkv.shape[1] // 3), 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        rows = slice(start, start + count * length)
        q, k, v = (part.view(count, length, heads, -1).transpose(1, 2) for part in qkv[rows].chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v)  # [texts, H, length, D]
        out[rows] = mixed.transpose(1, 2).reshape(count * length, -1)
        start = rows.stop
    return out
