# SPDX-License-Identifier: MIT
"""MiMo V2, V2.5 and V2.6: Llama's layers (`llama.py`) with values shorter than keys, windows with sinks, and experts.

Layers with a window have twice the key-value heads, sinks, and their own rotary base. Caches hold values padded to the
size of keys: the missing elements repeat the first ones, and are dropped from attention's output. Experts are scored by
sigmoids and chosen with a correction bias, as in DeepSeek-V3. Source: Xiaomi, 2026, arXiv:2601.02780.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.attention_names import gguf_has_bias, local_keys
from candle_vllm.core.models.experts import (
    sigmoids_from_gguf,
    sigmoids_from_hf,
    size_keys,
    sparse_in_gguf,
    ungrouped,
    without_next_tokens,
)
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.models.local_layers import by_layer, ropes_by_kind
from candle_vllm.core.models.mimo_v2_names import WEIGHTS, ignored

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of mimo_v2_flash, in transformers' form or with the keys of published files."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    if fields.get("add_full_attention_sink_bias", bool, False):
        raise UnsupportedModelError(f"{fields.path}: sinks in layers without a window are not implemented")
    if not fields.get("add_swa_attention_sink_bias", bool, True):
        raise UnsupportedModelError(f"{fields.path}: layers with a window and without sinks are not implemented")
    layout = fields.choice("attention_projection_layout", "", "", "split", "fused_qkv")  # the tensors decide
    fields.choice("scoring_func", "sigmoid", "sigmoid")
    fields.choice("topk_method", "noaux_tc", "noaux_tc")
    for key in ("type", "rope_type"):
        fields.section("rope_scaling").choice(key, "default", "default")
    for key in ("num_attention_heads", "head_dim", "v_head_dim"):
        if (found := fields.count(f"swa_{key}", known := fields.count(key))) != known:
            raise UnsupportedModelError(f"{fields.path}: swa_{key} is {found}; implemented: {key}, {known}")
    if fields.get("n_shared_experts", int, 0):
        raise UnsupportedModelError(f"{fields.path}: n_shared_experts is set; implemented: no shared experts")
    plain, eps = dict(fields.values) | {"rope_parameters": {}}, ("rms_norm_eps", "layernorm_epsilon")
    shared = shared_from_hf(Fields(plain, fields.path), model_type, eps=eps[eps[1] in fields])
    layers, full = shared["num_layers"], shared["num_kv_heads"]
    more = fields.get("sliding_window_size", int, None)  # does not count the token itself
    window = fields.count("sliding_window") if more is None else more + 1
    pattern = fields.get("hybrid_layer_pattern", list, [n > 0 and (n + 1) % 6 > 0 for n in range(layers)])
    windows = layer_windows(fields, layers, window) or tuple(window if local else None for local in pattern)
    usual = fields.get("moe_layer_freq", list, [n > 0 for n in range(layers)])
    kinds = fields.get("mlp_layer_types", list, usual)
    if len(kinds) != layers or any(kind not in ("dense", "sparse", 0, 1) for kind in kinds):
        raise InvalidFileError(
            f"{fields.path}: mlp_layer_types must have dense or sparse, or moe_layer_freq 0 or 1, for each of the "
            f"{layers} layers"
        )
    mixture = sigmoids_from_hf(fields)
    own = {
        "sliding_windows": windows,
        "qkv_bias": fields.get("attention_bias", bool, False),
        "value_dim": fields.count("v_head_dim"),
        "value_scale": fields.with_absent(attention_value_scale=0.707).get("attention_value_scale", float, 1.0),
        "sparse_layers": frozenset(n for n, kind in enumerate(kinds) if kind not in ("dense", 0)),
    }
    rope, theta = fields.section("rope_parameters"), fields.get("rope_theta", float, 5e6)
    share = fields.get("partial_rotary_factor", float, 0.334)
    repeated = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    if all(key in repeated and value == repeated[key] for key, value in rope.values.items()):
        fields = Fields({**fields.values, "rope_parameters": {}}, fields.path)
    bases = (theta, share), (fields.get("swa_rope_theta", float, 1e4), share)
    own |= ropes_by_kind(fields, shared["head_dim"], windows, *bases)
    heads = full, fields.count("swa_num_key_value_heads", 2 * full)
    if heads[0] > heads[1] and layout != "split":
        raise UnsupportedModelError(f"{fields.path}: {heads} key-value heads need attention_projection_layout 'split'")
    return _mimo(shared | own, heads, mixture)


def _mimo(shared: dict[str, Any], heads: tuple[int, int], mixture: Mixture) -> LlamaConfig:
    """Make the config; `heads` are key-value heads of layers without and with a window."""
    count, windows = shared["num_heads"], shared["sliding_windows"]
    if any(count % each for each in heads) or len(windows) != shared["num_layers"]:
        raise InvalidFileError(
            f"{count} heads, {heads} key-value heads and a pattern of {len(windows)} layers do not agree"
        )
    sinks = frozenset(n for n, window in enumerate(windows) if window is not None)
    own: dict[str, Any] = {"num_kv_heads": min(heads), "sink_layers": sinks, "attention_sinks": True}
    own["groups"] = tuple(count // heads[window is not None] for window in windows)
    return LlamaConfig(**shared | own, mixture=mixture, num_experts=mixture.experts)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of mimo2, where the numbers of key-value heads are a list."""
    count, key = fields.count("block_count"), f"{fields.prefix}attention.head_count_kv"
    heads = by_layer(fields, "attention.head_count_kv", count, further=True)
    shared = shared_from_gguf(Fields({**fields.values, key: min(heads)}, fields.path, fields.prefix), checkpoint)
    layers = without_next_tokens(fields, count)
    windows = gguf_windows(fields, count, fields.count("attention.sliding_window"), period=6)[:layers]
    kinds = [{n for n, window in zip(heads, windows) if (window is None) == full} or {min(heads)} for full in (1, 0)]
    if max(map(len, kinds)) > 1:
        raise UnsupportedModelError(f"{fields.path}: {key} is {heads!r:.80}, which differs in layers of one kind")
    theta, position = fields.get("rope.freq_base_swa", float, shared["rope"].theta), fields.count("context_length")
    own = {
        "num_layers": layers,
        "sliding_windows": windows,
        "qkv_bias": gguf_has_bias(checkpoint),
        "value_dim": fields.count("attention.value_length"),
        "value_scale": fields.get("attention.value_scale", float, 0.0) or 1.0,
        "sparse_layers": sparse_in_gguf(checkpoint, layers),
        "local_rope": RopeConfig(theta=theta, dim=shared["rope"].dim, original_max_position=position),
    }
    return _mimo(shared | own, (min(kinds[0]), min(kinds[1])), sigmoids_from_gguf(fields))


# ---- family ----------------------------------------------------------------------------------------------------------


def gguf_keys(config: LlamaConfig) -> dict[str, Any]:
    """GGUF metadata, with key-value heads as a list; expert groups and scales, which llama.cpp lacks, are omitted."""
    assert config.mixture is not None
    return {
        **local_keys(config),
        **size_keys(config.mixture),
        "attention.head_count_kv": [config.heads(layer)[1] for layer in range(config.num_layers)],
        "attention.value_length": config.value_dim,
        "attention.value_scale": float(config.value_scale),
    }


FAMILY = Family(
    hf=dict.fromkeys(("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"), "mimo_v2_flash"),
    gguf=("mimo2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"mimo_v2_flash": Architecture(name="mimo2", more=gguf_keys, otherwise=ungrouped, head=True, norm=True)},
)
