# SPDX-License-Identifier: MIT
"""EXAONE 3 and 3.5: a Llama (`llama.py`) with other names of config keys and tensors.

Source: LG AI Research, 2024, arXiv:2412.04862.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.family import BIASES, Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of exaone, a model with remote code."""
    fields.choice("activation_function", "silu", "silu")
    if "num_layers" in fields:
        fields = Fields({"num_hidden_layers": fields.count("num_layers"), **fields.values}, fields.path)
    return LlamaConfig(**shared_from_hf(fields, model_type, eps="layer_norm_epsilon"))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of exaone."""
    return LlamaConfig(**shared_from_gguf(fields, checkpoint))


# ---- weight names ----------------------------------------------------------------------------------------------------

_NAMES = {  # Llama's names, and EXAONE's; they are replaced in order, so a name precedes those that it begins with
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "model.norm.": "transformer.ln_f.",
    ".self_attn.o_proj.": ".attn.attention.out_proj.",
    ".self_attn.": ".attn.attention.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".mlp.gate_proj.": ".mlp.c_fc_0.",
    ".mlp.up_proj.": ".mlp.c_fc_1.",
    ".mlp.down_proj.": ".mlp.c_proj.",
}


def _renamed(line: WeightName) -> WeightName:
    """A row of Llama's table with EXAONE's name."""
    name = line.hf
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours) if isinstance(name, str) else name
    return dataclasses.replace(line, hf=name)


WEIGHTS = [_renamed(line) for line in llama.WEIGHTS]

FAMILY = Family(
    hf={"ExaoneForCausalLM": "exaone"},
    gguf=("exaone",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"exaone": Architecture(name="exaone", unread=BIASES)},
)
