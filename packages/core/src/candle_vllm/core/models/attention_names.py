# SPDX-License-Identifier: MIT
"""Names of queries, keys and values as most families have them; in GGUF files matrices of their own, or rows of one.

Source: llama.cpp's `create_tensor_qkv`; its converter's `--fuse-qkv` writes the second kind for most architectures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import View, chain, qkv_rows
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.quantization.tensors import StoredTensor

HF, GG = "model.layers.{i}.", "blk.{i}."


def projections(views: Mapping[str, View] = MappingProxyType({})) -> list[WeightName]:
    """The lines of q, k and v with their optional biases; `views`: how the rows of some of them are looked at."""
    return [
        WeightName(
            f"layers.{{i}}.attention.qkv:{part}.{kind}",
            f"{HF}self_attn.{part}_proj.{kind}",
            gguf_projection(part, kind, views.get(part)),
            views.get(part),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ]


def gguf_projection(part: str, kind: str, view: View | None = None) -> tuple[Seen, Seen]:
    """The places of q, k or v.

    Args:
        part: "q", "k" or "v".
        kind: "weight" or "bias".
        view: how its rows are looked at, wherever they are.
    """
    alone = view or chain()
    return Seen(f"{GG}attn_{part}.{kind}", alone), Seen(f"{GG}attn_qkv.{kind}", chain(qkv_rows(part), alone))


def gguf_has_bias(checkpoint: Checkpoint) -> bool:
    """Whether q, k and v have biases; files do not say it otherwise."""
    return any(f"blk.0.attn_{part}.bias" in checkpoint.tensors for part in ("q", "qkv"))


def kv_heads_by_layer(fields: Fields) -> tuple[Fields, list[int]]:
    """GGUF metadata with one count of key-value heads, and the counts of all layers, which are that one or 0.

    Raises:
        InvalidFileError: there are not as many counts as layers.
        UnsupportedModelError: the counts differ.
    """
    key, layers = "attention.head_count_kv", fields.count("block_count")
    counts = fields.get(key, list)
    heads = {count for count in counts if type(count) is int and count > 0}
    if len(heads) != 1 or not all(type(count) is int and count in (0, *heads) for count in counts):
        raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} is {counts!r:.80}, not one number and 0")
    if len(counts) != layers:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}{key} has {len(counts)} entries for {layers} layers")
    return Fields({**fields.values, fields.prefix + key: heads.pop()}, fields.path, fields.prefix), counts


Either: TypeAlias = str | tuple[str, ...]


def pair(target: str, hf: Either, gguf: Either = (), view: View | None = None) -> list[WeightName]:
    """The lines of a weight and of its optional bias.

    Args:
        target: of both, up to "weight".
        hf, gguf: the names without ".weight"; of several the first that is stored is meant.
        view: how Hugging Face's is looked at.
    """

    def names(stems: Either, kind: str) -> tuple[str, ...]:
        return tuple(f"{stem}.{kind}" for stem in ((stems,) if isinstance(stems, str) else stems))

    return [WeightName(target + kind, names(hf, kind), names(gguf, kind), view) for kind in ("weight", "bias")]


def also_named(lines: Iterable[WeightName], names: Mapping[str, str | Seen]) -> list[WeightName]:
    """The lines of a table, some with one more Hugging Face name, by their target behind the layer's number."""
    made: list[WeightName] = []
    for line in lines:
        more = names.get(line.target.removeprefix("layers.{i}."))
        usual = line.hf if isinstance(line.hf, tuple) else () if line.hf is None else (line.hf,)
        made.append(line if more is None else dataclasses.replace(line, hf=(*usual, more)))
    return made


def window_keys(config: ModelConfig) -> dict[str, Any]:
    """One window for all layers; models with other patterns are refused when the keys are read again."""
    windows = [window for window in config.sliding_windows if window is not None]
    return {"attention.sliding_window": windows[0]} if windows else {}


def local_keys(config: Any) -> dict[str, Any]:
    """Which layers have a window. In OLMo 3 all have one rotary base, and only layers without a window stretch it.

    llama.cpp has windows for EXAONE 4 of 64 layers alone.
    """
    pattern = [window is not None for window in config.sliding_windows]
    if any(pattern) and config.model_type == "exaone4" and config.num_layers != 64:
        raise UnsupportedModelError("llama.cpp's exaone4 has windows in models of 64 layers alone")
    keys = window_keys(config) | ({"attention.sliding_window_pattern": pattern} if any(pattern) else {})
    local = getattr(config, "local_rope", None)
    return keys | ({} if local is None else {"rope.freq_base_swa": float(local.theta)})


def axes_keys(config: Any) -> dict[str, Any]:
    """How many frequencies time, height and width turn; llama.cpp has room for one axis more."""
    keys: dict[str, Any] = {"rope.dimension_sections": [config.rope.axes.count(axis) for axis in range(4)]}
    deep = getattr(config, "deep", 0)
    return window_keys(config) | keys | ({"n_deepstack_layers": deep} if deep else {})


class RepeatedValues:
    """A view of rows of values [K * V, ...] as [K * D, ...]: in each head the first rows stand for those that lack."""

    def __call__(self, stored: StoredTensor, config: Any) -> StoredTensor:
        own, dim = config.value_dim, config.head_dim
        if not stored.shape or stored.shape[0] % own:
            return stored  # a wrong shape is named by the loader
        heads = np.arange(0, stored.shape[0], own)[:, None]
        return stored.select((heads + np.arange(dim) % own).reshape(-1))

    def undone(self, stored: StoredTensor, config: Any) -> StoredTensor:
        """The rows that are stored."""
        heads = np.arange(0, stored.shape[0], config.head_dim)[:, None]
        return stored.select((heads + np.arange(config.value_dim)).reshape(-1))
