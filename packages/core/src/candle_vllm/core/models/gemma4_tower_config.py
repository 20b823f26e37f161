# SPDX-License-Identifier: MIT
"""Read the config of Gemma 4's vision encoder from config.json, preprocessor_config.json or `mmproj` metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models.tower_family import TowerConfig
from candle_vllm.core.vision.preprocessing import NOTHING, budget_rule, over

_CAUSAL = (1536, 2560)  # hidden sizes of the text models E2B and E4B, where an image's tokens attend causally
MOST_POSITIONS = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4TowerConfig(TowerConfig):
    """Config of Gemma 4's vision encoder.

    Attributes:
        clipped: inputs and outputs of the layers' matrices are clamped to stored bounds.
        standardised: the means of cells are shifted and scaled.
        theta: base of the rotary embedding.
    """

    clipped: bool = False
    standardised: bool = False
    theta: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers and self.hidden_size // self.num_heads % 4:
            raise InvalidFileError(
                f"vision encoder: head size {self.hidden_size // self.num_heads} must be a multiple of 4"
            )
        if not 0 < self.theta <= 1e9:
            raise InvalidFileError(f"vision encoder: rope_theta is {self.theta}; it must be above 0 and at most 1e9")


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> Gemma4TowerConfig:
    """Read `config.json` and `preprocessor_config.json` of gemma4."""
    vision, text = fields.section("vision_config"), fields.section("text_config")
    vision.choice("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    rotation = vision.section("rope_parameters")
    rotation.choice("rope_type", "axial", "axial", "default")
    size, heads = vision.count("hidden_size", 768), vision.count("num_attention_heads", 12)
    for key, usual, known in (("num_key_value_heads", heads, heads), ("head_dim", 64, size // heads)):
        if vision.count(key, usual) != known:
            raise UnsupportedModelError(f"{fields.path}: vision_config.{key} other than {known} is not implemented")
    return _config(
        over(processor, said),
        hidden_size=size,
        norm_eps=vision.get("rms_norm_eps", float, 1e-6),
        learned=vision.count("position_embedding_size", 10240, most=MOST_POSITIONS),
        intermediate_size=vision.count("intermediate_size", 3072),
        num_layers=vision.count("num_hidden_layers", 16, most=MAX_LAYERS),
        num_heads=heads,
        clipped=vision.get("use_clipped_linears", bool, False),
        standardised=vision.get("standardize", bool, False),
        theta=rotation.get("rope_theta", float, 100.0),
        patch=vision.count("patch_size", 16, most=256),
        cell=vision.count("pooling_kernel_size", 3, most=64),
        text_size=text_size,
        whole=text.get("use_bidirectional_attention", str, "") == "vision",
        blank=text.get("pad_token_id", int, 0),
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> Gemma4TowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files of Gemma 4; keys begin with `clip.vision.`."""
    return _config(
        over(Fields({}, fields.path), said),
        hidden_size=fields.count("embedding_length"),
        norm_eps=fields.get("attention.layer_norm_epsilon", float, 1e-6),
        learned=10240,
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=fields.count("block_count", most=MAX_LAYERS),
        num_heads=fields.count("attention.head_count"),
        clipped=True,  # `prepared` adds neutral bounds and shifts to a file without them
        standardised=True,
        patch=fields.count("patch_size", most=256),
        cell=fields.count("projector.scale_factor", 3, most=64),
        text_size=text_size,
        whole=text_size not in _CAUSAL,
        blank=0,
    )


def _config(processor: Fields, *, patch: int, cell: int, **own: Any) -> Gemma4TowerConfig:
    rule = budget_rule(processor, patch, cell)
    given = rule.normalisation  # the encoder reads 2 x - 1 of the normalised x
    mean, std = tuple(m + s / 2 for m, s in zip(given.mean, given.std)), tuple(s / 2 for s in given.std)
    rule = msgspec.structs.replace(rule, normalisation=dataclasses.replace(given, mean=mean, std=std))
    own |= {"most_patches": rule.most_cells * cell**2, "side": rule.longest // patch, "pooled": True, "gated": True}
    return Gemma4TowerConfig(**own, activation="gelu_tanh", patch=patch, cell=cell, rule=rule)
