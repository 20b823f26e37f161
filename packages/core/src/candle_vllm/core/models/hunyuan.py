# SPDX-License-Identifier: MIT
"""Hunyuan V1, dense and A13B: the layers of Llama (`llama.py`) with QK norms after the rotary embedding.

If the config has an alpha, the rotary base is multiplied by alpha^(D / (D - 2)), where D is the head size. All layers
of A13B have experts and a shared expert. HunyuanOCR has M-RoPE with an axis more.
Sources: Tencent, 2025, "Hunyuan-A13B Technical Report", and arXiv:2511.19575.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias
from candle_vllm.core.models.experts import expert_names, in_all_layers, shared_names, size_keys
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.hunyuan_positions import section_keys, stretched, stretched_base, with_axes
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of hunyuan_v1_dense and hunyuan_v1_moe, and of HunyuanOCR's text model, which has M-RoPE."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    if fields.get("use_cla", bool, False):
        raise UnsupportedModelError(f"{fields.path}: use_cla is true: layers that share keys are not implemented")
    fields = fields.with_absent(head_dim=fields.values.get(f"{fields.prefix}attention_head_dim"))
    fields, sections = stretched(fields)
    shared = with_axes(shared_from_hf(fields, model_type), sections, fields.path)
    bias, normed = fields.get("attention_bias", bool, False), fields.get("use_qk_norm", bool, True)
    own: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "qk_norm": normed, "norms_behind": normed}
    if model_type == "hunyuan_v1_dense":
        return LlamaConfig(**shared | own)
    inner = shared["intermediate_size"]
    mixture = Mixture(
        experts=_same(fields, "num_experts"),
        top_k=_same(fields, "moe_topk"),
        inner_size=_same(fields, "moe_intermediate_size", inner),
        shared_size=inner * _same(fields, "num_shared_expert", 1),
    )
    return LlamaConfig(**shared | own, **in_all_layers(mixture, shared["num_layers"]))


def _same(fields: Fields, key: str, *default: int) -> int:
    """A count, which some files store as a list with one entry for each layer."""
    stored = fields.values.get(key)
    if not isinstance(stored, list):
        return fields.count(key, *default)
    if not stored or any(each != stored[0] for each in stored):
        raise UnsupportedModelError(f"{fields.path}: {key} differs from layer to layer, which is not implemented")
    return Fields({key: stored[0]}, fields.path).count(key)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of hunyuan-dense, hunyuan-moe and hunyuan_vl."""
    sections, alpha = fields.get("rope.dimension_sections", list, []), fields.get("rope.scaling.alpha", float, 0.0)
    values = {**fields.values, f"{fields.prefix}rope.dimension_sections": None}
    shared = with_axes(shared_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint), sections, fields.path)
    if alpha:
        theta = stretched_base(shared["rope"].theta, alpha, shared["head_dim"], fields.path)
        shared["rope"] = dataclasses.replace(shared["rope"], theta=theta)
    biases = {"qkv_bias": gguf_has_bias(checkpoint), "output_bias": "blk.0.attn_output.bias" in checkpoint.tensors}
    normed = "blk.0.attn_q_norm.weight" in checkpoint.tensors
    own: dict[str, Any] = biases | {"qk_norm": normed, "norms_behind": normed}
    if shared["model_type"] != "hunyuan-moe":
        return LlamaConfig(**shared | own)
    inner = shared["intermediate_size"]
    mixture = Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=inner,
        shared_size=fields.count("expert_shared_feed_forward_length", inner),
    )
    return LlamaConfig(**shared | own, **in_all_layers(mixture, shared["num_layers"]))


# ---- weight names ----------------------------------------------------------------------------------------------------

_NORMS = {"layers.{i}.attention.q_norm:weight": "query", "layers.{i}.attention.k_norm:weight": "key"}


def _renamed(line: WeightName) -> WeightName:
    """A row of Llama's weight names, with Hunyuan's names for QK norms."""
    part = _NORMS.get(line.target)
    return line if part is None else dataclasses.replace(line, hf=f"{HF}self_attn.{part}_layernorm.weight")


WEIGHTS = [
    *map(_renamed, llama.WEIGHTS),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *shared_names("mlp.shared_mlp"),
    WeightName("layers.{i}.mlp.router:weight", HF + "mlp.gate.wg.weight", GG + "ffn_gate_inp.weight"),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of the experts; llama.cpp has one size for experts and dense layers."""
    mixture = config.mixture
    if mixture.inner_size != config.intermediate_size:
        raise UnsupportedModelError("llama.cpp's hunyuan-moe has only experts as wide as intermediate_size")
    return size_keys(mixture) | {"expert_shared_feed_forward_length": mixture.shared_size, "expert_shared_count": 1}


FAMILY = Family(
    hf={"HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense", "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe"},
    gguf=("hunyuan-dense", "hunyuan-moe", "hunyuan_vl"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "hunyuan_v1_dense": Architecture(name="hunyuan-dense"),
        "hunyuan_v1_moe": Architecture(name="hunyuan-moe", more=gguf_keys, norm=True),
        "hunyuan_vl": Architecture(name="hunyuan_vl", more=section_keys),
    },
)
