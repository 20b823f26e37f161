# SPDX-License-Identifier: MIT
"""Llama 4 (Scout, Maverick): attention within chunks, layers without positions, and experts with scaled inputs.

In layers with rotary positions a token attends only to its chunk of the context, and heads of q and k are normalised.
Every fourth layer has no positions and no chunks, and its queries grow with their position. In layers with experts a
token has the shared expert, and one routed expert, whose input is multiplied by the router's sigmoid.
Source: Meta, 2025, "Llama 4 model card". Shapes: T tokens, H heads, K key-value heads, D head size, E hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from candle_vllm.core.kernels.position_scale import position_scale
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.rope import attention_scale
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import transposed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.experts import expert_names, shared_names
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama
from candle_vllm.core.models.llama4_config import Llama4Config, config_from_gguf, config_from_hf, gguf_keys


class Growth:
    """Multiplies queries [T, H, D] by the factor of their position; see `Llama4Config.temperature`."""

    def __init__(self, temperature: tuple[int, float], max_position: int, placement: Placement) -> None:
        self._temperature, self._most, self._placement = temperature, max_position, placement
        self._factors: Value | None = None

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        (length, growth), last = self._temperature, np.arange(1, positions + 1, dtype=np.int64)
        if self._factors is None or len(self._factors) < positions:
            self._factors = self._placement.constant((1 + growth * np.log1p(last // length)).astype(np.float32))

    def __call__(self, q: Value, positions: Value) -> Value:
        if self._factors is None:
            self.prepare(self._most)
        assert self._factors is not None
        return q if len(self._factors) < self._temperature[0] else position_scale(q, positions, self._factors)


class Attention(llama.Attention):
    """Grouped-query attention within chunks, or over all tokens and without positions: x [T, E] -> [T, E]."""

    growth: Growth | None = None

    def __init__(self, config: Llama4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        attend, window = self.attend, config.sliding_windows[layer]
        attend.window = None if window is None else -window
        if config.same_length and layer not in config.unrotated_layers:
            norms = (RMSNorm(config.head_dim, config.norm_eps, placement, weighted=False) for _ in range(2))
            attend.q_norm, attend.k_norm = norms
            attend.norms_behind = attention_scale(config.rope) != 1  # norms undo the scale

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        q = q if self.growth is None else self.growth(q, step.positions)
        return self.output(self.attend(q, k, v, step).flatten(1))


class Block(llama.Block):
    """One decoder layer."""

    def mixer(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> Attention:
        """See `llama.Block`."""
        return Attention(config, layer, rotary, placement)


class Llama4(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: Llama4Config, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.growth = None
        if config.temperature is not None:
            self.growth = Growth(config.temperature, config.max_position, placement)
        for number, layer in enumerate(self.layers):
            if number in config.unrotated_layers and isinstance(layer, Block):
                assert isinstance(layer.attention, Attention)
                layer.attention.growth = self.growth

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        super().prepare(positions)
        if self.growth is not None:
            self.growth.prepare(positions)


_MLP, _FEED = "layers.{i}.mlp.", HF + "feed_forward."
WEIGHTS = [
    *(line for line in llama.WEIGHTS if not line.target.startswith(_MLP)),
    *(
        WeightName(f"{_MLP}{to}weight", f"{_FEED}{part}_proj.weight", f"{GG}ffn_{part}.weight")
        for to, part in {"gate_up:gate.": "gate", "gate_up:up.": "up", "down:": "down"}.items()
    ),
    WeightName(_MLP + "router:weight", _FEED + "router.weight", GG + "ffn_gate_inp.weight"),
    *expert_names("feed_forward.experts", "gate_proj", "up_proj", "down_proj", upright=transposed),
    *shared_names("feed_forward.shared_expert"),
]

FAMILY = Family(
    hf={"Llama4ForCausalLM": "llama4_text"},
    gguf=("llama4",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama4,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"llama4_text": Architecture(name="llama4", more=gguf_keys, interleaved=True, unread=())},
)
