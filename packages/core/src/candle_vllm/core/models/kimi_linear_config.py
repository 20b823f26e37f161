# SPDX-License-Identifier: MIT
"""Configuration of Kimi Linear: DeepSeek's with the sizes of Kimi delta attention and the layers that have it."""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.delta_net import DeltaSizes
from candle_vllm.core.loading.cache_specs import CacheSpec
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed
from candle_vllm.core.models import deepseek_config
from candle_vllm.core.models.attention_names import kv_heads_by_layer
from candle_vllm.core.models.deepseek_config import DeepseekConfig
from candle_vllm.core.models.qwen3_next_config import convolution_taps, decay_of_log
from candle_vllm.core.quantization.tensors import StoredTensor

NAMES = {  # names of DeepSeek's config keys in these models
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiLinearConfig(DeepseekConfig):
    """Config of these models: the fields in addition to those of DeepSeek.

    Attributes:
        delta: shapes of Kimi delta attention.
        delta_layers: the layers with Kimi delta attention; the others have latent attention.
    """

    delta: DeltaSizes
    delta_layers: frozenset[int]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`."""
        return tuple(self.delta.state if n in self.delta_layers else s for n, s in enumerate(super().cache_specs))


def config_from_hf(fields: Fields, model_type: str) -> KimiLinearConfig:
    """Read `config.json` of kimi_linear, in the published form or in that of transformers."""
    if not fields.get("mla_use_nope", bool, True):
        raise UnsupportedModelError(f"{fields.path}: mla_use_nope is false, which is not implemented")
    own = {usual: fields.values[name] for usual, name in NAMES.items() if name in fields}
    usual = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446}
    given = usual | dict(fields.values) | own
    config = deepseek_config.config_from_hf(Fields(given, fields.path), "deepseek_v3")
    nested = fields.section("linear_attn_config")
    layers, full = config.num_layers, nested.get("full_attn_layers", list, [])
    kinds = fields.get(
        "layer_types", list, [("full" if n + 1 in full else "linear") + "_attention" for n in range(layers)]
    )
    if len(kinds) != layers or not all(kind in ("full_attention", "linear_attention") for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types must name full or linear attention per layer")
    if nested.values:
        heads, dim, taps = (nested.count(key) for key in ("num_heads", "head_dim", "short_conv_kernel_size"))
    else:
        heads, dim = fields.count("linear_num_heads"), fields.count("linear_head_dim")
        taps = convolution_taps(fields, "linear_conv_kernel_dim")
    return _config(config, model_type, (heads, dim, taps), [kind == "linear_attention" for kind in kinds])


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> KimiLinearConfig:
    """Read GGUF metadata of kimi-linear, in which layers with delta attention have 0 key-value heads."""
    plain, counts = kv_heads_by_layer(fields)
    config = deepseek_config.config_from_gguf(plain, checkpoint)
    if config.mixture is not None:
        config = dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, renormalise=True))
    sizes = config.num_heads, fields.count("kda.head_dim"), convolution_taps(fields, "ssm.conv_kernel")
    return _config(config, config.model_type, sizes, [not count for count in counts])


def _config(
    config: DeepseekConfig, model_type: str, sizes: tuple[int, int, int], delta: list[bool]
) -> KimiLinearConfig:
    flags = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    flags |= {"model_type": model_type, "interleaved_rotary": False}
    flags["rope"] = RopeConfig(kind="proportional", dim=config.rope_dim)  # the frequencies are 0, so nothing rotates
    heads, dim, taps = sizes
    shapes = DeltaSizes(key_heads=heads, heads=heads, key_dim=dim, value_dim=dim, taps=taps, by_channel=True)
    return KimiLinearConfig(**flags, delta=shapes, delta_layers=frozenset(n for n, has in enumerate(delta) if has))


def delta_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of delta attention, whose layers have 0 key-value heads."""
    heads = [0 if layer in config.delta_layers else 1 for layer in range(config.num_layers)]
    return {
        "attention.head_count_kv": heads,
        "kda.head_dim": config.delta.key_dim,
        "ssm.conv_kernel": config.delta.taps,
    }


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata."""
    return deepseek_config.gguf_keys(config) | delta_keys(config)


# ---- views of tensors ------------------------------------------------------------------------------------------------


class ChannelDecays:
    """View of a decay for each head, or of its logarithm, as a decay for each channel."""

    def __init__(self, *, logs: bool) -> None:
        self._logs = logs

    def __call__(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        heads, dim = config.delta.heads, config.delta.key_dim
        if stored.numel != heads:
            return stored  # the loader reports the wrong shape
        decays = decay_of_log(stored, config) if self._logs else stored
        return computed(decays, (heads * dim,), lambda values: values.reshape(-1).repeat(dim))

    def undone(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        """The decay for each head, as in GGUF files."""
        dim = config.delta.key_dim
        return computed(stored, (config.delta.heads, 1), lambda values: values[::dim, None])


class Taps:
    """View of a convolution's kernels [.., C, .., taps] as [C, taps]."""

    def __call__(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        shape = (config.delta.parts[0], config.delta.taps)
        return dataclasses.replace(stored, shape=shape) if stored.numel == shape[0] * shape[1] else stored

    def undone(self, stored: StoredTensor, config: KimiLinearConfig) -> StoredTensor:
        """The kernels in the shape of GGUF files."""
        del config
        return dataclasses.replace(stored, shape=(stored.shape[0], 1, stored.shape[1]))
