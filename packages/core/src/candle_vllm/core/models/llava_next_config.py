# SPDX-License-Identifier: MIT
"""Config of the vision encoders in `llava_next_tower.py`, from config.json and from llama.cpp's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models import clip_tower
from candle_vllm.core.models.clip_tower import ClipTowerConfig
from candle_vllm.core.models.llama4_tower import Rows
from candle_vllm.core.models.llava_grid import GridRule, grid_rule
from candle_vllm.core.models.siglip import ACTIVATIONS, MOST_PATCHES, SMALL, gguf_values, processor_of_gguf
from candle_vllm.core.models.tower_family import TileRows, TowerConfig
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, crop_rule, over

# ---- config ----------------------------------------------------------------------------------------------------------

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_MOST_TILES = 64  # as `grid_rule` allows, so that no embeddings are interpolated
_MOST_FEATURES = 16
_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 32, "image_size": 224, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
SIGLIP = {
    **SMALL, "patch_size": 16, "image_size": 224, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"
}  # fmt: skip
"""Defaults of transformers for CLIP's and SigLIP's vision encoders."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaNextTowerConfig(ClipTowerConfig):
    """Config of this vision encoder.

    Attributes:
        features: numbers of blocks, after which x is projected; 0 for the embedded patches.
        classed: the encoder is CLIP's, with a class token; otherwise SigLIP's.
        tiles: maximum number of tiles of an image.
        factor: factor of embeddings: with Granite `embedding_multiplier`, which transformers applies to images too,
            divided by `residual_multiplier`, see `LlamaConfig.stream_eps`.
    """

    features: tuple[int, ...]
    classed: bool
    tiles: int
    factor: float = 1.0

    @property
    def cell_size(self) -> int:
        """See `TowerConfig`."""
        return self.hidden_size * len(self.features)

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        rows = TowerConfig.read(self, tile)
        return Rows.of(rows) if self.classed else rows

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds copies of what is projected, and of all tiles' embeddings if they are joined."""
        kept = 2 * self.cell_size if self.features[1:] else 0
        joined = 3 * self.tiles * self.text_size if self.tiles > 1 else 0
        return super().step_bytes(threads) + 4 * self.patches * (kept + joined)


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> LlavaNextTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.with_defaults(vision_config=clip_tower.CLIP_LARGE).section("vision_config")
    kind = vision.choice("model_type", "clip_vision_model", "clip_vision_model", "siglip_vision_model")
    classed = kind == "clip_vision_model"
    vision = vision.with_defaults(**(_CLIP if classed else SIGLIP))
    strategy = "default" if classed else "full"  # transformers cannot join tiles with the other one
    if (found := fields.get("vision_feature_select_strategy", str, "default")) != strategy:
        raise UnsupportedModelError(
            f"{fields.path}: vision_feature_select_strategy is {found!r:.40}; {kind} is implemented with {strategy!r}"
        )
    patch, size = vision.count("patch_size"), vision.count("image_size", most=MAX_TILE)
    grids = fields.values.get("image_grid_pinpoints") or GRIDS
    if (own := processor.values.get("image_grid_pinpoints", GRIDS)) != grids:
        raise InvalidFileError(f"{processor.path}: image_grid_pinpoints is {own!r:.80}; config.json has {grids!r:.80}")
    activations = clip_tower.CLIP_ACTIVATIONS
    return _config(
        square_rule(over(processor, said), patch),
        size,
        classed,
        _features(fields, vision.count("num_hidden_layers", most=MAX_LAYERS)),
        processor,
        hidden_size=vision.count("hidden_size"),
        intermediate_size=vision.count("intermediate_size"),
        num_heads=vision.count("num_attention_heads"),
        norm_eps=vision.get("layer_norm_eps", float),
        activation=activations[vision.choice("hidden_act", "gelu", *activations)],
        projector_activation=ACTIVATIONS[fields.choice("projector_hidden_act", "gelu", *ACTIVATIONS)],
        projector_bias=fields.get("multimodal_projector_bias", bool, True),
        patch=patch,
        text_size=text_size,
        factor=_factor(fields.section("text_config")),
    )


