# SPDX-License-Identifier: MIT
"""Ling 2.0 (Bailing MoE V2) and Sarvam-30B: GLM-4-MoE (`glm4_moe.py`) with other names, and one matrix for q, k and v.

Experts are scored by sigmoids and chosen with a correction bias, within groups; a shared expert is added, and the first
layers are dense. Each head of q and k has a norm; half of each head of Ling rotates. Layers for draft tokens are not
loaded. Source: Ling Team, 2025, arXiv:2510.22115.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import qkv_rows
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import glm4_moe, llama
from candle_vllm.core.models.attention_names import HF, also_named, gguf_has_bias, gguf_projection
from candle_vllm.core.models.experts import (
    dense_layers,
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

_ONLY = {"use_bias": False, "norm_head": False, "use_qk_norm": True, "use_rmsnorm": True}
_ONLY |= {"moe_router_enable_expert_bias": True, "score_function": "sigmoid"}
"""Keys of which one value is implemented, which is also the default."""


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of bailing_moe_v2 and sarvam_moe, models with remote code."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    for key, only in _ONLY.items():
        if (found := fields.values.get(key)) not in (only, None):
            raise UnsupportedModelError(f"{fields.path}: {key} is {found!r:.20}; implemented: {only}")
    share = 1.0 if model_type == "sarvam_moe" else 0.5
    if "rotary_dim" in fields:
        heads = fields.count("hidden_size") // fields.count("num_attention_heads")
        share = fields.count("rotary_dim") / fields.count("head_dim", max(heads, 1))
    shared = shared_from_hf(fields.with_absent(partial_rotary_factor=share), model_type)
    layers, inner = shared["num_layers"], fields.count("moe_intermediate_size")
    size = fields.count("moe_shared_expert_intermediate_size", inner) * fields.get("num_shared_experts", int, 1)
    mixture, dense = sigmoids_from_hf(fields, shared_size=size), dense_layers(fields, layers, 1)
    bias = fields.get("use_qkv_bias", bool, False)
    return LlamaConfig(**shared, qkv_bias=bias, **_with(mixture, frozenset(range(max(dense, 0), layers))))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of bailingmoe2."""
    shared = shared_from_gguf(fields, checkpoint)
    layers = without_next_tokens(fields, shared["num_layers"])
    shared |= {"num_layers": layers, "sliding_windows": shared["sliding_windows"][:layers]}
    inner, count = fields.count("expert_feed_forward_length"), fields.get("expert_shared_count", int)
    size = fields.count("expert_shared_feed_forward_length", inner) * count
    corrected = any(name.endswith("exp_probs_b.bias") for name in checkpoint.tensors)
    mixture = sigmoids_from_gguf(fields, shared_size=size, correction=corrected)
    sparse = sparse_in_gguf(checkpoint, layers)
    return LlamaConfig(**shared, qkv_bias=gguf_has_bias(checkpoint), **_with(mixture, sparse))


def _with(mixture: Mixture, sparse: frozenset[int]) -> dict[str, Any]:
    return {"mixture": mixture, "num_experts": mixture.experts, "sparse_layers": sparse, "qk_norm": True}


# ---- weight names ----------------------------------------------------------------------------------------------------

_FUSED, _TARGET = HF + "attention.query_key_value.", "layers.{i}.attention.qkv:"
_OWN = {
    "embed:weight": "model.word_embeddings.weight",
    "attention.q_norm:weight": HF + "attention.query_layernorm.weight",
    "attention.k_norm:weight": HF + "attention.key_layernorm.weight",
    "attention.output:weight": HF + "attention.dense.weight",
}
WEIGHTS = [
    *(line for line in also_named(llama.WEIGHTS, _OWN) if not line.target.startswith(_TARGET)),
    *(
        WeightName(f"{_TARGET}{part}.{kind}", _FUSED + kind, gguf_projection(part, kind), qkv_rows(part))
        for part in "qkv"
        for kind in ("weight", "bias")
    ),
    *routed_names("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of this model in addition to the keys of every model; the shared experts have a length each."""
    keys = glm4_moe.gguf_keys(config)
    length = config.mixture.shared_size // max(keys["expert_shared_count"], 1)
    return keys | {"expert_shared_feed_forward_length": length}


_IN_GGUF = Architecture(
    name="bailingmoe2", more=gguf_keys, otherwise=ungrouped, names=lambda _: ("attn_qkv",), head=True
)

FAMILY = Family(
    hf={"BailingMoeV2ForCausalLM": "bailing_moe_v2", "SarvamMoEForCausalLM": "sarvam_moe"},
    gguf=("bailingmoe2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=glm4_moe.ignored,
    as_gguf={"bailing_moe_v2": _IN_GGUF, "sarvam_moe": _IN_GGUF},
)
