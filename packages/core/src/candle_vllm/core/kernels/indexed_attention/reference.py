# SPDX-License-Identifier: MIT
"""Pooled index keys, and attention to chosen positions, in torch on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.indexed_attention import IndexedLayer
from candle_vllm.core.kernels.latent_attention import latent_write
from candle_vllm.core.kernels.latent_attention.reference import choose, chosen_rows
from candle_vllm.core.kernels.rms_norm import rms_norm


def write_keys(
    key: torch.Tensor, layer: IndexedLayer, cache: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the rows of keys [T, Di], then the pooled keys of the groups that end in this step."""
    pool, (size, half), flat = layer.pool, (key.shape[1], layer.cos.shape[1]), cache.flatten(0, 2)
    turns = [table[positions].to(key.dtype) for table in (layer.cos, layer.sin)]
    latent_write(key[:, :0], torch.cat([key, *turns], 1), cache, slots)
    ends = slots[(slots >= 0) & (slots % pool == pool - 1)].long()
    rows = flat[ends[:, None] - torch.arange(pool - 1, -1, -1, device=ends.device)]  # [N, pool, Di + R]
    mean = rms_norm(rows[..., :size].float().mean(1).to(key.dtype), layer.norm, layer.eps)
    first, second, rest = mean.split((half, half, size - 2 * half), 1)
    cos, sin = rows[:, 0, size:].split(half, 1)
    flat[ends, :size] = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], 1).to(cache.dtype)


def choose_blocks(
    q: torch.Tensor, layer: IndexedLayer, cache: torch.Tensor, rows: AttentionRows | DeviceRows
) -> torch.Tensor | None:
    """Return the chosen positions [T, top] for rotated queries [T, Hi, Di]; None for all positions."""
    return choose(q, torch.ones(q.shape[:2], device=q.device), cache, rows, layer.top, layer.pool)


def attend_chosen(attend: Callable[..., torch.Tensor], chosen: torch.Tensor, pool: int) -> Callable[..., torch.Tensor]:
    """Return a function as `attend`, see `kernels/attention`, by which tokens attend to `chosen` positions [T, top]."""

    def attend_rows(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Any, **scores: Any
    ) -> torch.Tensor:
        parts = zip(*(chosen_rows(cache, rows, chosen, pool) for cache in (keys, values)))
        return torch.cat([attend(q[p], k, v, own, **scores) for (p, k, own), (_, v, _) in parts])

    return attend_rows
