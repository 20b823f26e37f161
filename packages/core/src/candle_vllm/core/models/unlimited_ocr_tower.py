# SPDX-License-Identifier: MIT
"""The vision encoders of Unlimited-OCR: those of DeepSeek-OCR 1 (`deepseek_ocr_tower.py`) with grids of up to 32 tiles.

llama.cpp's files of both models are the same; see `FAMILY` of `deepseek_ocr_tower.py`.
Source: `UnlimitedOcrForConditionalGeneration` of transformers.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.models import deepseek_ocr_tower
from candle_vllm.core.models.deepseek_ocr_config import unlimited_from_hf
from candle_vllm.core.models.tower_family import contents_template

FAMILY = dataclasses.replace(
    deepseek_ocr_tower.FAMILY,
    name="unlimited_ocr_tower",
    hf={"UnlimitedOcrForConditionalGeneration": "unlimited_ocr", "UnlimitedOCRForCausalLM": "unlimited-ocr"},
    gguf=(),
    config_from_hf=unlimited_from_hf,
    template=contents_template(deepseek_ocr_tower.FAMILY.mark),
)
