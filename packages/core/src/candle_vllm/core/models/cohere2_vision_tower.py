# SPDX-License-Identifier: MIT
"""The vision encoder of Command A Vision: SigLIP's for tiles, with a gated projection to the text model, Cohere 2.

Cells of s x s patches become one vector, which two matrices with SwiGLU between them project to an embedding. An image
is stretched to a grid of tiles, which the tile of the whole image follows.
Source: `Cohere2VisionForConditionalGeneration` and `Cohere2VisionProcessor` of transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.silu_mul import gate_mul
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import computed
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.canvas_rules import FilledCanvasRule, RatioRule
from candle_vllm.core.models.lfm2_vl_tower import prepared
from candle_vllm.core.models.siglip import SMALL, Siglip, check_tiles, hf_values, names
from candle_vllm.core.models.tower_family import TowerConfig, TowerFamily
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, over, stretch_rule

# ---- config ----------------------------------------------------------------------------------------------------------

_MOST_TILES = 64
PROCESSOR: Mapping[str, Any] = MappingProxyType(
    {
        "resample": 3, "crop_to_patches": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "do_pan_and_scan": False,
    }
)  # fmt: skip
"""Defaults of transformers' image processors of both families; `resample` is Pillow's code of bicubic."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedTowerConfig(TowerConfig):
    """Config of this vision encoder and of Aya Vision's.

    Attributes:
        projected: rows of the first matrix of the projection, half of which are the gate's.
        cell_eps: epsilon of the norm before the projection (Aya Vision); 0 without this norm.
    """

    projected: int
    cell_eps: float = 0.0

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the vectors within the projection."""
        return super().step_bytes(threads) + 256 * 4 * 2 * self.projected


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GatedTowerConfig:
    """Read `config.json` and `preprocessor_config.json` of Cohere 2 Vision."""
    images = over(processor.with_absent(size={"height": 512, "width": 512}, **PROCESSOR), said)
    most = images.count("max_patches", 12, most=_MOST_TILES) if images.get("crop_to_patches", bool) else 1
    config = gated_config(fields, images, text_size, FilledCanvasRule, {"most": most}, projected=36864)
    row = config.side // config.cell
    if (tokens := images.count("patch_size", row)) != row:
        raise InvalidFileError(f"{processor.path}: patch_size is {tokens}; a tile has {row} x {row} embeddings")
    return config


def gated_config(
    fields: Fields,
    images: Fields,
    text_size: int,
    kind: type[FilledCanvasRule] | type[RatioRule],
    most: dict[str, Any],
    *,
    projected: int,
    **own: Any,
) -> GatedTowerConfig:
    """Config of both families.

    Args:
        kind, most: class of the rule, and its numbers of tiles.
        projected: default of `alignment_intermediate_size`.
        own: further fields of the config.
    """
    vision = fields.section("vision_config")
    if vision.count("num_channels", 3) != 3:
        raise UnsupportedModelError(f"{fields.path}: num_channels is {vision.count('num_channels')}; implemented: 3")
    if (projected := fields.count("alignment_intermediate_size", projected)) % 2:
        raise InvalidFileError(f"{fields.path}: alignment_intermediate_size is {projected}, not an even number")
    shared, patch = stretch_rule(images), vision.count("patch_size", 16)
    side, cell = vision.count("image_size", 224) // patch, fields.count("downsample_factor", 2, most=64)
    check_tiles(images, shared.tile, patch, side, cell)
    return GatedTowerConfig(
        **hf_values(vision.with_defaults(**SMALL)),
        **own,
        patch=patch,
        side=side,
        cell=cell,
        text_size=text_size,
        projected=projected,
        rule=kind(tile=shared.tile, **shared.pixels, **most),
    )


# ---- model -----------------------------------------------------------------------------------------------------------


class GatedTower(Siglip):
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    def connect(self, placement: Placement) -> None:
        """See `Siglip`."""
        config, size = self.config, self.config.cell_size
        assert isinstance(config, GatedTowerConfig)
        self.cell_norm = LayerNorm(size, config.cell_eps, placement) if config.cell_eps else None
        self.first = Linear(size, config.projected, placement, bias=True)
        self.second = Linear(config.projected // 2, config.text_size, placement, bias=True)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        cells = cells if self.cell_norm is None else self.cell_norm(cells)
        return self.second(gate_mul(self.first(cells), "silu"))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _gate_first(stored: StoredTensor, config: Any) -> StoredTensor:
    """Rows of the first matrix, or its bias, with those of the gate first; they are stored last."""
    half = config.projected // 2
    return computed(stored, stored.shape, lambda values: np.concatenate([values[half:], values[:half]]))


WEIGHTS = (
    *names("vision_tower.vision_model", "vision_tower"),
    *pair("cell_norm:", "multi_modal_projector.layernorm"),
    *pair("first:", "multi_modal_projector.linear_1", view=_gate_first),
    *pair("second:", "multi_modal_projector.linear_2"),
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

MARK = "<|IMG_PATCH|>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each cell of each tile, and a line break after each tile."""
    return f"<|START_OF_IMG|>{(MARK * math.prod(grid) + '<|IMG_LINE_BREAK|>') * cut.tiles}<|END_OF_IMG|>"


FAMILY = TowerFamily(
    name="cohere2_vision_tower",
    hf={"Cohere2VisionForConditionalGeneration": "cohere2_vision"},
    seen=("siglip_vision_model", None),
    settings=("crop_to_patches", "max_patches"),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=GatedTower,
    weights=WEIGHTS,
    mark=MARK,
    words_around=words_around,
)
