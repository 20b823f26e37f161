# SPDX-License-Identifier: MIT
"""Config readers of families whose layers differ by more than a window, and checks for unsupported values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf, stretched_context
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.attention_names import gguf_has_bias
from candle_vllm.core.models.experts import without_next_tokens


def local_layers(
    fields: Fields, layers: int, rope: RopeConfig, *, first: int, full_rotates: bool = True
) -> dict[str, Any]:
    """The windows and rotary bases, by `layer_types` and `layer_rope_theta`, as fields of a `LlamaConfig`.

    Args:
        fields: the config.
        layers: number of layers.
        rope: rotary settings, whose base `layer_rope_theta` overrides.
        first: without `layer_types`, every fourth layer has no window, counted in both directions from this one.
        full_rotates: without `layer_rope_theta`, layers without a window have a rotary embedding.

    Raises:
        UnsupportedModelError: layers of one kind have several bases.
        InvalidFileError: `layer_rope_theta` has a wrong length or entry.
    """
    window = fields.count("sliding_window")
    usual = tuple(window if (layer - first) % 4 else None for layer in range(layers))
    windows = layer_windows(fields, layers, window) or usual
    thetas = [rope.theta if full_rotates or window else 0 for window in windows]
    thetas = fields.get("layer_rope_theta", list, thetas)
    if len(thetas) != layers or not all(type(theta) in (int, float) and theta >= 0 for theta in thetas):
        raise InvalidFileError(f"{fields.path}: layer_rope_theta is {thetas!r:.80}, not {layers} numbers from 0 on")
    kinds = [{float(t) for t, at in zip(thetas, windows) if t and (at is None) == full} for full in (True, False)]
    if max(map(len, kinds)) > 1:
        raise UnsupportedModelError(f"{fields.path}: layer_rope_theta has several bases for layers of one kind")
    full, local = (dataclasses.replace(rope, theta=next(iter(kind), rope.theta)) for kind in kinds)
    unrotated = frozenset(layer for layer, theta in enumerate(thetas) if not theta)
    rotates = kinds[0] and kinds[1] and full != local
    own = {"sliding_windows": windows, "unrotated_layers": unrotated, "rope": full if kinds[0] else local}
    return own | ({"local_rope": local} if rotates else {})


def with_ropes(fields: Fields, windows: Sequence[int | None]) -> Fields:
    """The config with `rope_parameters` by kind of layer instead of lists of bases and of rotated shares.

    `rope_scaling` applies to layers without a window.
    """
    if any(isinstance(value, dict) for value in fields.section("rope_parameters").values.values()):
        return fields
    made: dict[str, dict[str, Any]] = {}
    names = {"rope_theta": ("rope_theta", 1e4), "partial_rotary_factor": ("partial_rotary_factors", 1.0)}
    for local, kind in enumerate(("full_attention", "sliding_attention")):
        made[kind] = {} if local else dict(fields.section("rope_scaling").values)
        for key, (name, usual) in names.items():
            found = listed(fields, name, len(windows), usual)
            found = [number for number, window in zip(found, windows) if (window is not None) == local] or [usual]
            if any(number != found[0] for number in found):
                raise UnsupportedModelError(f"{fields.path}: {name} has several numbers for layers of one kind")
            made[kind][key] = found[0]
    return Fields({**fields.values, fields.prefix + "rope_parameters": made}, fields.path, fields.prefix)


def rope_of_kind(fields: Fields, kind: str) -> Mapping[str, Any]:
    """The settings of one kind of layer in `rope_parameters`; empty if absent."""
    stored = fields.section("rope_parameters")
    if stored.values and not any(isinstance(value, dict) for value in stored.values.values()):
        raise InvalidFileError(f"{fields.path}: rope_parameters is one for all layers, without {kind}")
    return stored.section(kind).values


def ropes_by_kind(
    fields: Fields, head_dim: int, windows: Sequence[int | None], full: tuple[float, float], local: tuple[float, float]
) -> dict[str, Any]:
    """Rotary settings of layers without and with a window, as fields of a `LlamaConfig`.

    Args:
        fields: a config, with or without `rope_parameters` by kind of layer.
        head_dim: D.
        windows: window of each layer.
        full, local: base and rotated share of a head in layers without and with a window, without `rope_parameters`.
    """
    position = fields.count("max_position_embeddings")
    usual = {"full_attention": full, "sliding_attention": local}
    given = (
        rope_of_kind(fields, kind) or {"rope_theta": base, "partial_rotary_factor": share}
        for kind, (base, share) in usual.items()
    )
    ropes = [rope_from_hf(Fields({"rope_parameters": dict(one)}, fields.path), head_dim, position) for one in given]
    own: dict[str, Any] = {"rope": ropes[0], "max_position": stretched_context(ropes[0], position)}
    return own | ({"local_rope": ropes[1]} if any(windows) else {})


def local_from_gguf(fields: Fields, checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Read GGUF metadata of layers that differ in query heads; those with a window may differ in rotary settings.

    Without a list of windows, the first of every n layers has no window (llama.cpp's `dense_first`); n is 4 by default.

    Returns:
        Fields of a `LlamaConfig`, and the number of query heads of each layer.
    """
    count, lists = fields.count("block_count"), ("attention.head_count", "attention.head_count_kv")
    heads, kv_heads = (by_layer(fields, key, count, further=True) for key in lists)
    if len(set(kv_heads)) > 1:
        raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{lists[1]} is {kv_heads!r:.80}, not one number")
    usual = {fields.prefix + key: counts[0] for key, counts in zip(lists, (heads, kv_heads))}
    shared = shared_from_gguf(Fields({**fields.values, **usual}, fields.path, fields.prefix), checkpoint)
    layers, window = without_next_tokens(fields, count), fields.get("attention.sliding_window", int, 0) or None
    local = RopeConfig(
        theta=fields.get("rope.freq_base_swa", float, shared["rope"].theta),
        dim=fields.get("rope.dimension_count_swa", int, fields.get("rope.dimension_count", int, shared["head_dim"])),
        original_max_position=fields.count("context_length"),
    )
    key = "attention.sliding_window_pattern"
    if not isinstance(fields.values.get(fields.prefix + key), list):
        period = fields.get(key, int, 4)
        pattern = [period == 0 or layer % period > 0 for layer in range(count)]
        fields = Fields({**fields.values, fields.prefix + key: pattern}, fields.path, fields.prefix)
    own = {
        "num_layers": layers,
        "sliding_windows": gguf_windows(fields, count, window, period=4)[:layers],
        "local_rope": local if window else None,
        "qkv_bias": gguf_has_bias(checkpoint),
        "output_bias": "blk.0.attn_output.bias" in checkpoint.tensors,
    }
    return shared | own, heads[:layers]


