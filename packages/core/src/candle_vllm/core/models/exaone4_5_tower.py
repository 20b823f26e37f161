# SPDX-License-Identifier: MIT
"""The vision encoder of EXAONE 4.5: Qwen2.5-VL's (`qwen_vl.py`), whose query heads share heads of keys and values.

Tokens of an image have positions like those of a text. Sources: `Exaone4_5_ForConditionalGeneration` of transformers;
Ainslie et al., 2023, arXiv:2305.13245 (shared heads).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.views import qkv_rows
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import qwen_vl
from candle_vllm.core.models.qwen_vl import QwenTowerConfig
from candle_vllm.core.models.tower_family import mark_of_cells
from candle_vllm.core.vision.preprocessing import NOTHING


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> QwenTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    config, vision = qwen_vl.config_from_hf(fields, processor, text_size, said), fields.section("vision_config")
    heads, size = vision.count("num_key_value_heads", 8), vision.count("out_hidden_size", text_size)
    if config.num_heads % heads:
        raise InvalidFileError(
            f"{fields.path}: vision_config.num_key_value_heads is {heads}, which does not divide {config.num_heads}"
        )
    if size != text_size:
        raise InvalidFileError(f"{fields.path}: vision_config.out_hidden_size is {size}; the text model's {text_size}")
    rope = vision.section("rope_scaling" if "rope_scaling" in vision else "rope_parameters")
    rope.choice("rope_type", rope.choice("type", "axial", "axial"), "axial")
    theta = rope.get("rope_theta", float, vision.get("rope_theta", float, config.theta))
    if not 1 < theta <= 1e12:
        raise InvalidFileError(f"{fields.path}: rope_theta of the vision encoder is {theta}; it must be 1 to 1e12")
    return dataclasses.replace(config, kv_heads=heads, theta=theta)


def _own(line: WeightName) -> WeightName:
    """A line of `qwen_vl.WEIGHTS` with the rows of fewer heads of keys and values."""
    part = line.target.removeprefix("layers.{i}.qkv:")[0]
    name = line.hf.name if isinstance(line.hf, Seen) else ""
    return dataclasses.replace(line, hf=Seen(name, qkv_rows(part)) if name else line.hf, gguf=())


_MARK = "<|image_pad|>"
FAMILY = dataclasses.replace(
    qwen_vl.FAMILY,
    name="exaone4_5_tower",
    hf={"Exaone4_5_ForConditionalGeneration": "exaone4_5"},
    gguf=(),
    config_from_hf=config_from_hf,
    config_from_gguf=None,
    weights=[*map(_own, qwen_vl.WEIGHTS)],
    mark=_MARK,
    written=f"<vision>{_MARK}</vision>",
    words_around=mark_of_cells(_MARK),
    turned=None,
)
