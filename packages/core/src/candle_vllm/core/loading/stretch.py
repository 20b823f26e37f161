# SPDX-License-Identifier: MIT
"""Extend a model's context with YaRN: `yarn_scaling_factor` of the engine's settings."""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.fields import MAX_COUNT
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint

_SETTING = "yarn_scaling_factor"
_SCALED_BY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight")  # GGUF tensors: Llama 3's, longrope's


def stretched(config: ModelConfig, factor: float | None, checkpoint: Checkpoint) -> ModelConfig:
    """Multiply the model's context length by `factor` with YaRN; None changes nothing.

    Raises:
        ConfigError: the model has no rotary embedding, has one that is scaled already, has two different ones, or runs
            on transformers' layers; or the context would be too long.
    """
    if factor is None:
        return config
    if config.implementation != "native":
        raise ConfigError(
            f"yarn_scaling_factor={factor:g}: {config.model_type} runs on layers of transformers, which take scaling "
            "from config.json alone: leave the setting out, and write rope_parameters there",
            _SETTING,
        )
    table, unrotated = getattr(config, "positions", 0), len(getattr(config, "unrotated_layers", ()))
    if table or config.slopes or unrotated == config.num_layers or not getattr(config, "rotates", True):
        what = f"a table of {config.max_position} positions" if table else "no rotary positions"
        raise ConfigError(
            f"yarn_scaling_factor={factor:g}: {config.model_type} has {what}, and YaRN stretches only rotary ones: "
            "leave the setting out",
            _SETTING,
        )
    rope = config.rope
    if rope.kind != "default" or any(name in checkpoint.tensors for name in _SCALED_BY_TENSORS):
        how = "by tensors of its file" if rope.kind == "default" else f"{rope.kind}, in its files"
        raise ConfigError(
            f"yarn_scaling_factor={factor:g}: the rotary positions of this model are scaled already ({how}), for "
            f"{config.max_position} tokens: leave the setting out",
            _SETTING,
        )
    if any(isinstance(getattr(config, field.name), RopeConfig) for field in _own_fields(config)):
        raise ConfigError(
            f"yarn_scaling_factor={factor:g}: the layers of {config.model_type} have rotary positions of two kinds, "
            "which one factor cannot stretch: leave the setting out",
            _SETTING,
        )
    length = int(config.max_position * factor)
    if length > MAX_COUNT:
        raise ConfigError(
            f"yarn_scaling_factor={factor:g}: {config.max_position} tokens would become {length}, and at most "
            f"{MAX_COUNT} are possible: set it to {MAX_COUNT // config.max_position} or less",
            _SETTING,
        )
    yarn = dataclasses.replace(rope, kind="yarn", factor=factor, original_max_position=config.max_position)
    return dataclasses.replace(config, rope=yarn, max_position=length)


def _own_fields(config: ModelConfig) -> list[dataclasses.Field[object]]:
    """Return the fields of a family's configuration beyond `ModelConfig`."""
    shared = {field.name for field in dataclasses.fields(ModelConfig)}
    return [field for field in dataclasses.fields(config) if field.name not in shared]
