# SPDX-License-Identifier: MIT
"""The vision encoder of LightOnOCR 1 and 2: Pixtral's, with Mistral 3's merger of patches, and a mark for each cell.

Source: `LightOnOcrForConditionalGeneration` of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import pixtral
from candle_vllm.core.models.tower_family import TowerFamily, mark_of_cells
from candle_vllm.core.vision.preprocessing import NOTHING

_ONLY: Mapping[str, Any] = MappingProxyType(
    {"vision_feature_layer": -1, "multimodal_projector_bias": False, "projector_hidden_act": "gelu"}
)
"""Keys of Mistral 3 that this model does not have, and what it computes; other values are refused."""


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> pixtral.PixtralConfig:
    """Read `config.json` and `preprocessor_config.json`: Mistral 3's keys, except those of its projector."""
    eps = fields.section("text_config").get("rms_norm_eps", float, 1e-6)
    for name, only in _ONLY.items():
        if (value := fields.values.get(name, only)) != only:
            raise UnsupportedModelError(f"{fields.path}: {name} is {value!r:.40}; implemented: {only!r}")
    vision = {"patch_size": 14, **fields.section("vision_config").values}
    usual = {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": vision, **_ONLY}
    config = pixtral.config_from_hf(Fields({**fields.values, **usual}, fields.path), processor, text_size, said)
    return dataclasses.replace(config, merged_eps=eps)


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> pixtral.PixtralConfig:
    """Read the metadata of llama.cpp's `mmproj` files, which may name the longest side apart from the encoder's."""
    longest = {f"{fields.prefix}image_size": fields.count("preproc_image_size", fields.count("image_size"))}
    return pixtral.config_from_gguf(Fields({**fields.values, **longest}, fields.path, fields.prefix), text_size, said)


def _named(name: Any) -> tuple[str, ...]:
    name = name.replace("vision_tower.", "vision_encoder.").replace("multi_modal_projector.", "vision_projection.")
    return (name, f"model.{name}")


_MARK = "<|image_pad|>"
FAMILY = TowerFamily(
    name="lighton_tower",
    hf={"LightOnOcrForConditionalGeneration": "lighton_ocr"},
    seen=("pixtral",),
    gguf=("lightonocr",),
    settings=("size.longest_edge",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=pixtral.prepared,
    build=pixtral.Pixtral,
    weights=[dataclasses.replace(line, hf=_named(line.hf)) for line in pixtral.WEIGHTS],
    mark=_MARK,
    words_around=mark_of_cells(_MARK),
)
