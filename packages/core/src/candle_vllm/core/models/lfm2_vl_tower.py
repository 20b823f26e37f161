# SPDX-License-Identifier: MIT
"""The vision encoder of LFM2-VL, SigLIP 2 for any grid of patches, with its projection to the text model, LFM2.

The blocks are SigLIP's (`siglip.py`): x + attention(norm(x)), then x + mlp(norm(x)). The learned positions of a square
grid are resized to the grid of each tile. After the last norm, cells of 2 x 2 patches become one vector, which a layer
norm and two matrices project to an embedding. A small image is one tile of nearly its size; a larger one is cut into a
grid of square tiles, which the tile of the whole image follows.
Sources: Tschannen et al., 2025, arXiv:2502.14786 (SigLIP 2); transformers' `lfm2_vl`.
Shapes: T patches of a tile, E hidden.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import computed
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.canvas_rules import RatioRule, with_whole
from candle_vllm.core.models.grid_positions import GridPositions, smooth
from candle_vllm.core.models.siglip import MOST_PATCHES, SMALL, Block, gguf_values, hf_values, processor_of_gguf
from candle_vllm.core.models.tower_family import Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, AreaRule, Cut, area_rule, over

# ---- config ----------------------------------------------------------------------------------------------------------

_HALF = [0.5, 0.5, 0.5]
_BILINEAR = 2  # Pillow's code of the filter
_MOST_TILES = 64
_SIDE = 16  # side of the learned grid of published models, if a file does not show it
_ONLY = MappingProxyType({"vision_feature_layer": -1, "projector_hidden_act": "gelu", "num_channels": 3})
"""Keys of which one value is implemented, which is also the default."""


class RatioAreaRule(RatioRule, frozen=True, kw_only=True, tag=True):
    """Rule of LFM2-VL: the grid of `RatioRule`, and the whole image by another rule.

    Attributes:
        whole: rule of the whole image.
        alone: an image of up to this many pixels, its sides rounded to cells of `whole`, has no grid.
    """

    whole: AreaRule
    alone: int

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        grid, whole, cell = super().cut(height, width), self.whole.cut(height, width), self.whole.cell
        small = math.prod(round(side / cell) * cell for side in (height, width)) <= self.alone
        return whole if small or not grid.rows else grid._replace(last=(whole.height, whole.width))

    def tiles(self, picture: Picture) -> list[NDArray[np.uint8]]:
        """See `Rule`."""
        return with_whole(picture, self.cut(picture.height, picture.width), self.whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lfm2VlTowerConfig(TowerConfig):
    """Config of this vision encoder.

    Attributes:
        projected: elements of a vector between the matrices of the projection.
        projector_norm: cells are normalised before the projection.
        projector_bias: both matrices of the projection have biases.
    """

    projected: int
    projector_norm: bool = True
    projector_bias: bool = True

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the vectors within the projection."""
        return super().step_bytes(threads) + 256 * 4 * 3 * self.projected


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> Lfm2VlTowerConfig:
    """Read `config.json`, and the settings of images in `preprocessor_config.json` or `processor_config.json`."""
    vision = fields.section("vision_config")
    for part in (fields, vision):
        for key, only in _ONLY.items():
            if (found := part.values.get(key, only)) != only:
                raise UnsupportedModelError(f"{fields.path}: {key} is {found!r:.40}; implemented: {only}")
    positions = vision.count("num_patches", _SIDE**2, most=MOST_PATCHES)
    if (learned := math.isqrt(positions)) ** 2 != positions:
        raise InvalidFileError(f"{fields.path}: num_patches is {positions}, not a square number")
    return _config(
        over(processor, said),
        **hf_values(vision.with_defaults(**SMALL)),
        patch=vision.count("patch_size", 16),
        cell=fields.count("downsample_factor", 2, most=64),
        learned=learned,
        text_size=text_size,
        projected=fields.count("projector_hidden_size", 2560),
        projector_norm=fields.get("projector_use_layernorm", bool, True),
        projector_bias=fields.get("projector_bias", bool, True),
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> Lfm2VlTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files, which have published settings of images; see `completed`."""
    values = gguf_values(fields, 0) | {"cell": fields.count("projector.scale_factor", 2, most=64)}
    del values["side"]
    processor = over(processor_of_gguf(fields, {}), said)
    return _config(processor, **values, learned=_SIDE, text_size=text_size, projected=1)


def completed(config: Lfm2VlTowerConfig, tensors: Mapping[str, StoredTensor]) -> Lfm2VlTowerConfig:
    """Add what only the tensors of a GGUF file show: the projection's parts, and the learned grid's side."""
    table, first = tensors.get("v.position_embd.weight"), tensors.get("mm.1.weight")
    return dataclasses.replace(
        config,
        learned=_SIDE if table is None else math.isqrt(table.shape[0]),
        projected=1 if first is None else first.shape[0],
        projector_norm="mm.input_norm.weight" in tensors,
        projector_bias="mm.1.bias" in tensors,
    )


def _config(processor: Fields, *, patch: int, cell: int, **own: Any) -> Lfm2VlTowerConfig:
    rule, side = _rule(processor, patch, cell), patch * cell
    whole, tile = (rule, 0) if isinstance(rule, AreaRule) else (rule.whole, rule.tile)
    return Lfm2VlTowerConfig(
        **own,
        patch=patch,
        cell=cell,
        side=max(whole.longest, tile) // patch,
        most_patches=max(whole.most_cells, (tile // side) ** 2) * cell**2,
        rule=rule,
    )


def _rule(processor: Fields, patch: int, cell: int) -> AreaRule | RatioAreaRule:
    """The rule of images. transformers resizes also where a published file has `do_resize: false`."""
    for key, known in (("encoder_patch_size", patch), ("downsample_factor", cell)):
        if processor.count(key, known) != known:
            raise InvalidFileError(f"{processor.path}: {key} is {processor.count(key)}; config.json says {known}")
    side, most = patch * cell, MOST_PATCHES // cell**2
    bounds = {
        f"{which}_pixels": side**2 * processor.count(f"{which}_image_tokens", usual, most=most)
        for which, usual in (("min", 64), ("max", 256))
    }
    usual: dict[str, Any] = {"resample": _BILINEAR, "image_mean": _HALF, "image_std": _HALF}
    images = Fields({**usual, **processor.values, "do_resize": True, **bounds}, processor.path)
    whole = msgspec.structs.replace(area_rule(images, side, MOST_PATCHES * patch**2), grows="kept")
    least, tiles = (processor.count(f"{at}_tiles", n, most=_MOST_TILES) for at, n in (("min", 2), ("max", 10)))
    if least > tiles:
        raise InvalidFileError(f"{processor.path}: min_tiles is {least}, more than max_tiles, {tiles}")
    if tiles == 1 or not processor.get("do_image_splitting", bool, True):
        return whole
    if not processor.get("use_thumbnail", bool, True):
        raise UnsupportedModelError(f"{processor.path}: use_thumbnail is false; implemented: true")
    tile = processor.count("tile_size", 512, most=MAX_TILE)
    if tile % side or (tile // patch) ** 2 > MOST_PATCHES:
        raise InvalidFileError(
            f"{processor.path}: tile_size is {tile}, which must be a multiple of {side}, for at most {MOST_PATCHES} "
            f"patches of {patch} x {patch} pixels"
        )
    alone = math.floor(whole.most * min(max(processor.get("max_pixels_tolerance", float, 2.0), 0.0), 1e9))
    return RatioAreaRule(tile=tile, least=least, most=tiles, whole=whole, alone=alone, **whole.pixels)


# ---- model -----------------------------------------------------------------------------------------------------------


class Lfm2VlTower:
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: Lfm2VlTowerConfig, placement: Placement) -> None:
        size, bias = config.hidden_size, config.projector_bias
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.positions = GridPositions(config.learned, size, placement, smooth)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.norm = LayerNorm(size, config.norm_eps, placement)
        self.cell_norm = LayerNorm(config.cell_size, 1e-5, placement) if config.projector_norm else None
        self.first = Linear(config.cell_size, config.projected, placement, bias=bias)
        self.second = Linear(config.projected, config.text_size, placement, bias=bias)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; there are no tables of positions but the one that is resized."""
        del first
        return Placed(np.zeros(len(places), np.int64), self.positions(places, grid))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        assert step.start is not None
        return step.start + self.patches(patches)

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        cells = cells if self.cell_norm is None else self.cell_norm(cells)
        return self.second(activation(self.first(cells), "gelu"))


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT = ("vision_tower.vision_model", "vision_tower")
_UNUSED = re.compile(r"vision_tower\.(?:vision_model\.)?head\.")


def _patch_matrix(stored: StoredTensor, config: TowerConfig) -> StoredTensor:
    """The matrix of patches [E, h * w * 3] with channels before pixels, [E, 3 * h * w], as patches are read."""
    rows, side = stored.shape[0], config.patch
    if stored.shape != (rows, config.patch_size):
        return stored  # the loader reports the wrong shape

    def turned(values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape(rows, side, side, 3).transpose(0, 3, 1, 2).reshape(rows, -1)

    return computed(stored, stored.shape, turned)


WEIGHTS = (
    *(
        dataclasses.replace(line, hf_view=_patch_matrix) if line.target == "patches:weight" else line
        for line in siglip.names(*_AT)
    ),
    *pair("cell_norm:", "multi_modal_projector.layer_norm", "mm.input_norm"),
    *pair("first:", "multi_modal_projector.linear_1", "mm.1"),
    *pair("second:", "multi_modal_projector.linear_2", "mm.2"),
)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Drop the encoder's pooling head, which is not used."""
    del config
    return {name: tensor for name, tensor in tensors.items() if not _UNUSED.match(name)}


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<image>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: the tiles of its grid, row by row, followed by the tile of the whole image."""
    tile, side = _MARK * math.prod(grid), cut.height // grid[0]
    if cut.last is None:
        return f"<|image_start|>{tile}<|image_end|>"
    places = [(row + 1, column + 1) for row in range(cut.rows) for column in range(cut.columns)]
    tiles = "".join(f"<|img_row_{row}_col_{column}|>{tile}" for row, column in places)
    whole = _MARK * math.prod(pixels // side for pixels in cut.last)
    return f"<|image_start|>{tiles}<|img_thumbnail|>{whole}<|image_end|>"


FAMILY = TowerFamily(
    name="lfm2_vl_tower",
    hf={"Lfm2VlForConditionalGeneration": "lfm2_vl"},
    gguf=("lfm2",),
    settings=("do_image_splitting", "min_tiles", "max_tiles", "min_image_tokens", "max_image_tokens"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed,
    prepared=prepared,
    build=Lfm2VlTower,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=words_around,
)
