# SPDX-License-Identifier: MIT
"""The text model of DeepSeek-OCR 1, 2 and Unlimited-OCR: Llama's layers (`llama.py`), most with DeepSeek-V2's experts.

Experts are scored by a softmax and chosen alone or in groups; their scores are not normalised, and a shared expert is
added. Keys and values are not latent, unlike DeepSeek-V2's. Generated tokens of Unlimited-OCR attend to the prompt and
to a window over the answer (`ModelConfig.answer_window`).
Sources: Wei et al., 2025, arXiv:2510.18234; `UnlimitedOcrTextModel` of transformers.
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
"""Defaults of transformers' config classes."""
_UNLIMITED = _USUAL | {
    "vocab_size": 129280, "hidden_size": 1280, "intermediate_size": 6848, "num_hidden_layers": 12,
    "num_attention_heads": 10, "num_key_value_heads": 10, "max_position_embeddings": 32768, "num_experts_per_tok": 6,
    "moe_intermediate_size": 896, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_WINDOWS = ("sliding_window", "sliding_window_size")


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read the `text_config` of `config.json`; the size of a head follows from the other sizes, as in transformers.

    The original repositories have `language_config`, with some of its keys beside it, as Unlimited-OCR's window.
    """
    original = {f"{fields.prefix}{key}": value for key, value in fields.section("language_config").values.items()}
    beside = {key: value for key, value in fields.values.items() if key in _WINDOWS}
    fields = Fields({**fields.values, **original, **beside}, fields.path, fields.prefix)
    if fields.get("use_mla", bool, False):
        raise UnsupportedModelError(f"{fields.path}: use_mla is true, which is not implemented for this model")
    fields.choice("scoring_func", "softmax", "softmax")
    fields.choice("hidden_act", "silu", "silu", "swish")
    if fields.get("mlp_bias", bool, False):
        raise UnsupportedModelError(f"{fields.path}: mlp_bias is not implemented for this model")
    if fields.get("norm_topk_prob", bool, False):
        raise UnsupportedModelError(f"{fields.path}: norm_topk_prob is not implemented for this model")
    unlimited = model_type == "unlimited_ocr_text"
    fields = fields.with_defaults(**(_UNLIMITED if unlimited else _USUAL))
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
    own |= {"answer_window": _window(fields, layers, unlimited)}
    return LlamaConfig(**shared, **own, mixture=mixture, num_experts=mixture.experts)


def _window(fields: Fields, layers: int, unlimited: bool) -> int | None:
    """The window over the answer; None without one. Only Unlimited-OCR has one, in all layers alike."""
    windows = {key: fields.get(key, int, 0) for key in _WINDOWS if key in fields}
    if len({*windows.values()}) > 1 or (any(windows.values()) and not unlimited):
        raise UnsupportedModelError(f"{fields.path}: {windows}; implemented: one window, in Unlimited-OCR")
    usual, kinds = "reference_sliding_attention", fields.get("layer_types", list, [])
    if len(kinds) not in (0, layers) or {*map(str, kinds)} not in (set(), {usual}, {"full_attention"}):
        said = f"layer_types is {kinds!r:.80}; implemented: {usual} in all layers, or full_attention"
        raise UnsupportedModelError(f"{fields.path}: {said}")
    return None if not unlimited or "full_attention" in kinds else next(iter(windows.values()), 128)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of deepseek2-ocr, where the number of rotary dimensions is 0, and whole heads rotate."""
    rotary = f"{fields.prefix}rope.dimension_count"
    values = {key: value for key, value in fields.values.items() if key != rotary or value}
    shared = shared_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint)
    window, shared["sliding_windows"] = shared["sliding_windows"][0], (None,) * shared["num_layers"]
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
    own: dict[str, Any] = {"sparse_layers": sparse, "answer_window": window}  # llama.cpp's converter of Unlimited-OCR
    return LlamaConfig(**shared, **own, mixture=mixture, num_experts=mixture.experts)


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    *llama.WEIGHTS,
    *routed_names(),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of the experts; llama.cpp has one rotary base, and a key for each head."""
    if config.rope.theta != 10000 or config.rope.kind != "default" or config.num_heads != config.num_kv_heads:
        raise UnsupportedModelError("llama.cpp's deepseek2-ocr has one rotary base, 10000, and no shared keys")
    window = {} if config.answer_window is None else {"attention.sliding_window": config.answer_window}
    dense = config.num_layers - len(config.sparse_layers)
    return routed_keys(config.mixture) | window | {"leading_dense_block_count": dense}


FAMILY = Family(
    hf={"DeepseekOcr2ForCausalLM": "deepseek_ocr2_text", "UnlimitedOcrForCausalLM": "unlimited_ocr_text"},
    gguf=("deepseek2-ocr",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf=dict.fromkeys(
        ("deepseek_ocr2_text", "unlimited_ocr_text"), Architecture(name="deepseek2-ocr", more=gguf_keys, square=True)
    ),
)
