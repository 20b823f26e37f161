# SPDX-License-Identifier: MIT
"""Attention and short convolutions of Inkling.

Attention has relative logits, which are mixed from learned profiles over the distance (`kernels/attention`), in place
of rotary positions. A convolution is added to its input, so its newest tap is 1 larger than the stored one. Source:
transformers' `InklingAttention` and `InklingShortConvolution`. Shapes: T tokens, H heads, K key-value heads, D head
size, E hidden, C channels, P relative states of a head, X extent of the profiles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models import llama4
from candle_vllm.core.models.inkling_config import InklingConfig


class Growth(llama4.Growth):
    """Multiplies heads [T, H, D] by the factor of their position; see `InklingConfig.growth`."""

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        (floor, growth), count = self._temperature, np.arange(1, positions + 1)
        if self._factors is None or len(self._factors) < positions:
            factors = 1 + growth * np.log(np.maximum(count / floor, 1))
            self._factors = self._placement.constant(factors.astype(np.float32))


class Convolution:
    """Short convolution added to its input: x [T, C] -> [T, C]; its parts are the parameters "k" and "v", or "x".

    Args:
        layer, part: the layer, and the part of its state.
        parts: channels of each part.
    """

    def __init__(self, config: InklingConfig, layer: int, part: int, parts: dict[str, int], place: Placement) -> None:
        self.cache, self.part, self.parts = config.num_layers + layer, part, parts
        self.taps = place.empty(sum(parts.values()), config.taps)

    def __call__(self, x: Value, step: StepInput) -> Value:
        return short_conv(x, self.taps, None, step.caches[self.cache][self.part], step.states)

    def finish(self) -> None:
        """See `Finishes`."""
        self.taps[:, -1] += 1

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        ends = np.cumsum([*self.parts.values()]).tolist()
        places = zip(self.parts.items(), ends, strict=True)
        return {name: TensorParameter(self.taps[end - size : end]) for (name, size), end in places}


class Attention:
    """Grouped-query attention with relative logits: x [T, E] -> [T, E]; its parameter "profiles" is [P, X]."""

    growth: Growth | None = None

    def __init__(self, config: InklingConfig, layer: int, placement: Placement) -> None:
        (heads, kv_heads), dim, eps = config.heads(layer), config.head_dims[layer], config.norm_eps
        self.sizes, self.head_dim = (heads * dim, kv_heads * dim, kv_heads * dim), dim
        self.relative = heads * config.relative_size, config.relative_size
        shards = dict[str, int](zip("qkvr", (*self.sizes, self.relative[0]), strict=True))
        self.qkv = Linear(config.hidden_size, shards, placement)
        self.conv = Convolution(config, layer, 0, dict(zip("kv", self.sizes[1:])), placement)
        self.q_norm, self.k_norm = (RMSNorm(dim, eps, placement) for _ in range(2))
        self.profiles = placement.empty(config.relative_size, config.extents[layer])
        self.attend = PagedAttention(layer, dim, None, window=config.sliding_windows[layer], scale=1 / dim)
        self.output = Linear(heads * dim, config.hidden_size, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, kv, r = self.qkv(x).split((self.sizes[0], 2 * self.sizes[1], self.relative[0]), dim=-1)
        parts = side_by_side(q, self.conv(kv, step)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        q, k, r = self.q_norm(q), self.k_norm(k), r.unflatten(-1, (-1, self.relative[1]))
        if self.growth is not None:
            q, r = self.growth(q, step.positions), self.growth(r, step.positions)
        return self.output(self.attend(q, k, v, step, (r, self.profiles)).flatten(1))

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"profiles": TensorParameter(self.profiles)}
