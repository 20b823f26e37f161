# SPDX-License-Identifier: MIT
"""Checkpoints of NVIDIA's modelopt, in FP8, in NVFP4, or with layers in both."""

from __future__ import annotations

from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization import fp8
from candle_vllm.core.quantization.finding import Found, StoredTensors, layers_with
from candle_vllm.core.quantization.fp4 import nvfp4_tensor

METHODS = ("modelopt", "modelopt_fp4")
FILES = ("hf_quant_config.json",)


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the layers of `quant_method` modelopt; the config may quantise only the KV cache."""
    if "quant_algo" not in config and "kv_cache_quant_algo" in config:
        return
    config.choice("quant_algo", "", "NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_NVFP4", "MIXED_PRECISION")
    for parts in layers_with(stored, ".weight_scale_2"):
        yield parts, nvfp4_tensor(parts, divided=False)
    yield from fp8.layers(Fields({}, config.path), stored)
