# SPDX-License-Identifier: MIT
"""Config of nomic-bert, GTE (config.json only) and jina v3 from config.json and GGUF metadata; see `nomic_bert.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.rope import RopeConfig, rope_from_gguf, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    check_only,
    head_of,
    sizes_from_gguf,
    sizes_from_hf,
    types_from_gguf,
)
from candle_vllm.core.models.encoder_stack import StackConfig

NOMIC, GTE, JINA = "nomic_bert", "gte", "jina_embeddings_v3"
_THETAS = {NOMIC: 1000.0, GTE: 160000.0, JINA: 20000.0}
_BIASES = ("qkv_bias", "output_bias", "mlp_bias", "down_bias")
_FLAGS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {NOMIC: dict.fromkeys(_BIASES, False) | {"gate": "silu"}, GTE: {"mlp_bias": False, "gate": "gelu"}, JINA: {}}
)
# keys of nomic's repositories, and transformers' names for them; `_ONLY` has the implemented values of other keys
_PUBLISHED = MappingProxyType({
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_positions": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
})  # fmt: skip
_ONLY = MappingProxyType({
    "activation_function": "swiglu", "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "prenorm": False, "causal": False, "use_rms_norm": False, "rotary_emb_interleaved": False,
    "rotary_emb_fraction": 1.0, "parallel_block": False,
    "logn_attention_scale": False, "logn_attention_clip1": False, "layer_norm_type": "layer_norm",
    "rotary_emb_scale_base": None,
})  # fmt: skip
_DENSE = MappingProxyType({"num_experts": 0, "moe_every_n_layers": 0})
# implemented values of nomic v2, whose layers have no gates
_SPARSE = MappingProxyType({
    "activation_function": "gelu", "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True,
    "expert_choice_router": False, "num_shared_experts": 0,
})  # fmt: skip


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> StackConfig:
    """Read `config.json` of transformers' classes or of the published repositories."""
    period = fields.get("moe_every_n_layers", int, 0) if model_type == NOMIC else 0
    check_only(fields, model_type, {**_ONLY, **(_SPARSE if period else _DENSE)})
    fields = Fields(
        {"rope_theta": _THETAS[model_type]} | {_PUBLISHED.get(key, key): value for key, value in fields.values.items()},
        fields.path,
    )
    size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    position = fields.count("max_position_embeddings", 8192)
    if fields.get("rotary_scaling_factor", float, None) is not None:  # scaling begins beyond the trained positions
        position = fields.count("max_trained_positions", 2048)
    types = fields.get("type_vocab_size", int, 2 if model_type == NOMIC else 1)
    plain = model_type != NOMIC or period
    activation = fields.choice("hidden_act", "gelu" if plain else "silu", "silu", *ACTIVATIONS)
    flags = {} if period else dict(_FLAGS[model_type])
    if "gate" in flags:
        flags["gate"] = {**ACTIVATIONS, "silu": "silu"}[activation]
    if flags.get("gate", activation) == "relu" or (activation == "silu" and "gate" not in flags):
        raise UnsupportedModelError(f"{fields.path}: hidden_act is {activation}, which is not implemented")
    return StackConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=position - 2 if model_type == JINA else position,
        norm_eps=fields.get("layer_norm_eps", float, 1e-5 if model_type == JINA else 1e-12),
        token_types=max(types, 1),
        typed=types > 0,
        placed=False,
        rope=_rope(fields, size // heads, position),
        activation="gelu" if activation == "silu" else activation,
        **flags,
        **(_experts(fields, period, fields.count("intermediate_size")) | {"mixture_bias": True} if period else {}),
        **head_of(fields, scores=scores),
    )


def _rope(fields: Fields, head_dim: int, position: int) -> RopeConfig:
    """Rotary settings; "ntk" in GTE's repositories multiplies the base and divides all frequencies by a factor."""
    scaling = fields.section("rope_scaling")
    if scaling.get("type", str, "") != "ntk":
        return rope_from_hf(fields, head_dim, position)
    factor = scaling.get("factor", float)
    if scaling.get("mixed_b", float, None) is not None or not 1 <= factor <= 1e6:
        raise UnsupportedModelError(f"{fields.path}: rope_scaling is {scaling.values!r:.80}, which is not implemented")
    theta, divisor = fields.get("rope_theta", float) * factor, factor ** (2 / head_dim)
    return RopeConfig(theta=theta, dim=head_dim, kind="linear", factor=divisor)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> StackConfig:
    """Read GGUF metadata of nomic-bert, nomic-bert-moe and jina-bert-v3."""
    tensors, sizes = checkpoint.tensors, sizes_from_gguf(fields, checkpoint)
    model_type = JINA if fields.prefix.startswith("jina") else NOMIC
    stems = dict(zip(_BIASES, ("attn_qkv", "attn_output", "ffn_up", "ffn_down"), strict=True))
    there: dict[str, Any] = {name: f"blk.0.{stem}.bias" in tensors for name, stem in stems.items()}
    return StackConfig(
        model_type=model_type,
        **sizes,
        **types_from_gguf(checkpoint),
        placed=False,
        rope=rope_from_gguf(fields, sizes["hidden_size"] // sizes["num_heads"], sizes["max_position"]),
        gate="silu" if "blk.0.ffn_gate.weight" in tensors else "",
        **there,
        **(_experts_of_gguf(fields, sizes["intermediate_size"]) if "expert_count" in fields else {}),
    )


def _experts_of_gguf(fields: Fields, inner: int) -> dict[str, Any]:
    """Expert settings from GGUF metadata; files of llama.cpp do not store the bias of the experts' sum."""
    named = {"num_experts": fields.count("expert_count"), "moe_top_k": fields.count("expert_used_count")}
    return _experts(Fields(named, fields.path), fields.count("moe_every_n_layers"), inner)


def _experts(fields: Fields, period: int, inner: int) -> dict[str, Any]:
    """Expert settings of nomic v2: layers 1, 1 + period and so on have experts; a token uses 2 of 8 by default."""
    if period < 2 or fields.get("type_vocab_size", int, 1) > 1:
        said = "moe_every_n_layers below 2 or type_vocab_size above 1 is not implemented"
        raise UnsupportedModelError(f"{fields.path}: {said}")
    count, top = fields.count("num_experts", 8), fields.count("moe_top_k", 2)
    mixture = Mixture(experts=count, top_k=top, inner_size=inner, renormalise=False, activation="gelu")
    return {"mixture": mixture, "num_experts": count, "sparse_every": period}
