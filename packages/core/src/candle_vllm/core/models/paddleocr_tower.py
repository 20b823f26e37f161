# SPDX-License-Identifier: MIT
"""PaddleOCR-VL's vision encoder, with its projection to the text model.

The blocks are Qwen2-VL's (`qwen_vl.py`): x + attention(norm(x)), then x + mlp(norm(x)); queries and keys rotate by the
row and the column of their patch. Learned positions of a grid are interpolated to the image's grid. After the last
norm and a norm of the projection, cells of 2 x 2 patches become one vector, which two matrices project to an embedding.
Source: PaddlePaddle, 2025, arXiv:2510.14528.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.grid_positions import GridPositions, centred
from candle_vllm.core.models.qwen_vl import QwenTower, QwenTowerConfig, check_sizes, rule_of
from candle_vllm.core.models.siglip import LARGE, area_of_gguf, gguf_sizes, hf_values
from candle_vllm.core.models.tower_family import TowerFamily, mark_of_cells, turned_by_grid
from candle_vllm.core.vision.preprocessing import NOTHING

# ---- config ----------------------------------------------------------------------------------------------------------

_EDGES = {"shortest_edge": 384 * 384, "longest_edge": 1536 * 1536}


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> QwenTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config")
    patch, cell = vision.count("patch_size", 14), vision.count("spatial_merge_size", 2, most=64)
    check_sizes(vision, processor, patch, cell, frames=1)
    return _config(
        Fields({"size": _EDGES, **processor.values}, processor.path),
        said,
        **hf_values(vision.with_defaults(**LARGE | {"num_hidden_layers": 27})),
        learned=vision.count("image_size", 384) // patch,
        patch=patch,
        cell=cell,
        text_size=text_size,
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> QwenTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`. See `with_grid`."""
    return _config(
        area_of_gguf(fields),
        said,
        **gguf_sizes(fields),
        activation="gelu_tanh",
        learned=1,
        cell=2,
        text_size=text_size,
    )


def _config(processor: Fields, said: Mapping[str, Any], *, patch: int, cell: int, **own: Any) -> QwenTowerConfig:
    rule = msgspec.structs.replace(rule_of(processor, patch, cell, said), grows="rounded")
    most: dict[str, Any] = {"side": rule.longest // patch, "most_patches": rule.most_cells * cell**2}
    return QwenTowerConfig(**own, **most, patch=patch, cell=cell, rule=rule)


# ---- model -----------------------------------------------------------------------------------------------------------


class LastNorms:
    """The encoder's last norm, and the projection's norm of each patch: x [T, E] -> [T, E]."""

    def __init__(self, last: Callable[[Value], Value], projection: Callable[[Value], Value]) -> None:
        self.last, self.projection = last, projection

    def __call__(self, x: Value) -> Value:
        return self.projection(side_by_side(self.last(x)))  # a copy, because a norm cannot read a norm's result


class PaddleOcrTower(QwenTower):
    """The vision encoder: patches of an image to embeddings; see `Tower`."""

    def __init__(self, config: QwenTowerConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        self.positions = GridPositions(config.learned, config.hidden_size, placement, centred)
        last, projection = (LayerNorm(config.hidden_size, eps, placement) for eps in (config.norm_eps, 1e-5))
        self.norm = LastNorms(last, projection)


# ---- weight names ----------------------------------------------------------------------------------------------------

_LAST = ("norm:weight", "norm:bias")
WEIGHTS = (
    *(
        dataclasses.replace(line, target=line.target.replace("norm:", "norm.last:")) if line.target in _LAST else line
        for line in siglip.names("visual.vision_model")
    ),
    *pair("norm.projection:", ("projector.pre_norm", "mlp_AR.pre_norm"), "mm.input_norm"),
    *pair("joined:", ("projector.linear_1", "mlp_AR.linear_1"), "mm.1"),
    *pair("projector:", ("projector.linear_2", "mlp_AR.linear_2"), "mm.2"),
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<|IMAGE_PLACEHOLDER|>"


FAMILY = TowerFamily(
    name="paddleocr_tower",
    hf={"PaddleOCRVLForConditionalGeneration": "paddleocr_vl"},
    gguf=("paddleocr",),
    settings=("min_pixels", "max_pixels", "size.shortest_edge", "size.longest_edge"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=siglip.with_grid,
    prepared=siglip.prepared,
    build=PaddleOcrTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"<|IMAGE_START|>{_MARK}<|IMAGE_END|>",
    words_around=mark_of_cells(_MARK),
    turned=turned_by_grid,
)
