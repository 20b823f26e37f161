# SPDX-License-Identifier: MIT
"""Pico decoder and BeetleLM: a Llama (`llama.py`) with other names, and rotary positions in pairs of neighbours.

Sources: Diehl Martinez et al., 2025, arXiv:2509.16413; `pico_decoder.py` of the repositories.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------

_KEYS = {
    "hidden_size": "d_model",
    "intermediate_size": "activation_hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "attention_n_heads",
    "num_key_value_heads": "attention_n_kv_heads",
    "max_position_embeddings": "max_seq_len",
}


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of pico_decoder, a model with remote code; 0 key-value heads means one for each head."""
    values = dict(fields.values) | {"rope_theta": fields.get("position_emb_theta", float, 10000.0)}
    if type(heads := values.get("attention_n_kv_heads")) is int and not heads:
        values["attention_n_kv_heads"] = None
    return LlamaConfig(
        **shared_from_hf(Fields(values, fields.path), model_type, eps="norm_eps", names=_KEYS), interleaved_rotary=True
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_NAMES = {  # Llama's names, and Pico's
    "model.embed_tokens.": "embedding_proj.",
    "model.norm.": "output_norm.",
    "lm_head.": "de_embedding_proj.",
    "model.layers.": "layers.",
    ".self_attn.": ".attention.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".swiglu_norm.",
    ".mlp.gate_proj.": ".swiglu.w_0.",
    ".mlp.up_proj.": ".swiglu.w_1.",
    ".mlp.down_proj.": ".swiglu.w_2.",
}


def _renamed(line: WeightName) -> WeightName:
    """A row of Llama's table with Pico's name, with and without the prefix of its wrapper."""
    name = line.hf
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours) if isinstance(name, str) else name
    return dataclasses.replace(line, hf=(name, f"pico_decoder.{name}") if isinstance(name, str) else name)


FAMILY = Family(
    hf={"PicoDecoderHF": "pico_decoder"},
    config_from_hf=config_from_hf,
    build=Llama,
    weights=[_renamed(line) for line in llama.WEIGHTS],
    ignored=llama.ignored,
    as_gguf={"pico_decoder": llama.FAMILY.as_gguf["llama"]},
)
