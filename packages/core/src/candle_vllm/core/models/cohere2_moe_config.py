# SPDX-License-Identifier: MIT
"""Config of Cohere 2 with experts (`cohere2_moe.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.cohere import CohereConfig
from candle_vllm.core.models.experts import dense_layers, sigmoids_from_gguf, sparse_in_gguf, without_next_tokens
from candle_vllm.core.models.family import LAYER_NORM_EPS
from candle_vllm.core.models.olmo2 import full_layers

RMS_EPS = "attention.layer_norm_rms_epsilon"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohere2MoeConfig(CohereConfig):
    """Config of Cohere: norms are RMSNorms if `rms`; results with a shared expert are halved if `average`."""

    rms: bool = False
    average: bool = False


def config_from_hf(fields: Fields, model_type: str) -> Cohere2MoeConfig:
    """Read `config.json` of cohere2_moe."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    rms, inner = fields.get("rms_norm_eps", float, None) is not None, fields.count("intermediate_size")
    size = fields.count("prefix_dense_intermediate_size", inner)
    usual: dict[str, Any] = {"head_dim": 128, "rope_theta": 1e4, "layer_norm_eps": 1e-5, "sliding_window": 4096}
    fields = fields.with_absent(**usual, tie_word_embeddings=True)
    shared = shared_from_hf(fields, model_type, eps="rms_norm_eps" if rms else "layer_norm_eps")
    layers, bias = shared["num_layers"], fields.get("attention_bias", bool, False)
    dense = min(max(dense_layers(fields, layers, 0), 0), layers)
    prefix = fields.count("prefix_dense_sliding_window_pattern", 1)
    window, period = fields.get("sliding_window", int, None), fields.count("sliding_window_pattern", 4)
    periods = [*((n + 1) % prefix for n in range(dense)), *((n + 1) % period for n in range(layers - dense))]
    windows = layer_windows(fields, layers, window) or tuple(window if each else None for each in periods)
    shared |= {"intermediate_size": size, "sliding_windows": windows, "qkv_bias": bias, "output_bias": bias}
    scoring = fields.choice("expert_selection_fn", "softmax", "softmax", "sigmoid")
    mixture = Mixture(
        experts=fields.count("num_experts", 8),
        top_k=fields.count("num_experts_per_tok", 2),
        inner_size=inner,
        scoring="sigmoid" if scoring == "sigmoid" else "softmax",
        renormalise=scoring == "softmax" or fields.get("norm_topk_prob", bool, True),
        shared_size=inner * fields.get("num_shared_experts", int, 0),
    )
    combined = fields.choice("shared_expert_combination_strategy", "average", "average", "sum")
    scale, sparse = fields.get("logit_scale", float, 0.0625), frozenset(range(dense, layers))
    turned = frozenset(range(dense)) if prefix == 1 else frozenset[int]()
    return _with(shared, mixture, sparse, turned, logit_scale=scale, rms=rms, average=combined == "average")


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Cohere2MoeConfig:
    """Read GGUF metadata of cohere2moe, whose dense layers all rotate."""
    rms = fields.prefix + RMS_EPS in fields.values
    shared = shared_from_gguf(fields, checkpoint, eps=RMS_EPS if rms else LAYER_NORM_EPS)
    shared["num_layers"] = layers = without_next_tokens(fields, shared["num_layers"])
    window, dense = fields.count("attention.sliding_window"), fields.get("leading_dense_block_count", int)
    shared["sliding_windows"] = gguf_windows(fields, layers, window, period=4)
    inner, count = fields.count("expert_feed_forward_length"), fields.get("expert_shared_count", int, 0)
    size = fields.count("expert_shared_feed_forward_length", inner * count) if count else 0
    mixture = sigmoids_from_gguf(fields, shared_size=size, correction=False)
    sparse, scale = sparse_in_gguf(checkpoint, layers), fields.get("logit_scale", float)
    turned = frozenset(range(min(dense, layers)))
    return _with(shared, mixture, sparse, turned, logit_scale=scale, rms=rms, average=True)


def _with(
    shared: dict[str, Any], mixture: Mixture, sparse: frozenset[int], turned: frozenset[int], **own: Any
) -> Cohere2MoeConfig:
    own |= {"mixture": mixture, "num_experts": mixture.experts, "sparse_layers": sparse, "interleaved_rotary": True}
    own["average"] = own["average"] and mixture.shared_size > 0
    return Cohere2MoeConfig(**shared, **own, unrotated_layers=full_layers(shared["sliding_windows"], True) - turned)
