"""Attention over the paged cache, and what a step tells the layers about itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from candle_vllm.core.kernels.attention import AttentionRows, paged_attention
from candle_vllm.core.kernels.kv_write import kv_write
from candle_vllm.core.kernels.recorded import Recorded, Value


@dataclasses.dataclass(frozen=True)
class StepInput:
    """The tensors of one step, as every layer sees them.

    Attributes:
        positions: [T] int64, each token's position in its sequence.
        slots: [T] int64, where each token's key and value go in the cache.
        rows: which tokens belong together.
        key_caches, value_caches: per layer, [B, S, K, D]; while a step is recorded, whatever the recorder made.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    rows: AttentionRows
    key_caches: tuple[Any, ...]
    value_caches: tuple[Any, ...]


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
        kv_write(k, v, key_cache, value_cache, step.slots)
        return paged_attention(q, key_cache, value_cache, step.rows, scale=self.scale, window=self.window)
