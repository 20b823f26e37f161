# SPDX-License-Identifier: MIT
"""ChatGLM 2 and 3, and GLM-4-9B-Chat as remote code: the layers of GLM (`glm4.py`) under other tensor names.

Queries, keys and values are one fused matrix. Source: Team GLM, 2024, arXiv:2406.12793.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.loading.views import chain, qkv_rows
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import glm4
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.glm4 import Glm, GlmConfig

# ---- config ----------------------------------------------------------------------------------------------------------

_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "multi_query_group_num",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "seq_length",
}
_USUAL = {  # values of all published models, which are the implemented ones
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}


def config_from_hf(fields: Fields, model_type: str) -> GlmConfig:
    """Read `config.json` of chatglm, a model with remote code."""
    for key, usual in _USUAL.items():
        if fields.get(key, bool, usual) is not usual:
            raise UnsupportedModelError(f"{fields.path}: {key} is {str(not usual).lower()}, which is not implemented")
    own = {
        "head_dim": fields.count("kv_channels"),
        "vocab_size": fields.count("padded_vocab_size"),
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0 * fields.get("rope_ratio", float, 1.0),
    }
    if not fields.get("multi_query_attention", bool, False):
        own["multi_query_group_num"] = fields.count("num_attention_heads")
    shared = shared_from_hf(
        Fields({**fields.values, **own}, fields.path), model_type, eps="layernorm_epsilon", names=_NAMES
    )
    bias = fields.get("add_qkv_bias", bool, False)
    return GlmConfig(**shared, qkv_bias=bias, sandwich=False, interleaved_rotary=True)


# ---- weight names ----------------------------------------------------------------------------------------------------

_LAYER, _QKV = "transformer.encoder.layers.{i}.", "layers.{i}.attention.qkv:"
_OWN = {
    "embed:weight": "transformer.embedding.word_embeddings.weight",
    "layers.{i}.attention_norm:weight": _LAYER + "input_layernorm.weight",
    "layers.{i}.attention.output:weight": _LAYER + "self_attention.dense.weight",
    "layers.{i}.mlp_norm:weight": _LAYER + "post_attention_layernorm.weight",
    "layers.{i}.mlp.gate_up:weight": _LAYER + "mlp.dense_h_to_4h.weight",
    "layers.{i}.mlp.down:weight": _LAYER + "mlp.dense_4h_to_h.weight",
    "norm:weight": "transformer.encoder.final_layernorm.weight",
    "head:weight": "transformer.output_layer.weight",
}


def _renamed(line: WeightName) -> WeightName:
    """A row of GLM's weight names with ChatGLM's name; q, k and v are rows of one matrix."""
    if not line.target.startswith(_QKV):
        return dataclasses.replace(line, hf=_OWN.get(line.target))
    part, kind = line.target.removeprefix(_QKV).split(".")
    name = f"{_LAYER}self_attention.query_key_value.{kind}"
    return dataclasses.replace(line, hf=name, hf_view=chain(qkv_rows(part), line.hf_view or chain()))


WEIGHTS = [_renamed(line) for line in glm4.WEIGHTS]


def ignored(config: GlmConfig) -> list[str]:
    """Tensors that GLM ignores, and the rotary frequencies that old checkpoints store."""
    return [*glm4.ignored(config), r"transformer\.rotary_pos_emb\.inv_freq"]


FAMILY = Family(
    hf={"ChatGLMModel": "glm", "ChatGLMForConditionalGeneration": "glm"},
    config_from_hf=config_from_hf,
    config_from_gguf=glm4.config_from_gguf,
    build=Glm,
    weights=WEIGHTS,
    ignored=ignored,
)
