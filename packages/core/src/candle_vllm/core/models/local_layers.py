# SPDX-License-Identifier: MIT
"""Configs of families whose layers with a window differ from the others by more than the window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.loading.config import layer_windows
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf, stretched_context


def local_layers(
    fields: Fields, layers: int, rope: RopeConfig, *, first: int, full_rotates: bool = True
) -> dict[str, Any]:
    """Windows and rotary bases, as fields of a `LlamaConfig`: `layer_types` and `layer_rope_theta`.

    Args:
        fields: the config.
        layers: how many there are.
        rope: what all layers would have.
        first: without `layer_types`, every fourth layer before and behind this one sees all positions.
        full_rotates: without `layer_rope_theta`, layers that see all positions have a rotary embedding.

    Raises:
        UnsupportedModelError: layers of one kind have several bases.
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


def ropes_by_kind(
    fields: Fields, head_dim: int, windows: Sequence[int | None], full: tuple[float, float], local: tuple[float, float]
) -> dict[str, Any]:
    """Rotary settings of layers without and with a window, as fields of a `LlamaConfig`.

    Args:
        fields: a config with `rope_parameters` by kind of layer, or without.
        head_dim: D.
        windows: of each layer.
        full, local: base and rotated share of a head, without and with a window, where `rope_parameters` is absent.
    """
    position, stored = fields.count("max_position_embeddings"), fields.section("rope_parameters")
    usual = {"full_attention": full, "sliding_attention": local}
    given = (
        stored.section(kind).values or {"rope_theta": base, "partial_rotary_factor": share}
        for kind, (base, share) in usual.items()
    )
    ropes = [rope_from_hf(Fields({"rope_parameters": dict(one)}, fields.path), head_dim, position) for one in given]
    own: dict[str, Any] = {"rope": ropes[0], "max_position": stretched_context(ropes[0], position)}
    return own | ({"local_rope": ropes[1]} if any(windows) else {})


def by_layer(fields: Fields, key: str, layers: int, *default: int, further: bool = False) -> tuple[int, ...]:
    """Read a count for each layer: a list, or one number for all; `further` allows counts of layers behind them."""
    stored = fields.values.get(fields.prefix + key)
    if not isinstance(stored, list):
        return (fields.count(key, *default),) * layers
    fits = len(stored) == layers or (further and len(stored) > layers)
    if not fits or not all(type(each) is int and 0 < each <= MAX_COUNT for each in stored[:layers]):
        raise InvalidFileError(f"{fields.path}: {fields.prefix}{key} is {stored!r:.80}, not {layers} counts")
    return tuple(stored[:layers])
