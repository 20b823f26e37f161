"""Attention over the paged cache, and what a step tells the layers about itself."""

from __future__ import annotations

import dataclasses

import torch

from candle_vllm.core.kernels.attention import AttentionRows, paged_attention
from candle_vllm.core.kernels.kv_write import kv_write


@dataclasses.dataclass(frozen=True)
class StepInput:
    """The tensors of one step, as every layer sees them.

    Attributes:
        positions: [T] int64, each token's position in its sequence.
        slots: [T] int64, where each token's key and value go in the cache.
        rows: which tokens belong together.
        key_caches, value_caches: per layer, [B, S, K, D].
    """

    positions: torch.Tensor
    slots: torch.Tensor
    rows: AttentionRows
    key_caches: tuple[torch.Tensor, ...]
    value_caches: tuple[torch.Tensor, ...]


class PagedAttention:
    """Writes the new keys and values of a layer, then attends: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""

    def __init__(self, layer: int, head_dim: int, *, window: int | None = None, scale: float | None = None) -> None:
        self.layer = layer
        self.window = window
        self.scale = head_dim**-0.5 if scale is None else scale

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: StepInput) -> torch.Tensor:
        key_cache, value_cache = step.key_caches[self.layer], step.value_caches[self.layer]
        kv_write(k, v, key_cache, value_cache, step.slots)
        return paged_attention(q, key_cache, value_cache, step.rows, scale=self.scale, window=self.window)
