# SPDX-License-Identifier: MIT
"""The first Qwen (1.8B to 72B): a Llama (`llama.py`) with other names, and queries, keys and values in one matrix.

Beyond `seq_length` tokens the model also needs a rotary base that depends on the length of the text
(`use_dynamic_ntk`) and queries that grow with the logarithm of their position (`use_logn_attn`), which are not
computed: the context ends there, as in vLLM 0.23. In shorter texts neither changes anything. GGUF files do not store
`seq_length`; their context is the stored one, as in llama.cpp.
Source: Bai et al., 2023, arXiv:2309.16609; `modeling_qwen.py` of its repositories.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import qkv_rows
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, gguf_projection
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of qwen, a model with remote code; `intermediate_size` counts the rows of w1 and of w2."""
    for key, name in (("visual", "Qwen-VL"), ("audio", "Qwen-Audio")):
        if key in fields:
            raise UnsupportedModelError(f"{fields.path}: {key} belongs to {name}, which is not implemented")
    for key in ("no_bias", "scale_attn_weights"):
        if not fields.get(key, bool, True):
            raise UnsupportedModelError(f"{fields.path}: {key} is false, which is not implemented")
    if (share := fields.get("rotary_pct", float, 1.0)) != 1:
        raise UnsupportedModelError(f"{fields.path}: rotary_pct is {share}, which is not implemented (only 1)")
    fields = fields.with_defaults(layer_norm_epsilon=1e-6, max_position_embeddings=8192)
    own = {
        "head_dim": fields.count("kv_channels", 128),
        "num_key_value_heads": fields.count("num_attention_heads"),
        "rope_theta": fields.get("rotary_emb_base", float, 10000.0),
        "max_position_embeddings": min(map(fields.count, ("max_position_embeddings", *_trained(fields)))),
    }
    shared = shared_from_hf(Fields({**fields.values, **own}, fields.path), model_type, eps="layer_norm_epsilon")
    return _config(shared, fields)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of qwen."""
    return _config(shared_from_gguf(fields, checkpoint), fields)


def _trained(fields: Fields) -> list[str]:
    """The key of the context in training, if the file has it."""
    return ["seq_length"] * ("seq_length" in fields)


def _config(shared: dict[str, Any], fields: Fields) -> LlamaConfig:
    """The config, in which the MLP has its own size."""
    if (both := shared["intermediate_size"]) % 2:
        raise InvalidFileError(f"{fields.path}: the size of w1 and w2 together is {both}, which is not even")
    return LlamaConfig(**shared | {"intermediate_size": both // 2}, qkv_bias=True)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _line(target: str, hf: str, gguf: str) -> WeightName:
    return WeightName(f"layers.{{i}}.{target}weight", f"transformer.h.{{i}}.{hf}.weight", f"{GG}{gguf}.weight")


WEIGHTS = [
    WeightName("embed:weight", "transformer.wte.weight", "token_embd.weight"),
    _line("attention_norm:", "ln_1", "attn_norm"),
    *(
        WeightName(
            f"layers.{{i}}.attention.qkv:{part}.{kind}",
            f"transformer.h.{{i}}.attn.c_attn.{kind}",
            gguf_projection(part, kind),
            qkv_rows(part),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ),
    _line("attention.output:", "attn.c_proj", "attn_output"),
    _line("mlp_norm:", "ln_2", "ffn_norm"),
    _line("mlp.gate_up:gate.", "mlp.w2", "ffn_gate"),
    _line("mlp.gate_up:up.", "mlp.w1", "ffn_up"),
    _line("mlp.down:", "mlp.c_proj", "ffn_down"),
    WeightName("norm:weight", "transformer.ln_f.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def gguf_keys(config: LlamaConfig) -> dict[str, Any]:
    """The size that files store, of w1 and w2 together."""
    return {"feed_forward_length": 2 * config.intermediate_size}


FAMILY = Family(
    hf={"QWenLMHeadModel": "qwen"},
    gguf=("qwen",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"qwen": Architecture(name="qwen", more=gguf_keys, names=lambda _: ("attn_qkv",), head=True, square=True)},
)
