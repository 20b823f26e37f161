# SPDX-License-Identifier: MIT
"""Config of the vision encoder of MiniCPM-V 4.6 and MiniCPM-OCR, and the order in which it reads patches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.siglip import MOST_PATCHES, SMALL, gguf_values, hf_values, processor_of_gguf
from candle_vllm.core.models.tower_family import TileRows, TowerConfig
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import (
    MAX_RATIO,
    MAX_TILE,
    NOTHING,
    Cut,
    Rule,
    area_rule,
    grid_of,
    over,
    patch_places,
    require_ratio,
    resized,
)

OCR = "MiniCPMOcrForConditionalGeneration"
_HALF = [0.5, 0.5, 0.5]
_BICUBIC = 3  # Pillow's code of the filter
_MOST_SLICES = 64
_CELLS = MappingProxyType({"16x": 4, "4x": 2})
"""Side of a cell in patches, by `downsample_mode`."""
_ONLY = MappingProxyType({
    "merger_times": 1, "merge_kernel_size": [2, 2], "window_kernel_size": [2, 2], "num_channels": 3,
    "drop_vision_last_layer": False,
})  # fmt: skip
"""Keys of which one value is implemented, which is also the default."""


class SliceRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of MiniCPM-V: the whole image as one tile, followed, for a large image, by the tiles of a grid.

    Every tile has about `tile` squared pixels, nearly the shape of what it shows, and sides in whole cells. The grid
    has about one tile for as many pixels of the image; its ratio of columns to rows is nearest to that of the sides.

    Attributes:
        tile: side of a square that has the pixels of a tile.
        cell: pixels of a cell's side.
        most: maximum number of tiles of a grid; 1 for images of one tile.
        grows: smaller images are enlarged; otherwise only their sides are rounded to cells.
    """

    tile: int
    cell: int
    most: int
    grows: bool = True

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`; of several nearest grids, the one with the most rows is used."""
        require_ratio(height, width)
        whole, count = self._near(height, width, self.grows), math.ceil(width * height / self.tile**2)
        if (count := min(count, self.most)) <= 1:
            return Cut(0, 0, *whole)
        counts = [each for each in (count - 1, count, count + 1) if 1 < each <= self.most]
        grids = [(rows, each // rows) for each in counts for rows in range(1, each + 1) if each % rows == 0]
        apart = [abs(math.log(width / height) - math.log(columns / rows)) for rows, columns in grids]
        _, _, (rows, columns) = min((error, -grid[0], grid) for error, grid in zip(apart, grids))
        part = self._near(max(round(height / rows), 1), max(round(width / columns), 1), grows=True)
        return Cut(rows, columns, *part, last=whole)

    def tiles(self, picture: Picture) -> list[NDArray[np.uint8]]:
        """See `Rule`."""
        cut = self.cut(picture.height, picture.width)
        sizes = [cut.last or (cut.height, cut.width), (cut.rows * cut.height, cut.columns * cut.width)]
        whole, *canvas = (resized(picture.pixels, *size, self.resample) for size in sizes if size[0])
        return [whole, *(tile for each in canvas for tile in grid_of(each, cut))]

    def _near(self, height: int, width: int, grows: bool) -> tuple[int, int]:
        if grows or height * width > self.tile**2:
            ratio = width / height
            height = int(self.tile / math.sqrt(ratio))
            width = int(height * ratio)
        return max(round(height / self.cell), 1) * self.cell, max(round(width / self.cell), 1) * self.cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniCPMVTowerConfig(TowerConfig):
    """Config of this vision encoder.

    Attributes:
        table: side of the table of learned positions.
        merged_at: number of blocks before the patches of a square become one vector; 0 if they do not.
    """

    table: int
    merged_at: int

    @property
    def windows(self) -> int:
        """See `TowerConfig`: the squares of a tile."""
        return self.patches // 4 if self.merged_at else 1

    @property
    def cell_rows(self) -> int:
        """See `TowerConfig`."""
        return 4

    def patches_of_row(self, layer: int) -> int:
        """See `TowerConfig`; behind the merger, a row stands for a square."""
        return 4 if 0 < self.merged_at < layer else 1

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the vectors within the merging of squares, and within the projection."""
        inner = 4 * (4 * self.intermediate_size + 2 * self.hidden_size) if self.merged_at else 0
        return super().step_bytes(threads) + 4 * (self.patches * inner + 256 * 3 * self.cell_size)

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`; with squares, the patches of each follow each other."""
        if not self.merged_at:
            return super().read(tile)
        places = patch_places(tile.shape[0] // self.patch, tile.shape[1] // self.patch, self.cell)
        return Squares(tile, self, _by_squares(places), None, (4,) * (len(places) // 4))


class Squares(TileRows):
    """A tile whose patches the encoder reads square by square of 2 x 2; a cell has 2 x 2 squares."""

    def strips(self, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """See `TileRows`."""
        for rows, patches in super().strips(most):
            yield rows, _by_squares(patches)


def _by_squares(rows: NDArray[Any]) -> NDArray[Any]:
    """Reorder the rows [T, n] of each cell of 4 x 4 patches, row by row, to those of its squares of 2 x 2."""
    return rows.reshape(-1, 2, 2, 2, 2, rows.shape[1]).swapaxes(2, 3).reshape(rows.shape)


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> MiniCPMVTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config").with_defaults(**SMALL)
    for part in (fields, vision):
        for key, only in _ONLY.items():
            if (found := part.values.get(key, only)) not in (only, None):
                raise UnsupportedModelError(f"{fields.path}: {key} is {found!r:.40}; implemented: {only}")
    values, inserted = hf_values(vision), fields.get("insert_layer_id", int, 6)
    if vision.get("insert_layer_id", int, inserted) != inserted:
        raise InvalidFileError(f"{fields.path}: vision_config has another insert_layer_id than {inserted}")
    usual = fields.choice("downsample_mode", "4x" if OCR in fields.get("architectures", list) else "16x", *_CELLS)
    mode = processor.choice("downsample_mode", usual, *_CELLS)
    if mode != usual:
        raise InvalidFileError(f"{processor.path}: downsample_mode is {mode}; config.json says {usual}")
    patch = vision.count("patch_size", 16, most=MAX_TILE)
    return _config(
        over(processor, said),
        mode,
        inserted,
        **values,
        patch=patch,
        table=vision.count("image_size", 224, most=MAX_TILE) // patch,
        text_size=text_size,
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> MiniCPMVTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files, whose `image_size` is the side of a tile; see `completed`."""
    tile, values = fields.count("image_size", most=MAX_TILE), gguf_values(fields, 0)
    del values["side"]
    mode = next((mode for mode, cell in _CELLS.items() if cell == values["cell"]), None)
    if mode is None:
        raise UnsupportedModelError(f"{fields.path}: projector.scale_factor is {values['cell']}; implemented: 4, 2")
    del values["cell"]
    inserted = list(fields.get("wa_layer_indexes", list)) if mode == "16x" else [0]
    if len(inserted) != 1:
        raise UnsupportedModelError(f"{fields.path}: wa_layer_indexes is {inserted!r:.40}; implemented: one layer")
    layer = Fields({"wa_layer_indexes": inserted[0]}, fields.path).get("wa_layer_indexes", int)
    processor = over(processor_of_gguf(fields, {"scale_resolution": tile}), said)
    return _config(processor, mode, layer, **values, table=1, text_size=text_size)


