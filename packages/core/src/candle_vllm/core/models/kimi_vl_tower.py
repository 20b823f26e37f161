# SPDX-License-Identifier: MIT
"""The vision encoder of Kimi-VL, MoonViT, with its projection to the text model: Kimi K2.5's (`kimi_tower.py`).

Images have other limits, and their settings other names. Source: Kimi Team, 2025, arXiv:2504.07491, and the image
processor of the published repositories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import kimi_tower
from candle_vllm.core.models.kimi_tower import KimiTowerConfig
from candle_vllm.core.models.pixtral import adjacent
from candle_vllm.core.models.qwen_vl import MOST_PATCHES
from candle_vllm.core.models.siglip import processor_of_gguf
from candle_vllm.core.vision.preprocessing import NOTHING

_SIDE = {"max_height": 510, "max_width": 510}
"""Patches: the published processor refuses images with 512 patches on a side; here they are made smaller."""


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> KimiTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    if not processor.get("pad_input", bool, False):
        raise UnsupportedModelError(f"{processor.path}: pad_input is false, so images are cropped; implemented: true")
    kernel = processor.get("merge_kernel_size", list, [2, 2])
    if len({*map(str, kernel)}) != 1 or len(kernel) != 2:
        raise UnsupportedModelError(f"{processor.path}: merge_kernel_size is {kernel!r:.40}; implemented: squares")
    most = processor.count("in_token_limit", 4096)
    images = {**processor.values, "size": _SIDE, "merge_size": kernel[0], "max_patches": most}
    return kimi_tower.config_from_hf(fields, Fields(images, processor.path), text_size, _named(processor, said))


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> KimiTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files, which have no limit of patches."""
    images = processor_of_gguf(fields, {"size": _SIDE, "max_patches": 4096})
    return kimi_tower.config_of_file(fields, images, text_size, _named(images, said))


def _named(processor: Fields, said: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's values with the names of Kimi K2.5."""
    if "in_token_limit" not in said:
        return {**said}
    return {"max_patches": Fields({**said}, processor.path).count("in_token_limit", most=MOST_PATCHES)}


FAMILY = dataclasses.replace(
    kimi_tower.FAMILY,
    name="kimi_vl_tower",
    hf={"KimiVLForConditionalGeneration": "kimi_vl"},
    gguf=("kimivl",),
    settings=("in_token_limit",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    weights=(*kimi_tower.SHARED, *kimi_tower.qkv_names(adjacent)),  # GGUF files have the rows of published files
    written=kimi_tower.FAMILY.written.replace("<|media_begin|>", "<|media_start|>"),
)
