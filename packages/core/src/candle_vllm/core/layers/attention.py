"""Attention over the paged cache, and what a step tells the layers about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from candle_vllm.core.kernels.attention import AttentionRows, DeviceRows, paged_attention
from candle_vllm.core.kernels.kv_write import kv_write
from candle_vllm.core.kernels.recorded import Recorded, Value


@dataclasses.dataclass(frozen=True)
class StepInput:
    """The tensors of one step, as every layer sees them.

    Attributes:
        positions: [T] int64, each token's position in its sequence; on a GPU int32.
        slots: [T] int64, where each token's key and value go in the cache; on a GPU int32, -1 for nowhere.
        rows: which tokens belong together.
        key_caches, value_caches: per layer, [B, S, K, D]; while a step is recorded, whatever the recorder made.
        cache_scales: of keys and of values, where the caches are float8; see `kernels/kv_write`.
        attend: what computes attention; see `kernels/attention`.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    rows: AttentionRows | DeviceRows
    key_caches: tuple[Any, ...]
    value_caches: tuple[Any, ...]
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None
    attend: Callable[..., torch.Tensor] = paged_attention


class PagedAttention:
    """Writes the new keys and values of a layer, then attends: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""

    def __init__(self, layer: int, head_dim: int, *, window: int | None = None, scale: float | None = None) -> None:
        self.layer = layer
        self.window = window
        self.scale = head_dim**-0.5 if scale is None else scale

    def __call__(self, q: Value, k: Value, v: Value, step: StepInput) -> Value:
        key_cache, value_cache = step.key_caches[self.layer], step.value_caches[self.layer]
        if isinstance(q, Recorded):
            return q.attend(k, v, key_cache, value_cache, scale=self.scale, window=self.window)
        scales = step.cache_scales
        key_scale, value_scale = (None, None) if scales is None else scales
        kv_write(k, v, key_cache, value_cache, step.slots, key_scale=key_scale, value_scale=value_scale)
        options = {"scale": self.scale, "window": self.window, "cache_scales": scales}
        return step.attend(q, key_cache, value_cache, step.rows, **options)
