# SPDX-License-Identifier: MIT
"""Read the config of Nemotron-H and Nemotron 3 from config.json or GGUF metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, StateSpec
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.experts import expert_count, routed_keys, sparse_in_gguf, without_next_tokens
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.mamba2 import MambaSizes, mamba_keys, sizes_from_gguf, sizes_from_hf

Kind: TypeAlias = Literal["mamba", "attention", "mlp", "moe"]
_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "mamba": "mamba",
        "linear_attention": "mamba",
        "M": "mamba",
        "attention": "attention",
        "full_attention": "attention",
        "*": "attention",
        "mlp": "mlp",
        "-": "mlp",
        "moe": "moe",
        "E": "moe",
    }
)
_KEYS = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "groups": "n_groups",
    "state": "ssm_state_size",
    "taps": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
_EXPERTS: dict[str, Any] = {"activation": "relu2", "scoring": "sigmoid", "correction": True}
_DEFAULTS = {"head_dim": 128, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "layer_norm_epsilon": 1e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronHConfig(LlamaConfig):
    """Config of these models: the fields in addition to those of Llama.

    Attributes:
        kinds: kind of each layer.
        mamba: shapes of Mamba 2.
        mamba_layers: the layers with Mamba 2.
        latent_size: size of the routed experts' inputs and outputs, which are then projected; 0 for the hidden size.
    """

    kinds: tuple[Kind, ...]
    mamba: MambaSizes
    mamba_layers: frozenset[int]
    latent_size: int = 0

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`; a layer with neither attention nor Mamba 2 has a state without parts."""
        other = {"mamba": self.mamba.spec, "mlp": StateSpec(()), "moe": StateSpec(())}
        return tuple(other.get(kind, spec) for kind, spec in zip(self.kinds, super().cache_specs, strict=True))


def config_from_hf(fields: Fields, model_type: str) -> NemotronHConfig:
    """Read `config.json` of nemotron_h; the kinds of layers are a list, or a string with one character per layer."""
    fields = fields.with_defaults(**_DEFAULTS)
    key = next((key for key in ("layers_block_type", "layer_types") if key in fields), "hybrid_override_pattern")
    named = [*fields.get(key, str)] if key == "hybrid_override_pattern" else fields.get(key, list)
    if not named or any(not isinstance(kind, str) or kind not in _KINDS for kind in named):
        raise UnsupportedModelError(
            f"{fields.path}: {key} has layers other than mamba, attention, mlp and moe: {named!r:.80}"
        )
    fields.choice("mlp_hidden_act", "relu2", "relu2")
    fields.choice("mamba_hidden_act", "silu", "silu")
    shared = shared_from_hf(fields.with_defaults(num_hidden_layers=len(named)), model_type, eps="layer_norm_epsilon")
    layers, inner = shared["num_layers"], fields.count("expand", 2) * shared["hidden_size"]
    if len(named) != layers:
        raise InvalidFileError(f"{fields.path}: {key} has {len(named)} layers, num_hidden_layers is {layers}")
    own = {"mlp_bias": fields.get("mlp_bias", bool, False), "qkv_bias": False, "output_bias": False}
    kinds: tuple[Kind, ...] = tuple(_KINDS[kind] for kind in named)
    mixture = None
    if "moe" in kinds:
        shared["latent_size"] = fields.count("moe_latent_size", 0)
        mixture = Mixture(
            experts=expert_count(fields, "n_routed_experts", "num_local_experts"),
            top_k=fields.count("num_experts_per_tok"),
            inner_size=fields.count("moe_intermediate_size"),
            shared_size=fields.get("moe_shared_expert_intermediate_size", int, 0),
            groups=fields.count("n_group", 1),
            top_groups=fields.count("topk_group", 1),
            renormalise=fields.get("norm_topk_prob", bool, True),
            scale=fields.get("routed_scaling_factor", float, 1.0),
            **_EXPERTS,
        )
    return _config(shared | own, kinds, sizes_from_hf(fields, _KEYS, inner=inner), mixture)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> NemotronHConfig:
    """Read GGUF metadata of nemotron_h and nemotron_h_moe.

    In the file, only layers with attention have key-value heads, and only layers with an MLP or experts have a width.
    """
    stored, mixture = fields.count("block_count"), None
    layers, lists = without_next_tokens(fields, stored), ("attention.head_count_kv", "feed_forward_length")
    heads, widths = (_by_layer(fields, name, stored)[:layers] for name in lists)
    sparse = sparse_in_gguf(checkpoint, layers)
    dense = [0] + [width for layer, width in enumerate(widths) if layer not in sparse]
    one = {"attention.head_count_kv": max(heads) or 1, "feed_forward_length": max(dense) or 1}
    if not (set(heads) <= {0, max(heads)} and set(dense) <= {0, max(dense)}):
        raise UnsupportedModelError(f"{fields.path}: {' and '.join(one)} must have one number, or 0, for each layer")
    usual = {fields.prefix + name: number for name, number in one.items()}
    fields = Fields({**fields.values, **usual}, fields.path, fields.prefix)
    eps = "attention.layer_norm_rms_epsilon"
    if eps not in fields:  # in files of earlier versions of `candle-vllm quantize`
        eps = "attention.layer_norm_epsilon"
    shared = shared_from_gguf(fields, checkpoint, eps=eps)
    shared |= {"num_layers": layers, "sliding_windows": (None,) * layers}
    kinds: list[Kind] = [
        "moe" if layer in sparse else "mlp" if width else "attention" if count else "mamba"
        for layer, (count, width) in enumerate(zip(heads, widths))
    ]
    if sparse:
        shared["latent_size"] = fields.count("moe_latent_size", 0)
        mixture = Mixture(
            experts=fields.count("expert_count"),
            top_k=fields.count("expert_used_count"),
            inner_size=fields.count("expert_feed_forward_length"),
            shared_size=fields.get("expert_shared_feed_forward_length", int, 0),
            groups=fields.count("expert_group_count", 1),
            top_groups=fields.count("expert_group_used_count", 1),
            renormalise=fields.get("expert_weights_norm", bool, True),
            scale=fields.get("expert_weights_scale", float, 0.0) or 1.0,
            **_EXPERTS,
        )
    biases = any(f"blk.{layer}.ffn_up.bias" in checkpoint.tensors for layer in range(layers))
    mamba = sizes_from_gguf(fields, checkpoint.tensors, [n for n, kind in enumerate(kinds) if kind == "mamba"])
    return _config(shared | {"mlp_bias": biases}, tuple(kinds), mamba, mixture)


