# SPDX-License-Identifier: MIT
"""Hunyuan 3 (Hy3): Llama's layers (`llama.py`) with QK norms, and experts in most layers.

Experts are scored by sigmoids and chosen with a correction bias, as in DeepSeek-V3; a shared expert is added.
Multi-token prediction layers are not loaded. Source: Tencent, 2026, the model card of Hy3.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import glm4_moe, llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias
from candle_vllm.core.models.experts import (
    dense_layers,
    expert_count,
    expert_names,
    shared_names,
    sigmoids_from_gguf,
    sparse_in_gguf,
    ungrouped,
    without_next_tokens,
)
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.glm4_moe import ignored
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of hy_v3."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    for key in ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        if not fields.get(key, bool, True):
            raise UnsupportedModelError(f"{fields.path}: {key} is false, which is not implemented for this model")
    shared = shared_from_hf(fields.with_absent(rope_theta=11158840.0), model_type)
    inner, layers = fields.count("moe_intermediate_size"), shared["num_layers"]
    mixture = Mixture(
        experts=expert_count(fields, "num_experts", "num_local_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=inner,
        scoring="sigmoid",
        scale=fields.get("router_scaling_factor", float, 2.826),
        correction=True,
        shared_size=inner * fields.get("num_shared_experts", int, 1),
    )
    bias = fields.get("attention_bias", bool, False)
    own: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": fields.get("mlp_bias", bool, False)}
    sparse = frozenset(range(max(dense_layers(fields, layers, 1), 0), layers))
    return LlamaConfig(**shared, **own, **_with(mixture, sparse))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of hy_v3."""
    shared = shared_from_gguf(fields, checkpoint)
    layers = without_next_tokens(fields, shared["num_layers"])
    shared |= {"num_layers": layers, "sliding_windows": shared["sliding_windows"][:layers]}
    shared_size = fields.count("expert_shared_feed_forward_length", fields.count("expert_feed_forward_length"))
    mixture = sigmoids_from_gguf(fields, shared_size=shared_size)
    own: dict[str, Any] = {
        "qkv_bias": gguf_has_bias(checkpoint),
        "output_bias": "blk.0.attn_output.bias" in checkpoint.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in checkpoint.tensors,
    }
    return LlamaConfig(**shared, **own, **_with(mixture, sparse_in_gguf(checkpoint, layers)))


def _with(mixture: Mixture, sparse: frozenset[int]) -> dict[str, Any]:
    return {"mixture": mixture, "num_experts": mixture.experts, "sparse_layers": sparse, "qk_norm": True}


# ---- weight names ----------------------------------------------------------------------------------------------------

_MLP, _ROUTER = HF + "mlp.", "layers.{i}.mlp.router:"
_GATES = (_MLP + "router.gate.weight", _MLP + "gate.weight")
_CORRECTIONS = (_MLP + "expert_bias", _MLP + "e_score_correction_bias")
_SHARED = zip(shared_names("mlp.shared_mlp"), shared_names("mlp.shared_experts"), strict=True)

WEIGHTS = [
    *llama.WEIGHTS,
    WeightName(_ROUTER + "weight", _GATES, GG + "ffn_gate_inp.weight"),
    WeightName(_ROUTER + "correction", _CORRECTIONS, (GG + "exp_probs_b", GG + "exp_probs_b.bias")),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *(WeightName(old.target, (str(old.hf), str(new.hf)), old.gguf) for old, new in _SHARED),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of a Hy3 in addition to the keys of every model."""
    return glm4_moe.gguf_keys(config) | {"expert_shared_feed_forward_length": config.mixture.shared_size}


FAMILY = Family(
    hf={"HYV3ForCausalLM": "hy_v3"},
    gguf=("hy_v3",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"hy_v3": Architecture(name="hy_v3", more=gguf_keys, otherwise=ungrouped)},
)
