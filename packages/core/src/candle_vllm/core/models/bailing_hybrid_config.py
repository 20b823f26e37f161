# SPDX-License-Identifier: MIT
"""Configuration of Ling 3.0: Kimi Linear's with bounded decays and latent attention that rotates."""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.delta_net import DeltaSizes
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed
from candle_vllm.core.models import deepseek_config, kimi_linear_config
from candle_vllm.core.models.attention_names import kv_heads_by_layer
from candle_vllm.core.models.deepseek_config import DeepseekConfig
from candle_vllm.core.models.kimi_linear_config import NAMES, ChannelDecays, KimiLinearConfig
from candle_vllm.core.models.local_layers import refuse_others
from candle_vllm.core.models.qwen3_next_config import convolution_taps
from candle_vllm.core.quantization.tensors import StoredTensor

_IMPLEMENTED: dict[str, Any] = {
    "gated_attention_proj_granularity_type": "head_wise", "no_kda_lora": True, "use_kda_lora": False,
    "use_mla_nope": False, "num_kv_heads_for_linear_attn": 0, "use_bias": False, "use_qkv_bias": False,
    "attention_bias": False, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "scale_router_input": False, "use_nGPT": False, "value_norm": False, "up_proj_norm": False,
    "pregate_inference": False, "rope_interleave": True,
}  # fmt: skip
_USUAL: dict[str, Any] = {
    "first_k_dense_replace": 2, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1,
    "rope_theta": 6e6, "max_position_embeddings": 262144, "q_lora_rank": None,
}  # fmt: skip
"""Defaults of transformers' config class."""
_LEAST_BOUND, _MOST_HEAD, _TAPS = -1000.0, 1024, "short_conv_kernel_size"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BailingHybridConfig(KimiLinearConfig):
    """Config of these models; `decay_bound` is the lower bound of the logs of decays, 0 without a bound."""

    decay_bound: float


def config_from_hf(fields: Fields, model_type: str) -> BailingHybridConfig:
    """Read `config.json` of bailing_hybrid, in the published form or in that of transformers."""
    refuse_others(fields, _IMPLEMENTED)
    for key in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"):
        if any(fields.get(key, list, [])):
            raise UnsupportedModelError(f"{fields.path}: {key} has limits; implemented: none")
    if "mrope_section" in fields.section("rope_parameters"):
        raise UnsupportedModelError(f"{fields.path}: mrope_section is not implemented for this model")
    names = {**NAMES, "num_nextn_predict_layers": "num_mtp_layers"}
    own = {usual: fields.values[name] for usual, name in names.items() if name in fields}
    given = _USUAL | dict(fields.values) | own
    rope = {key: value for key, value in fields.section("rope_parameters").values.items() if "partial" not in key}
    given |= {"rope_parameters": rope or None, "partial_rotary_factor": None}  # qk_rope_head_dim has the elements
    config = deepseek_config.config_from_hf(Fields(given, fields.path), "deepseek_v3")
    if config.mixture is not None:
        shared = fields.count("moe_shared_expert_intermediate_size", config.mixture.inner_size)
        shared *= config.mixture.shared_size // config.mixture.inner_size
        config = _with_shared(config, shared)
    dim = fields.count("linear_head_dim", fields.count("head_dim", 128, most=_MOST_HEAD), most=_MOST_HEAD)
    sizes = fields.count("linear_num_heads", config.num_heads), dim, convolution_taps(fields, _TAPS, 4)
    bound = fields.get("kda_lower_bound", float, -5.0) if fields.get("kda_safe_gate", bool, True) else None
    return _config(fields, config, model_type, sizes, _delta_layers(fields, config.num_layers), bound)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> BailingHybridConfig:
    """Read GGUF metadata of bailingmoe3, in which layers with delta attention have 0 key-value heads."""
    refuse_others(fields, {"kda.safe_gate": True})
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        if any(fields.get(key, list, [])):
            raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} has limits; implemented: none")
    plain, counts = kv_heads_by_layer(fields)
    values = {"attention.value_length": fields.count("attention.value_length_mla")}
    config = deepseek_config.config_from_gguf(plain.with_absent(**values), checkpoint)
    if config.mixture is not None and (key := "expert_shared_feed_forward_length") in fields:
        config = _with_shared(config, fields.count(key))
    sizes = config.num_heads, fields.count("kda.head_dim", most=_MOST_HEAD), convolution_taps(fields, "ssm.conv_kernel")
    layers = frozenset(layer for layer, count in enumerate(counts[: config.num_layers]) if not count)
    return _config(fields, config, config.model_type, sizes, layers, fields.get("kda.gate_lower_bound", float))


def _with_shared(config: DeepseekConfig, size: int) -> DeepseekConfig:
    """The config with another size of the shared expert."""
    assert config.mixture is not None
    return dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, shared_size=size))


def _config(
    fields: Fields,
    config: DeepseekConfig,
    model_type: str,
    sizes: tuple[int, int, int],
    layers: frozenset[int],
    bound: float | None,
) -> BailingHybridConfig:
    """Make the config from DeepSeek's; `sizes` are heads, elements of a head and taps of delta attention.

    `bound` is None without a lower bound of decays.
    """
    if bound is not None and not _LEAST_BOUND <= bound < 0:
        raise InvalidFileError(
            f"{fields.path}: the lower bound of decays is {bound}; it must be below 0, and at least {_LEAST_BOUND}"
        )
    flags = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    heads, dim, taps = sizes
    delta = DeltaSizes(key_heads=heads, heads=heads, key_dim=dim, value_dim=dim, taps=taps, by_channel=True)
    own: dict[str, Any] = {
        "model_type": model_type,
        "delta": delta,
        "delta_layers": layers,
        "decay_bound": bound or 0.0,
    }
    return BailingHybridConfig(**flags | own)


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata; layers with delta attention have 0 key-value heads."""
    if not config.decay_bound or config.delta.heads != config.num_heads or config.mixture is None:
        raise UnsupportedModelError(
            "llama.cpp's bailingmoe3 has a lower bound of decays, as many heads in all layers, and experts"
        )
    own = {"kda.safe_gate": True, "kda.gate_lower_bound": config.decay_bound}
    return (
        deepseek_config.gguf_keys(config)
        | kimi_linear_config.delta_keys(config)
        | own
        | {"expert_shared_feed_forward_length": config.mixture.shared_size}
    )


class Decays(ChannelDecays):
    """View of exp(A_log) of each head, as GGUF files have it, as a decay below 0 for each channel."""

    def __init__(self) -> None:
        super().__init__(logs=False)

    def __call__(self, stored: StoredTensor, config: Any) -> StoredTensor:
        return super().__call__(computed(stored, stored.shape, lambda values: -values), config)

    def undone(self, stored: StoredTensor, config: Any) -> StoredTensor:
        """See `ChannelDecays`."""
        found = super().undone(stored, config)
        return computed(found, found.shape, lambda values: -values)


def _delta_layers(fields: Fields, layers: int) -> frozenset[int]:
    """The layers with delta attention: by `layer_types`, or all but the last of every `layer_group_size`."""
    period = fields.count("layer_group_size", 6)
    if "layer_types" not in fields and layers % period:
        raise UnsupportedModelError(
            f"{fields.path}: layer_group_size is {period}; implemented: a divisor of num_hidden_layers, {layers}"
        )
    usual = ["full_attention" if (layer + 1) % period == 0 else "linear_attention" for layer in range(layers)]
    kinds = fields.get("layer_types", list, usual)
    if len(kinds) != layers or not all(kind in ("full_attention", "linear_attention") for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types must name full or linear attention per layer")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
