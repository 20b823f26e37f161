# SPDX-License-Identifier: MIT
"""Config of Gemma 4, and its readers for config.json and GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, SharedKVSpec
from candle_vllm.core.loading.config import ModelConfig, gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.experts import size_keys, sparse_in_gguf
from candle_vllm.core.models.gemma_config import ROUNDED, gemma3_keys
from candle_vllm.core.models.local_layers import by_layer, rope_of_kind
from candle_vllm.core.quantization.plain import rounded

_PERIOD = 6  # every sixth layer has no window, if a config does not list the layers
_ROPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
)
"""Rotary settings of each kind of layer for a config without `rope_parameters`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(ModelConfig):
    """Config of Gemma 4. `head_dim` and `rope` are those of full attention, `num_kv_heads` is the smallest K.

    Attributes:
        groups, head_dims: for each layer, the number of query heads that share a key-value head, and D.
        sources: for each layer, the layer whose key-value cache it reads: itself or an earlier layer.
        keys_as_values: layers with own caches whose values are their keys before the norm and the rotation.
        widths: for each layer, the factor of `intermediate_size` in its dense MLP.
        local_rope: rotary settings of layers with a window.
        embedding_scale, input_scale: factors of the embedding table and of the table of per-layer embeddings.
        input_size: P, elements of a per-layer embedding; 0 without per-layer embeddings.
        final_softcap: softcap of the logits; None for no cap.
        attention_bias: the q, k, v and output projections have biases.
        layer_scales: a layer's output is multiplied by a stored scalar.
        mixture, sparse_layers: the experts, and the layers that have them in addition to the dense MLP.
    """

    groups: tuple[int, ...]
    head_dims: tuple[int, ...]
    sources: tuple[int, ...]
    keys_as_values: frozenset[int]
    widths: tuple[int, ...]
    local_rope: RopeConfig
    embedding_scale: float
    input_scale: float = 1.0
    input_size: int = 0
    final_softcap: float | None = None
    attention_bias: bool = False
    layer_scales: bool = True
    mixture: Mixture | None = None
    sparse_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < dim <= 1024 for dim in self.head_dims):
            raise InvalidFileError(f"heads of {max(self.head_dims)} elements are not possible")
        if not 0 <= self.input_size * self.num_layers <= MAX_COUNT:
            raise InvalidFileError(f"the model's config says per-layer embeddings have {self.input_size} elements")
        if self.final_softcap is not None and not self.final_softcap > 0:
            raise InvalidFileError(f"final_logit_softcapping is {self.final_softcap}; it must be above 0")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """K and D of each layer; K is 1 on a rank that has only a part of the query heads of one key-value head."""
        return tuple((max(1, self.num_heads // group), dim) for group, dim in zip(self.groups, self.head_dims))

    def heads(self, layer: int) -> tuple[int, int]:
        """H and K of a layer."""
        return self.num_heads, self.shapes[layer][0]

    @property
    def readers(self) -> int:
        """Number of layers that read the caches of earlier layers."""
        return sum(layer != source for layer, source in enumerate(self.sources))

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig.cache_specs`."""
        return tuple(
            PagedSpec(heads, dim, dim, window) if source == layer else SharedKVSpec(source)
            for layer, ((heads, dim), source, window) in enumerate(zip(self.shapes, self.sources, self.sliding_windows))
        )


def groups_of(heads: int, counts: Sequence[int], fields: Fields) -> tuple[int, ...]:
    """For each layer, the number of `heads` that share a key-value head; `counts` are the layers' key-value heads."""
    for count in counts:
        if heads % count:
            raise InvalidFileError(f"{fields.path}: {heads} heads cannot share {count} key-value heads")
    return tuple(heads // count for count in counts)


def sources_of(windows: Sequence[int | None], shared: int, fields: Fields) -> tuple[int, ...]:
    """Each layer's source: the last `shared` layers read the last layer before these of their kind (window or not)."""
    first = len(windows) - shared
    last = {window is None: layer for layer, window in enumerate(windows[: max(first, 0)])}
    if not 0 <= shared < len(windows) or not all((window is None) in last for window in windows):
        raise InvalidFileError(
            f"{fields.path}: {shared} of {len(windows)} layers share keys and values: some have no layer to share with"
        )
    return (*range(first), *(last[window is None] for window in windows[first:]))


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> Gemma4Config:
    """Read `config.json` of gemma4_text and gemma4_unified_text."""
    fields.choice("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    if fields.get("use_bidirectional_attention", str, "vision") != "vision":  # irrelevant for text
        raise UnsupportedModelError(f"{fields.path}: use_bidirectional_attention is not implemented for all tokens")
    shared = shared_from_hf(fields, model_type)
    layers, position = shared["num_layers"], fields.count("max_position_embeddings")
    windows = _windows(fields, layers)
    shapes = _shapes(fields, windows, (shared["num_kv_heads"], fields.count("head_dim")))
    heads, dims = zip(*shapes)
    readers = fields.get("num_kv_shared_layers", int, 0)
    wide = 2 if fields.get("use_double_wide_mlp", bool, False) else 1
    sources = sources_of(windows, readers, fields)
    key = "hidden_size_per_layer_input"  # null means no per-layer embeddings
    unsaid = model_type == "gemma4_text" and fields.prefix + key not in fields.values
    size = 256 if unsaid else fields.get(key, int, 0)
    if size and fields.count("vocab_size_per_layer_input", shared["vocab_size"]) != shared["vocab_size"]:
        raise UnsupportedModelError(f"{fields.path}: vocab_size_per_layer_input is not vocab_size")
    mixture = None
    if fields.get("enable_moe_block", bool, False):
        mixture = Mixture(
            experts=fields.count("num_experts"),
            top_k=fields.count("top_k_experts"),
            inner_size=fields.count("moe_intermediate_size"),
            activation="gelu_tanh",
            expert_scale=True,
        )
    stored = ROUNDED.get(fields.get("dtype", str, fields.get("torch_dtype", str, "float32")), "F64")
    twice = fields.get("attention_k_eq_v", bool, False)
    own: dict[str, Any] = {
        "num_kv_heads": min(heads),
        "head_dim": dims[windows.index(None)],
        "max_position": position,
        "rope": _rope(fields, "full_attention", dims[windows.index(None)], position),
        "local_rope": _rope(fields, "sliding_attention", fields.count("head_dim"), position),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, True),
        "sliding_windows": windows,
        "groups": groups_of(shared["num_heads"], heads, fields),
        "head_dims": dims,
        "sources": sources,
        "keys_as_values": frozenset(n for n in set(sources) if twice and windows[n] is None),
        "widths": tuple(1 if layer == source else wide for layer, source in enumerate(sources)),
        "embedding_scale": rounded(math.sqrt(shared["hidden_size"]), stored),
        "input_scale": rounded(math.sqrt(max(size, 0)), stored),
        "input_size": size,
        "final_softcap": fields.get("final_logit_softcapping", float, None),
        "attention_bias": fields.get("attention_bias", bool, False),
        "num_experts": mixture.experts if mixture else 0,
        "mixture": mixture,
        "sparse_layers": frozenset(range(layers if mixture else 0)),
    }
    return Gemma4Config(**shared | own)


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Windows by `layer_types`, or in all but every sixth layer; the last layer never has a window."""
    window = fields.count("sliding_window")
    named = layer_windows(fields, layers, window)
    named = named or tuple(window if (layer + 1) % _PERIOD else None for layer in range(layers))
    return (*named[:-1], None)


def _shapes(fields: Fields, windows: Sequence[int | None], local: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """K and D of each layer: from `per_layer_config` (transformers 5), or from older keys of full-attention layers."""
    heads, dim = local
    if "per_layer_config" in fields:
        given = fields.section("per_layer_config")
        named = {key.lstrip("0") or "0": key for key in given.values}  # transformers pads with zeros: "04", "14"
        each = [given.section(named.get(str(layer), str(layer))) for layer in range(len(windows))]
        return tuple((one.count("num_key_value_heads", heads), one.count("head_dim", dim)) for one in each)
    full = heads
    if fields.get("attention_k_eq_v", bool, False):
        full = fields.count("num_global_key_value_heads", heads)
    whole = full, fields.count("global_head_dim", 512)
    return tuple(whole if window is None else local for window in windows)


def _rope(fields: Fields, kind: str, dim: int, position: int) -> RopeConfig:
    """The rotary settings of one kind of layer; `dim` is its D, `position` the model's context."""
    stored = rope_of_kind(fields, kind) if "rope_parameters" in fields else _ROPES[kind]
    return rope_from_hf(Fields({"rope_parameters": dict(stored)}, fields.path), dim, position)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Gemma4Config:
    """Read GGUF metadata of gemma4; numbers that differ by layer are lists."""
    layers, tensors = fields.count("block_count"), checkpoint.tensors
    windows = gguf_windows(fields, layers, fields.count("attention.sliding_window"), period=_PERIOD)
    if None not in windows:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}attention.sliding_window_pattern has no full layer")
    heads, inner = (by_layer(fields, key, layers) for key in ("attention.head_count_kv", "feed_forward_length"))
    if any(each % inner[0] for each in inner):
        raise UnsupportedModelError(
            f"{fields.path}: {fields.prefix}feed_forward_length is {inner!r:.80}, not multiples of {inner[0]}"
        )
    alike = {f"{fields.prefix}attention.head_count_kv": min(heads), f"{fields.prefix}feed_forward_length": inner[0]}
    known = Fields({**fields.values, **alike}, fields.path, fields.prefix)
    shared = shared_from_gguf(known, checkpoint)
    dims = {None: shared["head_dim"]} | {w: known.count("attention.key_length_swa") for w in windows if w is not None}
    for key in ("attention.key_length", "attention.key_length_swa"):
        if known.count(key.replace("key", "value"), known.count(key)) != known.count(key):
            raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} is not the length of values")
    local = known.count("rope.dimension_count_swa", known.count("attention.key_length_swa"))
    size, mixture = known.get("embedding_length_per_layer_input", int, 0), None
    if known.get("expert_count", int, 0):
        mixture = Mixture(
            experts=known.count("expert_count"),
            top_k=known.count("expert_used_count"),
            inner_size=known.count("expert_feed_forward_length"),
            activation="gelu_tanh",
            expert_scale=True,
        )
    sources = sources_of(windows, known.get("attention.shared_kv_layers", int, 0), fields)
    apart = [n for n, source in enumerate(sources) if n == source and f"blk.{n}.attn_qkv.weight" not in tensors]
    own: dict[str, Any] = {
        "max_position": known.count("context_length"),
        "local_rope": RopeConfig(theta=known.get("rope.freq_base_swa", float, 1e4), dim=local),
        "sliding_windows": windows,
        "groups": groups_of(shared["num_heads"], heads, fields),
        "head_dims": tuple(dims[window] for window in windows),
        "sources": sources,
        "keys_as_values": frozenset(n for n in apart if f"blk.{n}.attn_v.weight" not in tensors),
        "widths": tuple(each // inner[0] for each in inner),
        "embedding_scale": math.sqrt(shared["hidden_size"]),
        "input_scale": math.sqrt(max(size, 0)),
        "input_size": size,
        "final_softcap": known.get("final_logit_softcapping", float, 0.0) or None,
        "layer_scales": "blk.0.layer_output_scale.weight" in tensors,
        "num_experts": mixture.experts if mixture else 0,
        "mixture": mixture,
        "sparse_layers": sparse_in_gguf(checkpoint, layers),
    }
    return Gemma4Config(**shared | own)


def gguf_keys(config: Gemma4Config) -> dict[str, Any]:
    """The GGUF metadata of a Gemma 4 in addition to the keys of every model.

    Numbers that differ by layer are lists; layers with a window have their own keys.
    """
    dim = next((dim for dim, window in zip(config.head_dims, config.sliding_windows) if window), config.head_dim)
    keys = gemma3_keys(config) | {
        "feed_forward_length": [width * config.intermediate_size for width in config.widths],
        "attention.head_count_kv": [heads for heads, _ in config.shapes],
        "attention.key_length_swa": dim,
        "attention.value_length_swa": dim,
        "attention.shared_kv_layers": config.readers,
        "rope.dimension_count_swa": config.local_rope.dim,
        "embedding_length_per_layer_input": config.input_size,
    }
    return keys if config.mixture is None else keys | size_keys(config.mixture)
