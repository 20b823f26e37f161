# SPDX-License-Identifier: MIT
"""Config of Qwen3-Next and Qwen3.5 from config.json or GGUF metadata, and views of their stored matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.delta_net import DeltaSizes
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec
from candle_vllm.core.loading.config import ModelConfig, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import ColumnOrder, View, computed
from candle_vllm.core.models import qwen_moe
from candle_vllm.core.models.attention_names import axes_keys, gguf_has_bias
from candle_vllm.core.models.experts import sparse_in_gguf, without_next_tokens
from candle_vllm.core.models.qwen_moe import mixture_from_gguf, mixture_from_hf, sparse_layers
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(ModelConfig):
    """Config of Qwen3-Next and Qwen3.5.

    Attributes:
        delta: shapes of gated delta nets.
        delta_layers: the layers with a gated delta net; the others have attention.
        attention_bias: the projections of attention have biases.
        mixture, sparse_layers: the experts, and the layers that have them.
    """

    delta: DeltaSizes
    delta_layers: frozenset[int]
    attention_bias: bool = False
    mixture: Mixture | None = None
    sparse_layers: frozenset[int] = frozenset()

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig.cache_specs`."""
        pages = PagedSpec(self.num_kv_heads, self.head_dim, self.head_dim)
        return tuple(self.delta.state if layer in self.delta_layers else pages for layer in range(self.num_layers))


