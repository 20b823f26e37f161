# SPDX-License-Identifier: MIT
"""The vision encoder of GOT-OCR 2.0 (`got_ocr2_tower.py`) in the format of its original repository.

Its config describes the text model alone: sizes of the encoder and settings of images are in its code, whose values are
the defaults here. Sources: Wei et al., 2024, arXiv:2409.01704; `GOTQwenForCausalLM` of stepfun-ai/GOT-OCR2_0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import got_ocr2_tower, sam
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.got_ocr2_tower import GotOcr2TowerConfig
from candle_vllm.core.vision.preprocessing import NOTHING


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GotOcr2TowerConfig:
    """Read `config.json`, and `preprocessor_config.json` if there is one."""
    config = got_ocr2_tower.config_from_hf(fields, processor, text_size, said)
    count = (config.side // config.cell) ** 2
    if (found := fields.count("image_token_len", count)) != count:
        raise UnsupportedModelError(f"{fields.path}: image_token_len is {found}; a tile has {count} embeddings")
    if not fields.get("use_im_start_end", bool, True):
        raise UnsupportedModelError(f"{fields.path}: use_im_start_end is false; implemented: true")
    return config


def _own(line: WeightName) -> WeightName:
    """A line of `sam.WEIGHTS` with the name of the tensor in the original repository."""
    assert isinstance(line.hf, tuple)
    second = line.hf[1]
    name = (second.name if isinstance(second, Seen) else second).replace("sam_model.", "vision_tower_high.")
    return dataclasses.replace(line, hf=Seen(name, second.view) if isinstance(second, Seen) else name, gguf=())


FAMILY = dataclasses.replace(
    got_ocr2_tower.FAMILY,
    name="got_tower",
    hf={"GOTQwenForCausalLM": "GOT"},
    images={"size": {"height": 1024, "width": 1024}},
    config_from_hf=config_from_hf,
    weights=(*map(_own, sam.WEIGHTS), *pair("projector:", "mm_projector_vary")),
)
