# SPDX-License-Identifier: MIT
"""OLMoE: Llama's layers (`llama.py`) with norms over all heads of q and of k at once, and experts in all layers.

The chosen experts' scores are their weights, without normalisation. Source: Muennighoff et al., 2024, arXiv:2409.02060.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias
from candle_vllm.core.models.experts import count_keys, expert_count, expert_names, in_all_layers
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of olmoe."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    if (clip := fields.get("clip_qkv", float, None)) is not None:
        raise UnsupportedModelError(
            f"{fields.path}: clip_qkv is {clip}, which is not implemented; published OLMoE has none"
        )
    shared = shared_from_hf(fields, model_type)
    mixture = Mixture(
        experts=expert_count(fields, "num_experts", "num_local_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=shared["intermediate_size"],
        renormalise=fields.get("norm_topk_prob", bool, False),
    )
    bias = fields.get("attention_bias", bool, False)
    return LlamaConfig(**shared, qkv_bias=bias, output_bias=bias, **with_experts(mixture, shared["num_layers"]))


def with_experts(mixture: Mixture, layers: int) -> dict[str, Any]:
    """The config fields of experts in all layers, and of norms over all heads at once."""
    return in_all_layers(mixture, layers) | {"qk_norm": True, "whole_norms": True}


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of olmoe."""
    shared = shared_from_gguf(fields, checkpoint)
    mixture = Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=shared["intermediate_size"],
        renormalise=fields.get("expert_weights_norm", bool, False),
    )
    output_bias = "blk.0.attn_output.bias" in checkpoint.tensors
    own = {"qkv_bias": gguf_has_bias(checkpoint), "output_bias": output_bias}
    return LlamaConfig(**shared, **own, **with_experts(mixture, shared["num_layers"]))


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    *llama.WEIGHTS,
    WeightName("layers.{i}.mlp.router:weight", HF + "mlp.gate.weight", GG + "ffn_gate_inp.weight"),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
]

FAMILY = Family(
    hf={"OlmoeForCausalLM": "olmoe"},
    gguf=("olmoe",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "olmoe": Architecture(
            name="olmoe", more=lambda config: count_keys(config.mixture), head=True, square=True, norm=False
        )
    },
)
