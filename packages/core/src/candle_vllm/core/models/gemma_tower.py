# SPDX-License-Identifier: MIT
"""Gemma 3's vision encoder: SigLIP's, with the mean of each cell's patches normalised and projected.

An image is a square of embeddings (by default 256), which attend to each other in the text model; with pan and scan,
its crops are further squares. Sources: Gemma Team, 2025, arXiv:2503.19786; Chu et al., 2024, arXiv:2312.16886 (mean
of cells). Shapes: C cells, E hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import plus_one, transposed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.siglip import (
    SMALL,
    Siglip,
    config_of_tiles,
    gguf_values,
    hf_values,
    names,
    prepared,
    processor_of_gguf,
)
from candle_vllm.core.models.tower_family import TowerConfig, TowerFamily
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, Cut, over, stretch_rule

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read `config.json` and `preprocessor_config.json` of Gemma 3."""
    processor = over(processor, said)
    vision = fields.section("vision_config")
    patch = vision.count("patch_size", 16)
    side, count = vision.count("image_size", 224) // patch, fields.count("mm_tokens_per_image", 256)
    row = math.isqrt(count)
    if row * row != count or side % row:
        raise InvalidFileError(
            f"{fields.path}: mm_tokens_per_image is {count}; {side} x {side} patches cannot become as many squares"
        )
    return config_of_tiles(
        processor,
        stretch_rule(processor),
        pooled=True,
        whole=True,
        **hf_values(vision.with_defaults(**SMALL)),
        patch=patch,
        side=side,
        cell=side // row,
        text_size=text_size,
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files of Gemma 3; keys begin with `clip.vision.`."""
    tile = fields.count("image_size", most=MAX_TILE)
    processor = over(processor_of_gguf(fields, {"size": {"height": tile, "width": tile}}), said)
    values = gguf_values(fields, tile)
    return config_of_tiles(processor, stretch_rule(processor), pooled=True, whole=True, **values, text_size=text_size)


# ---- model -----------------------------------------------------------------------------------------------------------


class GemmaTower(Siglip):
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    def __init__(self, config: TowerConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        self.cell_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(self.cell_norm(cells))


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS: Sequence[WeightName] = (
    *names("vision_tower.vision_model", "vision_tower"),  # published names, and those of transformers 5
    WeightName(
        "cell_norm:weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
        "mm.soft_emb_norm.weight",
        hf_view=plus_one,
    ),
    WeightName(
        "projector:weight",
        "multi_modal_projector.mm_input_projection_weight",
        "mm.input_projection.weight",
        hf_view=transposed,
        gguf_view=transposed,
    ),
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

_ASKS, _MARK = "<start_of_image>", "<image_soft_token>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image in a prompt: the marks of the image, then, for crops, text with their marks."""
    tile = f"\n\n{_ASKS}{_MARK * math.prod(grid)}<end_of_image>\n\n"
    if not cut.rows:
        return tile
    parts = " ".join([tile] * (cut.tiles - 1))
    return f"Here is the original image {tile} and here are some crops to help you see better {parts}"


FAMILY = TowerFamily(
    name="gemma_tower",
    hf={"Gemma3ForConditionalGeneration": "gemma3"},
    gguf=("gemma3",),
    settings=(
        "do_pan_and_scan",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_ratio_to_activate",
    ),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=GemmaTower,
    weights=WEIGHTS,
    mark=_MARK,
    asks=_ASKS,
    words_around=words_around,
)