def completed(config: MiniCPMVTowerConfig, tensors: Mapping[str, StoredTensor]) -> MiniCPMVTowerConfig:
    """Add what only the tensors of a GGUF file show: the side of the table of positions."""
    table = tensors.get("v.position_embd.weight")
    return config if table is None else dataclasses.replace(config, table=math.isqrt(table.shape[0]))


def _config(processor: Fields, mode: str, inserted: int, *, patch: int, **own: Any) -> MiniCPMVTowerConfig:
    cell = _CELLS[processor.choice("downsample_mode", mode, *_CELLS)]
    if not 0 <= inserted < own["num_layers"]:
        raise InvalidFileError(f"{processor.path}: squares are merged after layer {inserted} of {own['num_layers']}")
    rule = _rule(processor, patch, patch * cell)
    longest = math.isqrt(MAX_RATIO) * rule.tile // rule.cell + 2
    own |= {"patch": patch, "cell": cell, "rule": rule, "side": longest * cell}
    own |= {"merged_at": inserted + 1, "windowed": frozenset({inserted + 1})} if cell == 4 else {"merged_at": 0}
    area = (rule.tile / rule.cell) ** 2
    cells = max(longest, math.ceil(area + longest / 2) + 1)  # sides grow by half a cell, or to one
    return MiniCPMVTowerConfig(**own, most_patches=cells * cell**2)


def _rule(processor: Fields, patch: int, cell: int) -> SliceRule:
    if processor.count("patch_size", patch) != patch:
        raise InvalidFileError(
            f"{processor.path}: patch_size is {processor.count('patch_size')}; the model's is {patch}"
        )
    if not processor.get("use_image_id", bool, True):
        raise UnsupportedModelError(f"{processor.path}: use_image_id is false; implemented: true")
    tile = processor.count("scale_resolution", 448, most=MAX_TILE)
    if tile < cell or 2 * (tile // patch) ** 2 > MOST_PATCHES:
        raise InvalidFileError(
            f"{processor.path}: scale_resolution is {tile}; it must be {cell} or more, for at most "
            f"{MOST_PATCHES // 2} patches of {patch} x {patch} pixels"
        )
    usual = {"resample": _BICUBIC, "image_mean": _HALF, "image_std": _HALF}
    own: dict[str, Any] = {"size": {}, "min_pixels": 1, "max_pixels": 1}  # which are not of this rule
    shared = area_rule(Fields({**usual, **processor.values, **own}, processor.path), cell, 1)
    return SliceRule(
        tile=tile,
        cell=cell,
        most=processor.count("max_slice_nums", 9, most=_MOST_SLICES) if processor.get("slice_mode", bool, True) else 1,
        grows=processor.choice("small_image_upsize", "always", "always", "never") == "always",
        **shared.pixels,
    )
