# SPDX-License-Identifier: MIT
"""Latent attention over the paged cache: the norm of latent rows, and the matrices of every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.kernels.latent_attention import head_linear, latent_attention, latent_write
from candle_vllm.core.kernels.latent_attention.layout import LatentParts
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, naming_tensor
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import LatentSizes
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.quantization.tensors import StoredTensor


class HeadMatrices:
    """A plain (not quantised) matrix [O, I] for every head; its parameter is `weight` [H, O, I].

    Quantised matrices are decoded (recorded: to `plain_kind` or bfloat16), because a layer's other matrices are larger.
    LoRA is not applied to them, because the projection of latent rows is absorbed into queries and outputs.
    """

    sections = 1

    def __init__(self, heads: int, outputs: int, inputs: int, placement: Placement) -> None:
        self.shape = (heads, outputs, inputs)
        self._placement = placement
        self.numbers: Any = None  # a tensor, or in recorded steps the matrices of all heads

    def __call__(self, x: Value) -> Value:
        """x [T, H, I] -> [T, H, O]."""
        return head_linear(x, self.numbers, invariant=self._placement.invariant)

    def parameters(self) -> Mapping[str, Parameter]:
        return {"weight": self}

    def fill(self, stored: StoredTensor) -> str | None:
        """See `Parameter.fill`."""
        placement = self._placement
        with naming_tensor(stored):
            self.numbers = placement.backend().numbers(stored)
        kept_elsewhere = placement.recorded or placement.keeps_quantised
        return "per-head matrices have no kernel for quantised weights" if stored.quantised and kept_elsewhere else None


class LatentAttention:
    """Norm of the latent row, rotary embedding, cache write and attention in latent space: q, kv -> [T, H * V].

    Args:
        layer: index of the layer's cache.
        sizes: shapes of latent attention; L, R and V are its `latent`, `rope` and `value`.
        norm_eps: epsilon of the latent row's norm.
        scale: factor of the scores.
        pool: number of neighbouring positions that an indexer chooses together.
    """

    def __init__(
        self,
        layer: int,
        sizes: LatentSizes,
        rotary: Rotary,
        norm_eps: float,
        placement: Placement,
        *,
        scale: float,
        pool: int = 1,
    ) -> None:
        self.layer, self.sizes, self.rotary, self.scale, self.pool = layer, sizes, rotary, scale, pool
        self.norm = RMSNorm(sizes.latent, norm_eps, placement)
        self.keys = HeadMatrices(sizes.heads, sizes.latent, sizes.nope, placement)
        self.values = HeadMatrices(sizes.heads, sizes.value, sizes.latent, placement)

    def __call__(self, q: Value, kv: Value, step: StepInput, chosen: Any = None) -> Value:
        """q is [T, H * (nope + R)] with heads [nope | rope]; kv is [T, L + R], latent rows and the key part to rotate.
        Tokens attend to the positions that a sparse-attention indexer has `chosen`; None for all."""
        cache, sizes = step.caches[self.layer].keys, self.sizes
        heads = self.rotary.scaled(q.unflatten(-1, (-1, sizes.nope + sizes.rope)), step.positions)
        if isinstance(q, Recorded):
            return heads.flatten(1).attend_latent(kv, self._parts(chosen), cache, scale=self.scale)
        nope, rope = heads.split((sizes.nope, sizes.rope), -1)
        latent, key = kv.split((sizes.latent, sizes.rope), -1)
        if sizes.rope:
            rope, key = self.rotary(rope, key.unsqueeze(1), step.positions)
        latent_write(key.flatten(1), self.norm(latent), cache, step.slots)
        how = {"scale": self.scale, "chosen": chosen, "pool": self.pool}
        mixed = latent_attention(rope, self.keys(nope), cache, step.rows, **how)
        return self.values(mixed).flatten(1)

    def _parts(self, chosen: Any) -> LatentParts:
        norm, tables = self.norm, self.rotary.tables
        matrices = tuple(self.keys.numbers), tuple(self.values.numbers)
        return LatentParts(self.sizes, norm.weight, norm.eps, *tables, *matrices, chosen, self.pool)
