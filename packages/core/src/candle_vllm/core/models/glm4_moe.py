# SPDX-License-Identifier: MIT
"""GLM-4-MoE (GLM-4.5, 4.6, 4.7, Air), with partly rotated heads, and Solar-Open: Llama's layers and experts.

Experts are scored by sigmoids and chosen with a correction bias, within groups, as in DeepSeek-V3; a shared expert is
added. Multi-token prediction layers, which follow the last layer, are not loaded.
"""

from __future__ import annotations

import re
from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import axes_keys, gguf_has_bias
from candle_vllm.core.models.experts import (
    GG,
    HF,
    routed_keys,
    routed_names,
    sigmoids_from_gguf,
    sigmoids_from_hf,
    sparse_in_gguf,
    ungrouped,
    without_next_tokens,
)
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of glm4_moe and solar_open, which by default rotates whole heads and has no dense layer."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    solar = model_type == "solar_open"
    inner = fields.count("moe_intermediate_size")
    usual: dict[str, Any] = {"intermediate_size": inner, "rope_theta": 1e6} if solar else {"partial_rotary_factor": 0.5}
    shared = shared_from_hf(fields.with_absent(**usual), model_type)
    layers, dense = shared["num_layers"], fields.get("first_k_dense_replace", int, 0 if solar else 1)
    shared_experts = fields.get("n_shared_experts", int, 1)
    mixture = sigmoids_from_hf(fields, shared_size=inner * shared_experts)
    return LlamaConfig(
        **shared
        | {
            "qkv_bias": fields.get("attention_bias", bool, False),
            "qk_norm": fields.get("use_qk_norm", bool, False),
            "mixture": mixture,
            "num_experts": mixture.experts,
            "sparse_layers": frozenset(range(max(dense, 0), layers)),
        }
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of glm4moe."""
    shared, tensors = shared_from_gguf(fields, checkpoint), checkpoint.tensors
    layers = without_next_tokens(fields, shared["num_layers"])
    shared |= {"num_layers": layers, "sliding_windows": shared["sliding_windows"][:layers]}
    mixture = sigmoids_from_gguf(
        fields,
        shared_size=fields.count("expert_feed_forward_length") * fields.get("expert_shared_count", int, 0),
        correction=any(name.endswith("exp_probs_b.bias") for name in tensors),
    )
    return LlamaConfig(
        **shared,
        qkv_bias=gguf_has_bias(checkpoint),
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        mixture=mixture,
        num_experts=mixture.experts,
        sparse_layers=sparse_in_gguf(checkpoint, layers),
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_NORM = "layers.{i}.mlp_norm:weight"

WEIGHTS = [
    *(line for line in llama.WEIGHTS if line.target != _NORM),
    WeightName(_NORM, HF + "post_attention_layernorm.weight", GG + "post_attention_norm.weight"),
    *routed_names("mlp.gate.e_score_correction_bias"),
]


def ignored(config: LlamaConfig) -> list[str]:
    """Names that Llama ignores, and multi-token prediction layers."""
    return [*llama.ignored(config), *later_layers(config.num_layers)]


def later_layers(layers: int) -> list[str]:
    """Patterns of the tensors of up to 8 layers from index `layers` on."""
    numbers = "|".join(re.escape(str(layers + index)) for index in range(8))
    return [rf"model\.layers\.({numbers})\..*", rf"blk\.({numbers})\..*"]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of the experts; the dense layers are the first ones, as for `first_k_dense_replace`."""
    dense = config.num_layers - len(config.sparse_layers)
    return axes_keys(config) | routed_keys(config.mixture) | {"leading_dense_block_count": dense}


FAMILY = Family(
    hf={"Glm4MoeForCausalLM": "glm4_moe", "SolarOpenForCausalLM": "solar_open"},
    gguf=("glm4moe",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf=dict.fromkeys(
        ("glm4_moe", "solar_open"), Architecture(name="glm4moe", more=gguf_keys, otherwise=ungrouped)
    ),
)
