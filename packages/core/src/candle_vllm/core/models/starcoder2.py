# SPDX-License-Identifier: MIT
"""StarCoder 2: Llama's rotary grouped-query attention in a block of LayerNorms, biases and an MLP without a gate.

Source: Lozhkov et al., 2024, arXiv:2402.19173.
"""

from __future__ import annotations

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, pair, projections, window_keys
from candle_vllm.core.models.family import DIVISORS, LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.gpt import Gpt, GptConfig, activation_of

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of starcoder2; a window applies to all layers."""
    shared = shared_from_hf(fields.with_defaults(tie_word_embeddings=True), model_type, eps="norm_epsilon")
    shared["sliding_windows"] = (fields.count("sliding_window", None),) * shared["num_layers"]
    bias = fields.get("use_bias", bool, True)
    activation = activation_of(fields, "hidden_act", "gelu_pytorch_tanh")
    return GptConfig(**shared, activation=activation, qkv_bias=bias, output_bias=bias, mlp_bias=bias)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptConfig:
    """Read GGUF metadata of starcoder2."""
    return GptConfig(
        **shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon"),
        qkv_bias=gguf_has_bias(checkpoint),
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
        mlp_bias="blk.0.ffn_up.bias" in checkpoint.tensors,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_LAYER = "layers.{i}."

WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    *pair(_LAYER + "attention_norm:", HF + "input_layernorm", GG + "attn_norm"),
    *projections(),
    *pair(_LAYER + "attention.output:", HF + "self_attn.o_proj", GG + "attn_output"),
    *pair(_LAYER + "mlp_norm:", HF + "post_attention_layernorm", GG + "ffn_norm"),
    *pair(_LAYER + "mlp.up:", HF + "mlp.c_fc", GG + "ffn_up"),
    *pair(_LAYER + "mlp.down:", HF + "mlp.c_proj", GG + "ffn_down"),
    *pair("norm:", "model.norm", "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


FAMILY = Family(
    hf={"Starcoder2ForCausalLM": "starcoder2"},
    gguf=("starcoder2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "starcoder2": Architecture(
            name="starcoder2", more=window_keys, eps=LAYER_NORM_EPS, square=True, unread=(DIVISORS,)
        )
    },
)