def config_from_hf(fields: Fields, model_type: str) -> Qwen3NextConfig:
    """Read `config.json` of qwen3_next, and of the text models of qwen3_5 and qwen3_5_moe."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    experts, usual = model_type != "qwen3_5", {"partial_rotary_factor": 0.25}
    if experts:  # most of these models have experts in all layers
        usual["intermediate_size"] = fields.count("moe_intermediate_size")
    said = {key: value for key, value in fields.values.items() if value is not None}
    fields = Fields({fields.prefix + key: usual[key] for key in usual} | said, fields.path, fields.prefix)
    shared = shared_from_hf(fields, model_type)
    layers, mixture = shared["num_layers"], None
    if experts:
        renormalise = model_type != "qwen3_next" or fields.get("norm_topk_prob", bool, True)
        mixture = mixture_from_hf(fields, renormalise=renormalise, shared=True)
    return Qwen3NextConfig(
        **shared,
        delta=DeltaSizes(
            key_heads=fields.count("linear_num_key_heads"),
            heads=fields.count("linear_num_value_heads"),
            key_dim=fields.count("linear_key_head_dim"),
            value_dim=fields.count("linear_value_head_dim"),
            taps=convolution_taps(fields, "linear_conv_kernel_dim"),
        ),
        delta_layers=delta_layers(fields, layers),
        attention_bias=fields.get("attention_bias", bool, False),
        mixture=mixture,
        num_experts=mixture.experts if mixture else 0,
        sparse_layers=sparse_layers(fields, layers) if mixture else frozenset(),
    )


def convolution_taps(fields: Fields, key: str, usual: int | None = None) -> int:
    """The kernel size of a convolution, from 2 to 16, because the kernels are compiled for each size."""
    taps = fields.count(key, *([] if usual is None else [usual]), most=16)
    if taps < 2:
        raise InvalidFileError(f"{fields.path}: {fields.prefix + key} is {taps}; it must be 2 to 16")
    return taps


def delta_layers(fields: Fields, layers: int) -> frozenset[int]:
    """The layers with a delta net: by `layer_types`, or all but every `full_attention_interval`-th (default: 4)."""
    if "layer_types" not in fields:
        return _but_every(fields.count("full_attention_interval", 4), layers)
    kinds = fields.get("layer_types", list)
    if len(kinds) != layers or not all(kind in ("full_attention", "linear_attention") for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types must name full or linear attention per layer")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")


def _but_every(interval: int, layers: int) -> frozenset[int]:
    return frozenset(layer for layer in range(layers) if (layer + 1) % interval)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Qwen3NextConfig:
    """Read GGUF metadata of qwen3next, qwen35 and qwen35moe."""
    if (inner := "expert_feed_forward_length") in fields:  # a file may have only this size
        usual = {f"{fields.prefix}feed_forward_length": fields.count(inner)}
        fields = Fields(usual | dict(fields.values), fields.path, fields.prefix)
    shared = shared_from_gguf(fields, checkpoint)
    stored, mixture = shared["num_layers"], None
    layers = without_next_tokens(fields, stored)
    if fields.get("expert_count", int, 0):
        mixture = mixture_from_gguf(fields, checkpoint.tensors, renormalise=True, shared=True)
    recurrent = fields.get("attention.recurrent_layers", list, None)
    if recurrent is not None and not (len(recurrent) == stored and all(each in (0, 1) for each in recurrent)):
        raise InvalidFileError(
            f"{fields.path}: {fields.prefix}attention.recurrent_layers must say true or false for {stored} layers"
        )
    every = _but_every(fields.count("full_attention_interval", 4), layers)
    heads, inner = fields.count("ssm.time_step_rank"), fields.count("ssm.inner_size")
    if inner % heads:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}ssm.inner_size {inner} is no multiple of {heads} heads")
    return Qwen3NextConfig(
        **shared | {"num_layers": layers, "sliding_windows": (None,) * layers},
        delta=DeltaSizes(
            key_heads=fields.count("ssm.group_count"),
            heads=heads,
            key_dim=fields.count("ssm.state_size"),
            value_dim=inner // heads,
            taps=convolution_taps(fields, "ssm.conv_kernel"),
        ),
        delta_layers=every if recurrent is None else frozenset(n for n in range(layers) if recurrent[n]),
        attention_bias=gguf_has_bias(checkpoint),
        mixture=mixture,
        num_experts=mixture.experts if mixture else 0,
        sparse_layers=sparse_in_gguf(checkpoint, layers),
    )


# ---- what is stored --------------------------------------------------------------------------------------------------


def decay_of_log(stored: StoredTensor, config: Any) -> StoredTensor:
    """The decay -exp(A_log), as GGUF files store it."""
    del config
    return computed(stored, stored.shape, lambda values: -np.exp(values), "F32")


def _rows(pick: Callable[[Any], tuple[int, NDArray[np.int64]]]) -> View:
    """View of the rows that `pick` returns for a config, together with the number of all rows."""

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        total, rows = pick(config)
        if stored.shape[:1] != (total,):
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}; the model's config asks for "
                f"{total} rows"
            )
        return stored.select(rows)

    return view


def attention_rows(part: str, *, fused: bool = False) -> View:
    """View of the rows of "q", "gate", "k" or "v"; each head's query precedes its gate.

    Args:
        part: one of these.
        fused: the stored matrix has k and v after all queries and gates; otherwise only queries and gates.
    """

    def pick(config: Qwen3NextConfig) -> tuple[int, NDArray[np.int64]]:
        first, kv = 2 * config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        total = first + 2 * kv if fused else first
        if part in "kv":
            start = first + kv * (part == "v")
            return total, np.arange(start, start + kv)
        heads = np.arange(first).reshape(config.num_heads, 2, config.head_dim)
        return total, heads[:, int(part == "gate")].reshape(-1)

    return _rows(pick)


def joint_rows(part: str) -> View:
    """View of the rows of "qkv" or "z" in a matrix with q, k, v and output gates z for each key head in turn."""

    def pick(config: Qwen3NextConfig) -> tuple[int, NDArray[np.int64]]:
        sizes, heads = config.delta, config.delta.key_heads
        q, k, v, z = np.split(
            np.arange(sizes.channels + sizes.parts[2]).reshape(heads, -1),
            np.cumsum([size // heads for size in sizes.parts]),
            axis=1,
        )
        chosen = (q, k, v) if part == "qkv" else (z,)
        return sizes.channels + sizes.parts[2], np.concatenate([each.reshape(-1) for each in chosen])

    return _rows(pick)


def joint_gates(part: str) -> View:
    """View of the rows of "b" (the update strength) or "a" (the decay) in a matrix that is grouped by key head."""

    def pick(config: Qwen3NextConfig) -> tuple[int, NDArray[np.int64]]:
        total = 2 * config.delta.heads
        return total, np.arange(total).reshape(config.delta.key_heads, 2, -1)[:, int(part == "a")].reshape(-1)

    return _rows(pick)


def tiled_rows(part: str) -> View:
    """View of rows in GGUF's qwen35 and qwen35moe, where the first value heads of all key heads come first.

    In qwen3next the rows keep their order. Source: the inverse of llama.cpp's `_LinearAttentionVReorderBase`.

    Args:
        part: "qkv" for channels of the convolution, "z" for elements of values, "a" or "b" for one row per head.
    """

    def pick(config: Qwen3NextConfig) -> tuple[int, NDArray[np.int64]]:
        sizes, behind = config.delta, config.delta.parts[0] + config.delta.parts[1]
        rows = _in_tiles(config) if part in "ab" else _expanded(_in_tiles(config), sizes.value_dim)
        if part == "qkv":
            rows = np.concatenate([np.arange(behind), behind + rows])
        return len(rows), rows

    return _rows(pick)


def _in_tiles(config: Qwen3NextConfig) -> NDArray[np.int64]:
    """The index in the file of each value head."""
    sizes = config.delta
    if config.model_type in ("qwen3_next", "qwen3next"):
        return np.arange(sizes.heads)
    return np.arange(sizes.heads).reshape(-1, sizes.key_heads).T.reshape(-1)


def _expanded(heads: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    return (heads[:, None] * size + np.arange(size)).reshape(-1)


def _value_order(config: Qwen3NextConfig) -> NDArray[np.int64]:
    return _expanded(np.argsort(_in_tiles(config)), config.delta.value_dim)


TILED_COLUMNS = ColumnOrder(_value_order)
"""View of columns whose inputs are values in the order of `tiled_rows`."""


def gguf_keys(config: Any) -> dict[str, Any]:
    """Metadata of experts, delta nets and their layers; 4 is written as the interval, which old readers require."""
    sizes = config.delta
    keys: dict[str, Any] = {
        "ssm.conv_kernel": sizes.taps,
        "ssm.state_size": sizes.key_dim,
        "ssm.group_count": sizes.key_heads,
        "ssm.time_step_rank": sizes.heads,
        "ssm.inner_size": sizes.parts[2],
        "full_attention_interval": 4,
        "attention.recurrent_layers": [layer in config.delta_layers for layer in range(config.num_layers)],
    }
    return keys | ({} if config.mixture is None else qwen_moe.gguf_keys(config))


def qwen35_keys(config: Any) -> dict[str, Any]:
    """The metadata with M-RoPE sections, which llama.cpp requires; text has the same position in all of them."""
    count = config.rope.dim // 2
    usual: dict[str, Any] = {"rope.dimension_sections": [-(-count // 3), (count + 1) // 3, count // 3, 0]}
    return gguf_keys(config) | (axes_keys(config) if config.rope.axes else usual)
