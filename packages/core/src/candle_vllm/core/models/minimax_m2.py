# SPDX-License-Identifier: MIT
"""MiniMax M2 to M2.7: Llama's layers (`llama.py`), half of each head rotated, and experts in all layers.

Norms of q and k are over all heads at once, as in OLMoE; experts are scored by sigmoids and chosen with a correction
bias, as in DeepSeek-V3. Multi-token prediction layers are not loaded. Source: MiniMax, 2025, the model cards.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.experts import expert_count, expert_names, sigmoid_keys
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.models.olmoe import with_experts

# ---- config ----------------------------------------------------------------------------------------------------------

_SIGMOID = 2  # its number in GGUF metadata


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of minimax_m2, where `rotary_dim` is the rotated part of a head."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    fields.choice("scoring_func", "sigmoid", "sigmoid")
    fields.choice("qk_norm_type", "per_layer", "per_layer")
    for key, value in (("use_qk_norm", True), ("use_routing_bias", True), ("shared_intermediate_size", 0)):
        kind: type[Any] = type(value)
        if fields.get(key, kind, value) != value:
            raise UnsupportedModelError(f"{fields.path}: {key} other than {value} is not implemented for this model")
    if "rotary_dim" in fields:
        part = fields.count("rotary_dim") / fields.count("head_dim")
        if part > 1:
            raise InvalidFileError(f"{fields.path}: rotary_dim is larger than head_dim")
        fields = fields.with_absent(partial_rotary_factor=part)
    shared = shared_from_hf(fields.with_absent(rope_theta=5e6), model_type)
    mixture = Mixture(
        experts=expert_count(fields, "num_local_experts", "num_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=shared["intermediate_size"],
        scoring="sigmoid",
        correction=True,
    )
    return LlamaConfig(**shared, **with_experts(mixture, shared["num_layers"]))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of minimax-m2."""
    shared = shared_from_gguf(fields, checkpoint)
    shared["model_type"] = "minimax_m2"
    if (gating := fields.get("expert_gating_func", int, _SIGMOID)) != _SIGMOID:
        key = f"{fields.prefix}expert_gating_func"
        raise UnsupportedModelError(f"{fields.path}: {key} is {gating}; implemented: {_SIGMOID} (sigmoid)")
    mixture = Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=fields.count("expert_feed_forward_length"),
        scoring="sigmoid",
        scale=fields.get("expert_weights_scale", float, 0.0) or 1.0,
        correction=True,
    )
    return LlamaConfig(**shared, **with_experts(mixture, shared["num_layers"]))


# ---- weight names ----------------------------------------------------------------------------------------------------

_OLD, _NEW = HF + "block_sparse_moe.", HF + "mlp."
_ROUTERS = (_OLD + "gate.weight", _NEW + "gate.weight")
_CORRECTIONS = (_OLD + "e_score_correction_bias", _NEW + "e_score_correction_bias")

WEIGHTS = [
    *llama.WEIGHTS,
    WeightName("layers.{i}.mlp.router:weight", _ROUTERS, GG + "ffn_gate_inp.weight"),
    WeightName("layers.{i}.mlp.router:correction", _CORRECTIONS, GG + "exp_probs_b.bias"),
    *expert_names("block_sparse_moe.experts", "w1", "w3", "w2"),
]

FAMILY = Family(
    hf={"MiniMaxM2ForCausalLM": "minimax_m2"},
    gguf=("minimax-m2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"minimax_m2": Architecture(name="minimax-m2", more=sigmoid_keys, head=True, norm=True)},
)
