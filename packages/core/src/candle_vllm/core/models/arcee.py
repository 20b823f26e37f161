# SPDX-License-Identifier: MIT
"""Arcee AFM: Llama's layers (`llama.py`) with an MLP without a gate, whose activation is a squared ReLU.

Source: Arcee, 2025, the model card of AFM-4.5B.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, pair
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of arcee."""
    fields.choice("hidden_act", "relu2", "relu2")
    bias, mlp_bias = fields.get("attention_bias", bool, False), fields.get("mlp_bias", bool, False)
    return LlamaConfig(**shared_from_hf(fields, model_type), qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of arcee."""
    own: dict[str, Any] = {"qkv_bias": gguf_has_bias(checkpoint), "interleaved_rotary": True}
    return LlamaConfig(**shared_from_gguf(fields, checkpoint), **own)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """One decoder layer."""

    def feed_forward(self, config: LlamaConfig, layer: int, placement: Placement) -> MLP:
        """See `llama.Block`."""
        del layer
        size = (config.hidden_size, config.intermediate_size)
        return MLP(*size, placement, bias=config.mlp_bias, activation="relu2")


class Arcee(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    *(line for line in llama.WEIGHTS if ".mlp.gate_up:" not in line.target),
    *pair("layers.{i}.mlp.up:", HF + "mlp.up_proj", GG + "ffn_up"),
]

FAMILY = Family(
    hf={"ArceeForCausalLM": "arcee"},
    gguf=("arcee",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Arcee,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"arcee": Architecture(name="arcee", reordered=True, unread=())},
)
