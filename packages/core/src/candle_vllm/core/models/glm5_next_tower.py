# SPDX-License-Identifier: MIT
"""The vision encoder of GLM-5.3-Flash: GLM-OCR's (`glm4v_tower.py`) with clamped SwiGLU and padded images.

Sources: transformers' `Glm5NextVisionModel` and `Glm5NextImageProcessorPil`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models import glm4v_tower
from candle_vllm.core.models.glm4v_tower import GlmTowerConfig
from candle_vllm.core.models.local_layers import refuse_others
from candle_vllm.core.models.qwen_vl import FRAMES, MOST_ASKED, MOST_PATCHES, check_sizes
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, Rule, area_rule, over, resized

# ---- images ----------------------------------------------------------------------------------------------------------


class PaddedRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of GLM-5.3-Flash: one tile of whole cells, with the image at its top left, and black beside and below it.

    The image keeps its size if the tile has `least` to `most` cells; it is enlarged to at least `least` cells, or
    reduced to the largest height for which the tile has `most` cells or fewer.

    Attributes:
        cell: pixels of a cell's side.
        least, most: bounds of the number of cells.
    """

    cell: int
    least: int
    most: int

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        rows, columns = self._grid(height, width)
        if rows * columns < self.least:
            scale = math.sqrt(self.least * self.cell**2 / (height * width))
            rows, columns = self._grid(max(1, math.ceil(height * scale)), max(1, math.ceil(width * scale)))
        if rows * columns > self.most:
            low, high, rows, columns = 1, height, 1, 1
            while low <= high:
                middle = (low + high) // 2
                grid = self._grid(middle, max(1, math.floor(width * middle / height)))
                if math.prod(grid) <= self.most:
                    (rows, columns), low = grid, middle + 1
                else:
                    high = middle - 1
        return Cut(0, 0, rows * self.cell, columns * self.cell)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the numbers of rows and columns of cells that cover an area."""
        return math.ceil(height / self.cell), math.ceil(width / self.cell)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        sides, cut = (picture.height, picture.width), self.cut(picture.height, picture.width)
        scale = min(cut.height / sides[0], cut.width / sides[1])
        if math.prod(sides) >= self.least * self.cell**2:
            scale = min(1.0, scale)
        height, width = (
            max(1, min(most, math.floor(side * scale))) for most, side in zip((cut.height, cut.width), sides)
        )
        tile = np.zeros((1, cut.height, cut.width, 3), np.uint8)
        tile[0, :height, :width] = resized(picture.pixels, height, width, self.resample)
        return tile


# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GlmTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config")
    vision.choice("hidden_act", "silu", "silu", "swish")
    refuse_others(vision, {"swiglu_limit": 10.0})
    patch, cell = vision.count("patch_size", 14), vision.count("spatial_merge_size", 2, most=64)
    check_sizes(vision, processor, patch, cell, temporal_patch_size=FRAMES, out_hidden_size=text_size)
    rule = _rule(processor, patch, cell, said)
    return GlmTowerConfig(
        hidden_size=vision.count("hidden_size", 1024),
        intermediate_size=vision.count("intermediate_size", 4096),
        projected=vision.count("projection_intermediate_size", 10240),
        num_layers=vision.count("depth", 24, most=MAX_LAYERS),
        num_heads=vision.count("num_heads", 16),
        norm_eps=vision.get("rms_norm_eps", float, 1e-5),
        qkv_bias=vision.get("attention_bias", bool, True),
        head_norms=True,
        gated=True,
        gate="silu_10",
        activation="gelu",
        learned=0,
        patch=patch,
        cell=cell,
        text_size=text_size,
        rule=rule,
        side=rule.most * cell,
        most_patches=rule.most * cell**2,
    )


def _rule(processor: Fields, patch: int, cell: int, said: Mapping[str, Any]) -> PaddedRule:
    """How images are resized; an operator may allow more cells than the default limit of patches."""
    fields, most = over(processor, said), MOST_PATCHES // cell**2
    if "max_image_tokens" in said:
        most = MOST_ASKED // cell**2
        fields.count("max_image_tokens", most=most)
    usual = area_rule(Fields({**fields.values, "size": {}}, fields.path), patch * cell, most=1 << 40)
    least, largest = fields.count("min_image_tokens", 16, most=most), min(fields.count("max_image_tokens", 8000), most)
    if largest < least:
        raise InvalidFileError(f"{fields.path}: images must have at least {least} tokens and at most {largest}")
    return PaddedRule(cell=patch * cell, least=least, most=largest, **usual.pixels)


FAMILY = dataclasses.replace(
    glm4v_tower.FAMILY,
    name="glm5_next_tower",
    hf={"Glm5NextForConditionalGeneration": "glm5_next"},
    gguf=(),
    settings=("min_image_tokens", "max_image_tokens"),
    config_from_hf=config_from_hf,
    config_from_gguf=None,
    completed=None,
    turned=None,
)
