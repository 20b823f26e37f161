# SPDX-License-Identifier: MIT
"""Falcon 7B, 11B, 40B and 180B: a parallel block with one norm or two, without biases of the projections.

Falcon-RW has sequential blocks, biases and ALiBi. Hugging Face checkpoints store the rows of q, k and v one after the
other for each key-value head; the 7B has one such head. Source: Almazrouei et al., 2023, arXiv:2311.16867.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.attention import alibi_slopes
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import qkv_rows
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, gguf_projection, pair
from candle_vllm.core.models.family import LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.gpt import Gpt, GptConfig, activation_of

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of falcon; optional keys of its layers have transformers' defaults."""
    fields = fields.with_defaults(
        max_position_embeddings=2048,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        ffn_hidden_size=4 * fields.count("hidden_size"),
        num_kv_heads=fields.count("num_attention_heads"),
    )
    names = {"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"}
    shared = shared_from_hf(fields, model_type, eps="layer_norm_epsilon", names=names)
    grouped = fields.get("new_decoder_architecture", bool, False)
    if not grouped:
        shared["num_kv_heads"] = 1 if fields.get("multi_query", bool, True) else shared["num_heads"]
    parallel, bias = grouped or fields.get("parallel_attn", bool, True), fields.get("bias", bool, False)
    slopes = alibi_slopes(shared["num_heads"]) if fields.get("alibi", bool, False) else ()
    return GptConfig(
        **shared,
        slopes=tuple(slope * shared["head_dim"] ** -0.5 for slope in slopes),  # Falcon adds the bias before scaling
        activation=activation_of(fields, "activation", "gelu"),
        parallel=parallel,
        shared_norm=parallel and not (grouped and fields.get("num_ln_in_parallel_attn", int, 2) == 2),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptConfig:
    """Read GGUF metadata of falcon, which does not store the activation: all published models have GELU."""
    return GptConfig(
        **shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon"),
        activation="gelu",
        parallel=True,
        shared_norm="blk.0.attn_norm_2.weight" not in checkpoint.tensors,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_HF, _LAYER = "transformer.h.{i}.", "layers.{i}."

WEIGHTS = [
    WeightName("embed:weight", "transformer.word_embeddings.weight", "token_embd.weight"),
    *pair(
        _LAYER + "attention_norm:",
        (_HF + "input_layernorm", _HF + "ln_attn"),
        (GG + "attn_norm_2", GG + "attn_norm"),  # in a block with two norms, attn_norm is the MLP's
    ),
    *[
        WeightName(
            f"{_LAYER}attention.qkv:{part}.{kind}",
            f"{_HF}self_attention.query_key_value.{kind}",
            gguf_projection(part, kind),
            qkv_rows(part, grouped=True),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ],
    *pair(_LAYER + "attention.output:", _HF + "self_attention.dense", GG + "attn_output"),
    *pair(_LAYER + "mlp_norm:", (_HF + "post_attention_layernorm", _HF + "ln_mlp"), GG + "attn_norm"),
    *pair(_LAYER + "mlp.up:", _HF + "mlp.dense_h_to_4h", GG + "ffn_up"),
    *pair(_LAYER + "mlp.down:", _HF + "mlp.dense_4h_to_h", GG + "ffn_down"),
    *pair("norm:", "transformer.ln_f", "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def gguf_names(config: Any) -> Sequence[str]:
    """Return parts of names that choose among a tensor's GGUF names; the norm of a block with one norm is attn_norm."""
    return ("attn_qkv.", "attn_norm.") if config.shared_norm else ("attn_qkv.",)


FAMILY = Family(
    hf={"FalconForCausalLM": "falcon"},
    gguf=("falcon",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"falcon": Architecture(name="falcon", names=gguf_names, eps=LAYER_NORM_EPS, square=True)},
)