def _factor(text: Fields) -> float:
    """See `LlavaNextTowerConfig`; Granite's residual stream is stored divided by `residual_multiplier`."""
    if text.get("model_type", str, "") != "granite":
        return 1.0
    found = dict[str, float]()
    for key in ("embedding_multiplier", "residual_multiplier"):
        found[key] = factor = text.get(key, float, 1.0)
        if not 0 < factor <= 1e6:
            raise InvalidFileError(f"{text.path}: {key} is {factor}; it must be above 0 and at most 1e6")
    return found["embedding_multiplier"] / found["residual_multiplier"]


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> LlavaNextTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; `completed` refuses SigLIP's encoder.

    All blocks of a file are used unless it has `feature_layer`: the converter leaves out those that are not.
    """
    whole, tile = Fields(fields.values, fields.path, "clip."), fields.count("image_size", most=MAX_TILE)
    if whole.get("use_silu", bool, False):
        raise UnsupportedModelError(f"{fields.path}: clip.use_silu is true; implemented: GELU and quick GELU")
    fields.choice("mm_projector_type", "mlp2x_gelu", "mlp2x_gelu")
    values = gguf_values(fields, tile) | {
        "activation": "gelu_tanh" if whole.get("use_gelu", bool, False) else "quick_gelu"
    }
    del values["cell"], values["side"]
    count, flat = values.pop("num_layers"), fields.get("image_grid_pinpoints", list, [])
    if len(flat) % 2:
        raise InvalidFileError(f"{fields.path}: clip.vision.image_grid_pinpoints has {len(flat)} numbers, not pairs")
    layers = fields.get("feature_layer", list, [count])
    chosen = Fields({"vision_feature_layer": layers}, fields.path)
    if flat:
        fields.choice("mm_patch_merge_type", "spatial_unpad", "spatial_unpad")
        fields.choice("image_aspect_ratio", "anyres", "anyres")
        grids = [[high, wide] for wide, high in zip(flat[::2], flat[1::2])]  # the order of llama.cpp
        size = {"size": {"height": tile, "width": tile}}
        given = Fields({**processor_of_gguf(fields, size).values, "image_grid_pinpoints": grids}, fields.path)
        rule = square_rule(over(given, said), values["patch"])
    else:
        fields.choice("image_aspect_ratio", "square", "square")
        if said:
            raise InvalidFileError(f"{fields.path}: this model has no grids of tiles")
        given = processor_of_gguf(fields, {"size": {"shortest_edge": tile}, "crop_size": tile})
        rule = crop_rule(given)
    usual: dict[str, Any] = {"projector_activation": "gelu", "projector_bias": True}
    return _config(rule, tile, True, _features(chosen, count), given, **values, **usual, text_size=text_size)


def completed(config: LlavaNextTowerConfig, tensors: Mapping[str, StoredTensor]) -> LlavaNextTowerConfig:
    """Refuse SigLIP in a GGUF file: it is Granite Vision's, whose text model scales embeddings of images too."""
    if "v.class_embd" not in tensors:
        raise UnsupportedModelError("clip.projector_type is 'mlp': implemented with CLIP's encoder (v.class_embd)")
    return config


def _config(
    rule: Any, size: int, classed: bool, features: tuple[int, ...], processor: Fields, *, patch: int, **own: Any
) -> LlavaNextTowerConfig:
    side = size // patch
    if not 0 < side**2 <= MOST_PATCHES or rule.tile != size:
        raise InvalidFileError(
            f"{processor.path}: tiles of {rule.tile} pixels; the model has images of {size} pixels, {side} x {side} "
            f"patches of {patch} pixels, and at most {MOST_PATCHES} are supported"
        )
    grids = rule.grids if isinstance(rule, GridRule) else ()
    return LlavaNextTowerConfig(
        **own,
        num_layers=max(features),
        features=features,
        classed=classed,
        tiles=1 + max((rows * columns for rows, columns in grids), default=0),
        patch=patch,
        side=side,
        cell=1,
        most_patches=side**2 + classed,
        rule=rule,
    )


def _features(fields: Fields, stored: int) -> tuple[int, ...]:
    """The numbers of blocks before each output that is projected, from an index of transformers' hidden states."""
    given = fields.values.get("vision_feature_layer", -2)
    layers = given if isinstance(given, list) else [given]
    if not 0 < len(layers) <= _MOST_FEATURES or not all(
        type(layer) is int and -stored - 1 <= layer <= stored for layer in layers
    ):
        raise UnsupportedModelError(
            f"{fields.path}: vision_feature_layer is {given!r:.60}, not up to {_MOST_FEATURES} layers of {stored}"
        )
    found = tuple(layer if layer >= 0 else stored + 1 + layer for layer in layers)
    if not max(found):
        raise UnsupportedModelError(f"{fields.path}: vision_feature_layer is {given!r:.60}, which has no block")
    return found


def square_rule(processor: Fields, cell: int) -> GridRule:
    """The rule of tiles; transformers resizes to `size`, and then crops to `crop_size`, which must be the same."""
    sides = set[Any]()
    for key in ("size", "crop_size"):
        value = processor.values.get(key, 224 if key == "size" else None)
        sides |= set(value.values()) if isinstance(value, dict) else {value} - {None}
    if len(sides) != 1:
        raise InvalidFileError(f"{processor.path}: size and crop_size must be one number of pixels, not {sides!r:.60}")
    tile = sides.pop()
    square = Fields({**processor.values, "size": {"height": tile, "width": tile}}, processor.path)
    return grid_rule(square, cell, _MOST_TILES, GRIDS)
