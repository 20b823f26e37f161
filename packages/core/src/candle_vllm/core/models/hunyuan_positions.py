# SPDX-License-Identifier: MIT
"""Rotary positions of Hunyuan V1 (`hunyuan.py`), and of HunyuanOCR's text model, whose M-RoPE has an axis more.

Sources: transformers' `HunYuanDenseV1RotaryEmbedding` and `HunYuanVLRotaryEmbedding`; vLLM's `XDRotaryEmbedding`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields


def stretched(fields: Fields) -> tuple[Fields, list[Any]]:
    """The config with the scaled rotary base instead of alpha, as in transformers; and the sections of M-RoPE.

    `rope_scaling` that is added to a file with `rope_parameters` applies: see `rope_from_hf`.
    """
    scaling, names = fields.section("rope_parameters"), ("mrope_section", "xdrope_section")
    if added := fields.section("rope_scaling").values:
        scaling = Fields({**scaling.values, "rope_type": None, **added}, fields.path)
    found = [scaling.get(name, list) for name in names if name in scaling]
    if found[1:] and found[0] != found[1]:
        raise InvalidFileError(f"{fields.path}: the rotary settings have a mrope_section and another xdrope_section")
    rope = {name: value for name, value in scaling.values.items() if name not in names}
    if alpha := scaling.get("alpha", float, 0.0):
        scaling.choice("rope_type" if "rope_type" in scaling else "type", "dynamic", "dynamic", "xdrope")
        dim = fields.count("head_dim", fields.count("hidden_size") // fields.count("num_attention_heads"))
        theta = scaling.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
        rope = {"rope_type": "default", "rope_theta": stretched_base(theta, alpha, dim, fields.path)}
    given = {f"{fields.prefix}rope_parameters": rope or None, f"{fields.prefix}rope_scaling": None}
    return Fields({**fields.values, **given}, fields.path, fields.prefix), found[0] if found else []


def stretched_base(theta: float, alpha: float, dim: int, path: Path) -> float:
    """The rotary base for an alpha and heads of `dim` elements."""
    if dim <= 2 or not 0 < alpha <= 1e9:
        raise UnsupportedModelError(f"{path}: the rotary alpha is {alpha} for heads of {dim} elements")
    return theta * alpha ** (dim / (dim - 2))


def with_axes(shared: dict[str, Any], sections: list[Any], path: Path) -> dict[str, Any]:
    """Add M-RoPE's axes: of position, column, row and image, or the last 3, as in the original code and in llama.cpp.

    transformers 5.23 has doubled sections instead of the sections twice, so that halves of a pair differ in their axis.
    """
    if not any(sections):
        return shared
    rope = shared["rope"]
    right = len(sections) in (3, 4) and all(type(each) in (int, float) and each % 1 == 0 <= each for each in sections)
    if not right or 2 * sum(sections) != rope.dim:
        raise InvalidFileError(
            f"{path}: the rotary sections are {sections!r:.80}; they must be 3 or 4 numbers, {rope.dim // 2} in all"
        )
    axes = [axis for axis, count in zip((0, 2, 1, 3)[-len(sections) :], sections) for _ in range(int(count))]
    return shared | {"model_type": "hunyuan_vl", "rope": dataclasses.replace(rope, axes=tuple(axes))}


def section_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of M-RoPE."""
    counts = [config.rope.axes.count(axis) for axis in (0, 2, 1, 3)]
    if not counts[0]:
        raise UnsupportedModelError("llama.cpp's hunyuan_vl has only M-RoPE with a section of positions")
    return {"rope.dimension_sections": counts}