def _by_layer(fields: Fields, name: str, layers: int) -> list[int]:
    """A number for each layer, at least 0; files have a list, or one number for all."""
    value = fields.values.get(fields.prefix + name)
    counts = [value] * layers if type(value) is int else fields.get(name, list)
    if len(counts) != layers or not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts):
        raise InvalidFileError(f"{fields.path}: {fields.prefix}{name} must have a number for each of {layers} layers")
    return counts


def _config(
    shared: dict[str, Any], kinds: tuple[Kind, ...], mamba: MambaSizes, mixture: Mixture | None
) -> NemotronHConfig:
    layers = {kind: frozenset(layer for layer, own in enumerate(kinds) if own == kind) for kind in _KINDS.values()}
    shared["model_type"] = "nemotron_h_moe" if mixture else "nemotron_h"
    shared["unrotated_layers"] = frozenset(range(len(kinds)))
    if mixture is not None and "mlp" not in kinds:
        shared["intermediate_size"] = mixture.inner_size  # no layer has this width; GGUF files store the experts'
    shared |= {"mixture": mixture, "sparse_layers": layers["moe"], "num_experts": mixture.experts if mixture else 0}
    return NemotronHConfig(**shared, kinds=kinds, mamba=mamba, mamba_layers=layers["mamba"])


def gguf_keys(config: Any) -> dict[str, Any]:
    """Metadata of Mamba 2 and of experts; each layer's key-value heads and feed-forward width, which may be 0."""
    heads = [config.num_kv_heads if kind == "attention" else 0 for kind in config.kinds]
    own = {"mlp": config.intermediate_size, "moe": config.mixture.inner_size if config.mixture else 0}
    if {"mlp", "moe"} <= set(config.kinds):
        raise UnsupportedModelError("llama.cpp's nemotron_h_moe has experts in all feed-forward layers")
    widths = [own.get(kind, 0) for kind in config.kinds]
    keys = mamba_keys(config.mamba) | {"attention.head_count_kv": heads, "feed_forward_length": widths}
    if config.mixture is None:
        return keys
    shared = {"expert_shared_count": 1, "expert_shared_feed_forward_length": config.mixture.shared_size}
    shared |= {"moe_latent_size": config.latent_size} if config.latent_size else {}
    return keys | routed_keys(config.mixture) | shared
