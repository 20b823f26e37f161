# SPDX-License-Identifier: MIT
"""Inkling: relative logits, short convolutions, and shared experts that the router weights beside the routed ones.

A block is x + conv(attention(norm(x))), then x + conv(mlp(norm(x))); keys and values have convolutions, too. The shared
experts are the last ones of a mixture, with a correction bias by which every token chooses them: a token's weights are
the sigmoids of its chosen experts, divided by their sum. Layers for multi-token prediction are not loaded.
Source: Thinking Machines, 2026; transformers' `InklingTextModel`. Shapes: T tokens, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import ExpertMLPs, SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models import llama
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gemma_parts import LayerScale
from candle_vllm.core.models.inkling_config import InklingConfig, config_from_hf
from candle_vllm.core.models.inkling_layers import Attention, Convolution, Growth
from candle_vllm.core.models.inkling_names import WEIGHTS, ignored
from candle_vllm.core.models.llama import Llama


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
