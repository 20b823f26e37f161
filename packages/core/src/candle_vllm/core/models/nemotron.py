# SPDX-License-Identifier: MIT
"""Nemotron-4 and Minitron: the layers of `gpt.py` with rotary positions and a squared ReLU.

The norms are LayerNorms whose weights are stored less 1; by default half of each head rotates.
Sources: NVIDIA, 2024, arXiv:2402.16819 and arXiv:2407.14679.
"""

from __future__ import annotations

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import plus_one
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, pair, projections
from candle_vllm.core.models.family import DIVISORS, LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.gpt import Gpt, GptConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of nemotron."""
    fields.choice("hidden_act", "relu2", "relu2")
    shared = shared_from_hf(fields.with_absent(partial_rotary_factor=0.5, norm_eps=1e-5), model_type, eps="norm_eps")
    bias, mlp_bias = fields.get("attention_bias", bool, False), fields.get("mlp_bias", bool, False)
    return GptConfig(**shared, activation="relu2", qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptConfig:
    """Read GGUF metadata of nemotron."""
    return GptConfig(
        **shared_from_gguf(fields, checkpoint, eps=LAYER_NORM_EPS),
        activation="relu2",
        qkv_bias=gguf_has_bias(checkpoint),
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
        mlp_bias="blk.0.ffn_up.bias" in checkpoint.tensors,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_LAYER = "layers.{i}."


def _norm(target: str, hf: str, gguf: str) -> list[WeightName]:
    """The table rows of a LayerNorm."""
    weight, bias = pair(target, hf, gguf)
    return [WeightName(weight.target, weight.hf, weight.gguf, plus_one), bias]


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    *_norm(_LAYER + "attention_norm:", HF + "input_layernorm", GG + "attn_norm"),
    *projections(),
    *pair(_LAYER + "attention.output:", HF + "self_attn.o_proj", GG + "attn_output"),
    *_norm(_LAYER + "mlp_norm:", HF + "post_attention_layernorm", GG + "ffn_norm"),
    *pair(_LAYER + "mlp.up:", HF + "mlp.up_proj", GG + "ffn_up"),
    *pair(_LAYER + "mlp.down:", HF + "mlp.down_proj", GG + "ffn_down"),
    *_norm("norm:", "model.norm", "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


FAMILY = Family(
    hf={"NemotronForCausalLM": "nemotron"},
    gguf=("nemotron",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"nemotron": Architecture(name="nemotron", eps=LAYER_NORM_EPS, head=True, square=True, unread=(DIVISORS,))},
)
