# SPDX-License-Identifier: MIT
"""Inkling: relative logits instead of rotary positions, short convolutions, shared experts that the router weights.

A block is x + conv(attention(norm(x))), then x + conv(mlp(norm(x))); keys and values have convolutions, too. A
convolution of kernel size 4 or so is added to its input, which is 1 more in the newest tap. Relative logits are mixed
from learned profiles over the distance (`kernels/attention`). The router scores the shared experts beside the routed
ones: they are the last experts of the mixture, with a correction bias by which every token chooses them.
Multi-token prediction layers are not loaded. Source: Thinking Machines, 2026; transformers' `InklingTextModel`.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, P relative states of a head, X extent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import ExpertMLPs, SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models import llama, llama4
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gemma_parts import LayerScale
from candle_vllm.core.models.inkling_config import InklingConfig, config_from_hf
from candle_vllm.core.models.inkling_names import WEIGHTS, ignored
from candle_vllm.core.models.llama import Llama


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


class Experts(ExpertMLPs):
    """The experts' feed-forward layers; the parameters of shared experts are gate.shared0.weight, and so on."""

    def __init__(self, config: InklingConfig, placement: Placement) -> None:
        assert config.mixture is not None
        super().__init__(config.hidden_size, config.mixture, placement)
        self._routed = config.num_experts

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        found = {}
        for name, parameter in super().parameters().items():
            part, number, kind = name.split(".")
            shared = int(number) - self._routed
            found[name if shared < 0 else f"{part}.shared{shared}.{kind}"] = parameter
        return found


class MoE(SparseMLP):
    """Routed and shared experts: x [T, E] -> [T, E]."""

    def __init__(self, config: InklingConfig, placement: Placement) -> None:
        assert config.mixture is not None
        super().__init__(config.hidden_size, config.mixture, placement)
        self._config = config
        self.experts = Experts(config, placement)

    def leave_to_host(self, placement: Placement) -> None:
        """See `SparseMLP.leave_to_host`."""
        super().leave_to_host(placement)
        self.experts = Experts(self._config, placement)


class DenseMLP(GatedMLP):
    """SwiGLU times a stored scalar: x [T, E] -> [T, E]."""

    def __init__(self, config: InklingConfig, placement: Placement) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, placement)
        self.scale = LayerScale(placement)

    def __call__(self, x: Value) -> Value:
        return self.scale(super().__call__(x))


class Block(llama.Block):
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: InklingConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        width = {"x": config.hidden_size}
        self.attention_conv, self.mlp_conv = (Convolution(config, layer, part, width, placement) for part in (1, 2))

    def mixer(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> Attention:
        """See `llama.Block`."""
        del rotary
        return Attention(config, layer, placement)

    def feed_forward(self, config: Any, layer: int, placement: Placement) -> MoE | DenseMLP:
        """See `llama.Block`."""
        return MoE(config, placement) if layer in config.sparse_layers else DenseMLP(config, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        mixed = self.attention_conv(self.attention(normed, step), step)
        normed, residual = self.mlp_norm.add(mixed, residual)
        return self.mlp_conv(self.mlp(normed), step), residual


class Inkling(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: InklingConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.embed_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.growth = None if config.growth is None else Growth(config.growth, config.max_position, placement)
        for window, layer in zip(config.sliding_windows, self.layers, strict=True):
            if window is None and isinstance(layer, Block):
                assert isinstance(layer.attention, Attention)
                layer.attention.growth = self.growth

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        if self.growth is not None:
            self.growth.prepare(positions)

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`."""
        return side_by_side(self.embed_norm(super().start(token_ids, step)))


FAMILY = Family(
    hf={"InklingForCausalLM": "inkling_text"},
    config_from_hf=config_from_hf,
    build=Inkling,
    weights=WEIGHTS,
    ignored=ignored,
)
