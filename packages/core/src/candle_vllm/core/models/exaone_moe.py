# SPDX-License-Identifier: MIT
"""K-EXAONE and dots.llm1: Llama's layers (`llama.py`) with a norm on every head of q and k, and experts.

Experts are scored by sigmoids and chosen with a correction bias, within groups, as in DeepSeek-V3; a shared expert is
added, and the first layers are dense. Three of four layers of K-EXAONE have a window, the others no rotary embedding.
Layers for draft tokens are not loaded. Sources: LG AI Research, 2026, the model card; rednote-hilab, arXiv:2506.05767.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import glm4_moe, llama
from candle_vllm.core.models.attention_names import local_keys
from candle_vllm.core.models.experts import (
    dense_layers,
    routed_names,
    sigmoids_from_gguf,
    sigmoids_from_hf,
    sparse_in_gguf,
    ungrouped,
    without_next_tokens,
)
from candle_vllm.core.models.family import BIASES, Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.models.olmo2 import full_layers, windows_from_hf

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of exaone_moe and dots1."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    dots = model_type == "dots1"
    usual: dict[str, Any] = {"norm_topk_prob": False} if dots else {"routed_scaling_factor": 2.5}
    fields = fields.with_absent(sliding_window=4096, **usual)
    shared = shared_from_hf(fields, model_type)
    layers, inner = shared["num_layers"], fields.count("moe_intermediate_size")
    count = fields.count("n_shared_experts") if dots else fields.count("num_shared_experts", 1)
    bias = fields.get("attention_bias", bool, False) if dots else False
    shared["sliding_windows"] = _dots_windows(fields, layers) if dots else windows_from_hf(fields, layers)
    sparse = frozenset(range(dense_layers(fields, layers, 0 if dots else 1), layers))
    mixture = sigmoids_from_hf(fields, shared_size=inner * count)
    local = not dots and fields.get("sliding_window", int, None) is not None
    return LlamaConfig(**shared, qkv_bias=bias, output_bias=bias, **_with(mixture, sparse, shared, local))


def _dots_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Windows by `layer_types`; otherwise the layers from `max_window_layers` on have one."""
    window, first = fields.get("sliding_window", int, None), fields.get("max_window_layers", int, 62)
    usual = tuple(window if layer >= first else None for layer in range(layers))
    return layer_windows(fields, layers, window) or usual


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of exaone-moe and dots1."""
    shared = shared_from_gguf(fields, checkpoint)
    shared["num_layers"] = layers = without_next_tokens(fields, shared["num_layers"])
    window = (shared["model_type"] != "dots1" and fields.get("attention.sliding_window", int, 0)) or None
    shared["sliding_windows"] = gguf_windows(fields, layers, window, period=4)
    inner, count = fields.count("expert_feed_forward_length"), fields.count("expert_shared_count", 1)
    corrected = any(name.endswith("exp_probs_b.bias") for name in checkpoint.tensors)
    size = fields.count("expert_shared_feed_forward_length", inner * count)
    mixture = sigmoids_from_gguf(fields, shared_size=size, correction=corrected)
    sparse = sparse_in_gguf(checkpoint, layers)
    return LlamaConfig(**shared, **_with(mixture, sparse, shared, window is not None))


def _with(mixture: Mixture, sparse: frozenset[int], shared: dict[str, Any], local: bool) -> dict[str, Any]:
    """The fields of the experts and of attention; if `local`, only layers with a window have a rotary embedding."""
    own: dict[str, Any] = {"qk_norm": True, "unrotated_layers": full_layers(shared["sliding_windows"], local)}
    return own | {"mixture": mixture, "num_experts": mixture.experts, "sparse_layers": sparse}


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    *llama.WEIGHTS,
    *routed_names("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
]


def exaone_keys(config: LlamaConfig) -> dict[str, Any]:
    """The GGUF metadata of a K-EXAONE in addition to the keys of every model."""
    assert config.mixture is not None
    if not any(config.sliding_windows):
        raise UnsupportedModelError("llama.cpp's exaone-moe has windows in some layers; this model has none")
    shared = {"expert_shared_feed_forward_length": config.mixture.shared_size}
    return glm4_moe.gguf_keys(config) | local_keys(config) | shared


def dots_keys(config: LlamaConfig) -> dict[str, Any]:
    """The GGUF metadata of a dots.llm1 in addition to the keys of every model."""
    if any(config.sliding_windows) or config.num_kv_heads != config.num_heads:
        raise UnsupportedModelError("llama.cpp's dots1 has as many heads of keys as of queries, and no windows")
    return glm4_moe.gguf_keys(config)


FAMILY = Family(
    hf={"ExaoneMoeForCausalLM": "exaone_moe", "ExaoneMoEForCausalLM": "exaone_moe", "Dots1ForCausalLM": "dots1"},
    gguf=("exaone-moe", "dots1"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=glm4_moe.ignored,
    as_gguf={
        "exaone_moe": Architecture(name="exaone-moe", more=exaone_keys, otherwise=ungrouped, head=True, unread=BIASES),
        "dots1": Architecture(name="dots1", more=dots_keys, otherwise=ungrouped, head=True),
    },
)