def heads_by_layer(heads: Sequence[int], kv_heads: int) -> dict[str, Any]:
    """Query heads of each layer, as fields of a `LlamaConfig`: multiples of their greatest common divisor."""
    if (base := math.gcd(*heads)) % kv_heads:
        raise InvalidFileError(f"layers with {heads!r:.80} heads cannot share {kv_heads} key-value heads")
    return {"num_heads": base, "head_factors": tuple(count // base for count in heads)}


def by_layer(fields: Fields, key: str, layers: int, *default: int, further: bool = False) -> tuple[int, ...]:
    """Read a count for each layer: a list, or one number for all; with `further` the list may be longer."""
    stored = fields.values.get(fields.prefix + key)
    if not isinstance(stored, list):
        return (fields.count(key, *default),) * layers
    fits = len(stored) == layers or (further and len(stored) > layers)
    if not fits or not all(type(each) is int and 0 < each <= MAX_COUNT for each in stored[:layers]):
        raise InvalidFileError(f"{fields.path}: {fields.prefix}{key} is {stored!r:.80}, not {layers} counts")
    return tuple(stored[:layers])


def listed(fields: Fields, key: str, layers: int, usual: Any) -> list[Any]:
    """Read a value for each layer: a list, which may be longer than the layers, or one value for all."""
    stored = fields.values.get(fields.prefix + key)
    found = stored[:layers] if isinstance(stored, list) else [usual if stored is None else stored] * layers
    if len(found) < layers:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}{key} has {len(found)} entries for {layers} layers")
    return found


def refuse_others(fields: Fields, implemented: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` if a key has a value that is not implemented."""
    for key, usual in implemented.items():
        if (value := fields.get(key, type(usual), usual)) != usual:
            raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} is {value!r:.40}; implemented: {usual!r}")
