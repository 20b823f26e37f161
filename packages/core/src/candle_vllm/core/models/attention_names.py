# SPDX-License-Identifier: MIT
"""Names of q, k and v in most checkpoints, and other table rows and GGUF keys that several families share.

GGUF files store q, k and v as three matrices or as one (llama.cpp's `create_tensor_qkv`; `--fuse-qkv` when converting).
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
    """The table rows of q, k and v with their optional biases; `views` reorder or select the rows of some of them."""
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
    """The two GGUF names of q, k or v: of a separate tensor, and of the fused one, of which it is some rows.

    Args:
        part: "q", "k" or "v".
        kind: "weight" or "bias".
        view: view of its rows, in either form.
    """
    alone = view or chain()
    return Seen(f"{GG}attn_{part}.{kind}", alone), Seen(f"{GG}attn_qkv.{kind}", chain(qkv_rows(part), alone))


def gguf_has_bias(checkpoint: Checkpoint) -> bool:
    """Whether q, k and v have biases; only the tensors of a file show it."""
    return any(f"blk.0.attn_{part}.bias" in checkpoint.tensors for part in ("q", "qkv"))


def kv_heads_by_layer(fields: Fields) -> tuple[Fields, list[int]]:
    """GGUF metadata with one number of key-value heads, and the numbers of all layers: this number, or 0.

    Raises:
        InvalidFileError: the number of counts is not the number of layers.
        UnsupportedModelError: the positive counts differ, all counts are 0, or an entry is not a count.
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
    """The table rows of a weight and of its optional bias.

    Args:
        target: prefix of both targets, up to "weight" or "bias".
        hf, gguf: the names without ".weight"; if there are several, the first stored one is used.
        view: view of the Hugging Face tensor.
    """

    def names(stems: Either, kind: str) -> Either:
        return f"{stems}.{kind}" if isinstance(stems, str) else tuple(f"{stem}.{kind}" for stem in stems)

    return [WeightName(target + kind, names(hf, kind), names(gguf, kind), view) for kind in ("weight", "bias")]


def also_named(lines: Iterable[WeightName], names: Mapping[str, str | Seen]) -> list[WeightName]:
    """The rows of a table; a target in `names` (without "layers.{i}.") gets one more Hugging Face name."""
    made: list[WeightName] = []
    for line in lines:
        more = names.get(line.target.removeprefix("layers.{i}."))
        usual = line.hf if isinstance(line.hf, tuple) else () if line.hf is None else (line.hf,)
        made.append(line if more is None else dataclasses.replace(line, hf=(*usual, more)))
    return made


def window_keys(config: ModelConfig) -> dict[str, Any]:
    """The GGUF key of the window, if a layer has one. A file whose windows this key cannot express is refused later."""
    windows = [window for window in config.sliding_windows if window is not None]
    return {"attention.sliding_window": windows[0]} if windows else {}


def local_keys(config: Any) -> dict[str, Any]:
    """The GGUF keys of layers with a window: its size, these layers, and their rotary base if the config has one.

    llama.cpp supports windows in EXAONE 4 only for 64 layers: UnsupportedModelError for other models.
    """
    pattern = [window is not None for window in config.sliding_windows]
    if any(pattern) and config.model_type == "exaone4" and config.num_layers != 64:
        raise UnsupportedModelError("llama.cpp's exaone4 has windows only in models of 64 layers")
    keys = window_keys(config) | ({"attention.sliding_window_pattern": pattern} if any(pattern) else {})
    local = getattr(config, "local_rope", None)
    return keys | ({} if local is None else {"rope.freq_base_swa": float(local.theta)})


def parallel_keys(config: Any) -> dict[str, Any]:
    """The GGUF key of blocks in which attention and the MLP read the same x."""
    return {"use_parallel_residual": config.parallel}


def axes_keys(config: Any) -> dict[str, Any]:
    """The GGUF keys of the window, of M-RoPE and of DeepStack, each if the model has it.

    M-RoPE's key has the number of frequencies of time, height, width and a fourth axis (`hunyuan_positions.py`).
    """
    axes = config.rope.axes
    keys: dict[str, Any] = {"rope.dimension_sections": [axes.count(axis) for axis in range(4)]} if axes else {}
    deep = getattr(config, "deep", 0)
    return window_keys(config) | keys | ({"n_deepstack_layers": deep} if deep else {})


class RepeatedValues:
    """View of rows of values [K * V, ...] as [K * D, ...]: in each head, its V rows are repeated up to D rows."""

    def __call__(self, stored: StoredTensor, config: Any) -> StoredTensor:
        own, dim = config.value_dim, config.head_dim
        if not stored.shape or stored.shape[0] % own:
            return stored  # the loader reports the wrong shape
        heads = np.arange(0, stored.shape[0], own)[:, None]
        return stored.select((heads + np.arange(dim) % own).reshape(-1))

    def undone(self, stored: StoredTensor, config: Any) -> StoredTensor:
        """Return the stored rows."""
        heads = np.arange(0, stored.shape[0], config.head_dim)[:, None]
        return stored.select((heads + np.arange(config.value_dim)).reshape(-1))
