# SPDX-License-Identifier: MIT
"""Attention of encoders in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional

from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.rotary.reference import rotary


def whole_attention(
    qkv: torch.Tensor,
    heads: int,
    lengths: Sequence[int],
    turned: Turned | None = None,
    *,
    kv_heads: int | None = None,
    bias: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """See the contract in the package."""
    shared = heads if kv_heads is None else kv_heads
    parts = qkv.unflatten(-1, (heads + 2 * shared, -1)).split([heads, shared, shared], 1)
    if turned is not None:
        parts = *(rotary(part, turned.places, turned.cos, turned.sin) for part in parts[:2]), parts[2]
    out, start = torch.empty_like(parts[0], memory_format=torch.contiguous_format), 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        rows = slice(start, start + count * length)
        q, k, v = (part[rows].unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(heads // shared, 1) for part in (k, v))
        seen = _added(length, bias, window, q)
        mixed = functional.scaled_dot_product_attention(q, k, v, seen)  # [texts, H, length, D]
        out[rows] = mixed.transpose(1, 2).flatten(0, 1)
        start = rows.stop
    return out.flatten(1)


def disentangled_attention(
    qkv: torch.Tensor, near: torch.Tensor, heads: int, lengths: Sequence[int], rows: np.ndarray
) -> torch.Tensor:
    """See the contract in the package."""
    parts = qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0)
    near_q, near_k = (part.transpose(0, 1) for part in near.unflatten(-1, (3, heads, -1)).movedim(-3, 0)[:2])
    table = torch.from_numpy(rows).to(qkv.device)
    scale = (3 * parts.shape[-1]) ** -0.5
    out, start = torch.empty_like(parts[0], memory_format=torch.contiguous_format), 0
    for length in lengths:
        q, k, v = (part[start : start + length].transpose(0, 1) for part in parts)  # [H, length, D]
        places = torch.arange(length, device=qkv.device)
        index = table[places[:, None] - places + len(rows) // 2].expand(heads, -1, -1)
        scores = q @ k.mT + (q @ near_k.mT).gather(-1, index) + (k @ near_q.mT).gather(-1, index.mT).mT
        out[start : start + length] = ((scores * scale).softmax(-1) @ v).transpose(0, 1)
        start += length
    return out.flatten(1)


def _added(length: int, bias: torch.Tensor | None, window: int | None, q: torch.Tensor) -> torch.Tensor | None:
    """Return the term that is added to scores, [H or 1, length, length]; None if there is no bias and no window."""
    if bias is None and window is None:
        return None
    places = torch.arange(length, device=q.device)
    away = places - places[:, None]  # key position - query position
    near = q.new_zeros(1, 1) if bias is None else bias.to(q.dtype)
    added = near[:, away + near.shape[1] // 2] if bias is not None else near[:, away * 0]
    return added if window is None else added.masked_fill(away.abs() > window, float("-inf"))
