# SPDX-License-Identifier: MIT
"""Rule of images in LLaVA-OneVision, LLaVA-NeXT and Granite 4 Vision: a grid of tiles with the image in its middle."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import Cut, Rule, crop_rule, grid_of, require_ratio, resized

_MOST_TILES = 64


class GridRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of LLaVA-OneVision: the whole image as a square tile, then a grid of tiles with the image in its middle.

    The grid is the one that shows most of the image's pixels; of several, the smallest, then the first. The image is in
    the middle `Cut.shown` rows and columns of its cells, whose embeddings become `Cut.joined` rows and columns.

    Attributes:
        tile: pixels of a tile's side.
        cell: pixels of a cell's side; pixels of a tile beyond whole cells are not read.
        grids: numbers of rows and columns of the grids.
        most: above 1.21 times the cells of this number of tiles, embeddings are interpolated to that many.
    """

    tile: int
    cell: int
    grids: tuple[tuple[int, int], ...]
    most: int

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        require_ratio(height, width)

        def unused(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(self.tile * grid[1] / width, self.tile * grid[0] / height)
            return -min(int(width * scale) * int(height * scale), height * width), math.prod(grid)

        (rows, columns), side = min(self.grids, key=unused), self.tile // self.cell
        high, wide = rows * side, columns * side
        if width / height > wide / high:
            high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
        ratio = math.sqrt(high * wide / (self.most * side**2))
        found = (int(high // ratio), int(wide // ratio)) if ratio > 1.1 else (high, wide)
        return Cut(rows, columns, side * self.cell, side * self.cell, shown=(high, wide), joined=found)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut, tile, sides = self.cut(picture.height, picture.width), self.tile, (picture.height, picture.width)
        canvas = np.zeros((tile * cut.rows, tile * cut.columns, 3), np.uint8)
        scale = min(most / side for most, side in zip(canvas.shape, sides))
        high, wide = (min(math.ceil(side * scale), most) for side, most in zip(sides, canvas.shape))
        top, left = (canvas.shape[0] - high) // 2, (canvas.shape[1] - wide) // 2
        canvas[top : top + high, left : left + wide] = resized(picture.pixels, high, wide, self.resample)
        whole = resized(picture.pixels, tile, tile, self.resample)[None]
        parts = np.concatenate([whole, grid_of(canvas, cut._replace(height=tile, width=tile))])
        return np.ascontiguousarray(parts[:, : cut.height, : cut.width])


def grid_rule(processor: Fields, patch: int, most: int, usual: list[list[int]]) -> GridRule:
    """Read the rule of tiles with the sides in `size`; `usual` are the heights and widths of a file without grids."""
    shared = crop_rule(Fields({**processor.values, "do_center_crop": False, "do_pad": False}, processor.path))
    given, tile = processor.get("image_grid_pinpoints", list, usual), shared.tile
    grids = [
        (each[0] // tile, each[1] // tile)
        for each in given
        if isinstance(each, list) and len(each) == 2 and all(type(side) is int and side > 0 for side in each)
        and not each[0] % tile and not each[1] % tile and each[0] * each[1] <= _MOST_TILES * tile**2
    ]  # fmt: skip
    if not grids or len(grids) != len(given):
        raise InvalidFileError(
            f"{processor.path}: image_grid_pinpoints must list heights and widths of up to {_MOST_TILES} tiles of "
            f"{tile} x {tile} pixels"
        )
    return GridRule(tile=tile, cell=patch, grids=tuple(grids), most=most, **shared.pixels)
