# SPDX-License-Identifier: MIT
"""The text model of DeepSeek-OCR 1 and 2: Llama's layers (`llama.py`), with DeepSeek-V2's experts in most of them.

Experts are scored by a softmax and chosen alone or in groups; their scores are not normalised, and a shared expert is
added. Keys and values are not latent, unlike DeepSeek-V2's. Source: Wei et al., 2025, arXiv:2510.18234.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama
from candle_vllm.core.models.experts import (
    dense_layers,
    expert_count,
    routed_keys,
    routed_names,
    sparse_in_gguf,
)
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------

_USUAL: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "n_routed_experts": 64,
    "moe_intermediate_size": 1407, "n_shared_experts": 2,
}  # fmt: skip
"""Defaults of transformers' config class."""


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read the `text_config` of `config.json`; the size of a head follows from the other sizes, as in transformers.

    The original repositories have `language_config`, with some of its keys beside it.
    """
    original = {f"{fields.prefix}{key}": value for key, value in fields.section("language_config").values.items()}
    fields = Fields({**fields.values, **original}, fields.path, fields.prefix)
    if fields.get("use_mla", bool, False):
        raise UnsupportedModelError(f"{fields.path}: use_mla is true, which is not implemented for this model")
    fields.choice("scoring_func", "softmax", "softmax")
    _check_window(fields, "sliding_window", "sliding_window_size")
    fields.choice("hidden_act", "silu", "silu", "swish")
    if fields.get("mlp_bias", bool, False):
        raise UnsupportedModelError(f"{fields.path}: mlp_bias is not implemented for this model")
    if fields.get("norm_topk_prob", bool, False):
        raise UnsupportedModelError(f"{fields.path}: norm_topk_prob is not implemented for this model")
    fields = fields.with_defaults(**_USUAL)
    heads = fields.count("hidden_size") // fields.count("num_attention_heads")
    named = {**fields.values, f"{fields.prefix}head_dim": heads}
    shared = shared_from_hf(Fields(named, fields.path, fields.prefix), model_type)
    grouped = fields.choice("topk_method", "greedy", "greedy", "group_limited_greedy") != "greedy"
    inner = fields.count("moe_intermediate_size")
    mixture = Mixture(
        experts=expert_count(fields, "n_routed_experts", "num_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=inner,
        renormalise=False,
        groups=fields.count("n_group") if grouped else 1,
        top_groups=fields.count("topk_group") if grouped else 1,
        scale=fields.get("routed_scaling_factor", float, 1.0),
        shared_size=inner * fields.count("n_shared_experts"),
    )
    bias, layers = fields.get("attention_bias", bool, False), shared["num_layers"]
    sparse = frozenset(range(max(dense_layers(fields, layers, 1), 0), layers))
    own: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "sparse_layers": sparse}
    return LlamaConfig(**shared, **own, mixture=mixture, num_experts=mixture.experts)


def _check_window(fields: Fields, *keys: str) -> None:
    """Refuse Unlimited-OCR, whose window does not move over the prompt."""
    for key in keys:
        if fields.get(key, int, 0):
            raise UnsupportedModelError(
                f"{fields.path}: {fields.prefix}{key} is set: a window over the answer beside the whole prompt "
                "(Unlimited-OCR) is not implemented"
            )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of deepseek2-ocr, where the number of rotary dimensions is 0, and whole heads rotate."""
    _check_window(fields, "attention.sliding_window")
    rotary = f"{fields.prefix}rope.dimension_count"
    values = {key: value for key, value in fields.values.items() if key != rotary or value}
    shared = shared_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint)
    if (gating := fields.get("expert_gating_func", int, 1)) not in (0, 1):
        raise UnsupportedModelError(f"{fields.path}: {fields.prefix}expert_gating_func is {gating}; implemented: 1")
    inner = fields.count("expert_feed_forward_length")
    mixture = Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=inner,
        renormalise=fields.get("expert_weights_norm", bool, False),
        groups=fields.count("expert_group_count", 1),
        top_groups=fields.count("expert_group_used_count", 1),
        scale=fields.get("expert_weights_scale", float, 0.0) or 1.0,  # llama.cpp writes 0 for no scale
        shared_size=inner * fields.get("expert_shared_count", int, 0),
    )
    sparse = sparse_in_gguf(checkpoint, shared["num_layers"])
    return LlamaConfig(**shared, mixture=mixture, num_experts=mixture.experts, sparse_layers=sparse)


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    *llama.WEIGHTS,
    *routed_names(),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of the experts; llama.cpp has one rotary base, and a key for each head."""
    if config.rope.theta != 10000 or config.rope.kind != "default" or config.num_heads != config.num_kv_heads:
        raise UnsupportedModelError("llama.cpp's deepseek2-ocr has one rotary base, 10000, and no shared keys")
    return routed_keys(config.mixture) | {"leading_dense_block_count": config.num_layers - len(config.sparse_layers)}


FAMILY = Family(
    hf={"DeepseekOcr2ForCausalLM": "deepseek_ocr2_text"},
    gguf=("deepseek2-ocr",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "deepseek_ocr2_text": Architecture(name="deepseek2-ocr", more=gguf_keys, square=True),
    },
)
