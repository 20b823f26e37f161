# SPDX-License-Identifier: MIT
"""Read the config of LFM2: `config.json` of lfm2 and lfm2_moe, and GGUF metadata of lfm2 and lfm2moe."""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.short_conv import state_shape
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, StatePart, StateSpec
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.attention_names import kv_heads_by_layer
from candle_vllm.core.models.experts import expert_count, sigmoid_keys, sparse_in_gguf
from candle_vllm.core.models.llama import LlamaConfig

_MOST_TAPS = 16
_OLDER = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
"""Keys of published configs, which take precedence, and their names in transformers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lfm2Config(LlamaConfig):
    """Config of these models: the fields in addition to those of Llama.

    Attributes:
        conv_layers: the layers with a convolution instead of attention.
        channels: channels of a convolution; C.
        taps: kernel size of a convolution.
        conv_bias: convolutions and their projections have biases.
    """

    conv_layers: frozenset[int]
    channels: int
    taps: int
    conv_bias: bool = False

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`."""
        tail = StateSpec((StatePart(state_shape(self.channels, self.taps), self.channels, exact=False),))
        return tuple(tail if layer in self.conv_layers else spec for layer, spec in enumerate(super().cache_specs))


def config_from_hf(fields: Fields, model_type: str) -> Lfm2Config:
    """Read `config.json` of lfm2 and lfm2_moe."""
    usual, at = fields.with_absent(rope_theta=1e6, tie_word_embeddings=True), fields.prefix
    older = {at + key: fields.values[at + name] for name, key in _OLDER.items() if name in fields}
    known = Fields({**usual.values, **older}, fields.path, at)
    shared = shared_from_hf(known, model_type, eps="norm_eps")
    layers, mixture, dense = shared["num_layers"], None, shared["num_layers"]
    if model_type == "lfm2_moe":
        dense = known.get("num_dense_layers", int, 2)
        mixture = Mixture(
            experts=expert_count(known, "num_experts", "num_local_experts"),
            top_k=known.count("num_experts_per_tok"),
            inner_size=known.count("moe_intermediate_size"),
            scoring="sigmoid",
            renormalise=known.get("norm_topk_prob", bool, True),
            scale=known.get("routed_scaling_factor", float, 1.0),
            correction=known.get("use_expert_bias", bool, True),
        )
    width = shared["intermediate_size"] if mixture else _adjusted(known)
    own: dict[str, Any] = {"intermediate_size": width, "num_experts": mixture.experts if mixture else 0}
    return Lfm2Config(
        **shared | own,
        qk_norm=True,
        mixture=mixture,
        sparse_layers=frozenset(range(dense, layers)),
        conv_layers=_convolutions(known, layers),
        channels=shared["hidden_size"],
        taps=known.count("conv_L_cache", 3, most=_MOST_TAPS),
        conv_bias=known.get("conv_bias", bool, False),
    )


def _adjusted(fields: Fields) -> int:
    """The width of dense feed-forward layers: `intermediate_size`, or 2/3 of it, multiplied and rounded up."""
    size = fields.count("intermediate_size")
    if not fields.get("block_auto_adjust_ff_dim", bool, True):
        return size
    size, key = int(2 * size / 3), "block_ffn_dim_multiplier"
    if fields.prefix + key in fields.values and key not in fields:  # the multiplier is null
        return Fields({key: size}, fields.path).count(key)
    size, unit = int(max(0, min(fields.get(key, float, 1.0) * size, 1 << 30))), fields.count("block_multiple_of", 256)
    return Fields({key: -(-size // unit) * unit}, fields.path).count(key)


def _convolutions(fields: Fields, layers: int) -> frozenset[int]:
    """The layers with a convolution: by `layer_types`, or all layers that `full_attn_idxs` does not list."""
    if "layer_types" in fields:
        kinds = fields.get("layer_types", list)
        if len(kinds) != layers or not all(kind in ("full_attention", "conv") for kind in kinds):
            raise UnsupportedModelError(f"{fields.path}: layer_types must name full_attention or conv per layer")
        return frozenset(layer for layer, kind in enumerate(kinds) if kind == "conv")
    attends = fields.get("full_attn_idxs", list, [*range(layers)])
    if not all(type(layer) is int and 0 <= layer < layers for layer in attends):
        raise InvalidFileError(f"{fields.path}: full_attn_idxs is {attends!r:.80}, not a list of layers")
    return frozenset(range(layers)) - frozenset(attends)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Lfm2Config:
    """Read GGUF metadata of lfm2 and lfm2moe, in which layers with a convolution have 0 key-value heads."""
    known, counts = kv_heads_by_layer(fields)
    shared, tensors = shared_from_gguf(known, checkpoint), checkpoint.tensors
    layers, mixture = shared["num_layers"], None
    sparse = sparse_in_gguf(checkpoint, layers)
    if known.get("expert_count", int, 0):
        if (gating := known.get("expert_gating_func", int, 2)) != 2:
            raise UnsupportedModelError(
                f"{fields.path}: {fields.prefix}expert_gating_func is {gating}; implemented: 2 (sigmoid)"
            )
        mixture = Mixture(
            experts=known.count("expert_count"),
            top_k=known.count("expert_used_count"),
            inner_size=known.count("expert_feed_forward_length"),
            scoring="sigmoid",
            renormalise=known.get("expert_weights_norm", bool, True),
            scale=known.get("expert_weights_scale", float, 0.0) or 1.0,
            correction=any(f"blk.{layer}.exp_probs_b.bias" in tensors for layer in sparse),
        )
    own: dict[str, Any] = {"num_experts": mixture.experts if mixture else 0}
    return Lfm2Config(
        **shared | own,
        qk_norm=True,
        mixture=mixture,
        sparse_layers=sparse,
        conv_layers=frozenset(layer for layer, count in enumerate(counts) if not count),
        channels=shared["hidden_size"],
        taps=known.count("shortconv.l_cache", most=_MOST_TAPS),
        conv_bias=any(f"blk.{layer}.shortconv.in_proj.bias" in tensors for layer in range(layers)),
    )


def gguf_keys(config: Any) -> dict[str, Any]:
    """GGUF metadata, with 0 key-value heads in convolution layers; llama.cpp needs a bias of experts' scores."""
    heads = [0 if layer in config.conv_layers else config.num_kv_heads for layer in range(config.num_layers)]
    keys: dict[str, Any] = {"attention.head_count_kv": heads, "shortconv.l_cache": config.taps}
    mixture = config.mixture
    if mixture is None:
        return keys
    if not mixture.correction:
        raise UnsupportedModelError("llama.cpp's lfm2moe wants a bias of experts' scores, and this model has none")
    keys |= sigmoid_keys(config)
    return keys | {"leading_dense_block_count": config.num_layers - len(config.sparse_layers)}
