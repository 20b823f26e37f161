# SPDX-License-Identifier: MIT
"""Rules of images that are cut into grids of square tiles: those of Llama 4, Cohere 2 Vision and InternVL.

Tiles follow each other row by row, then the whole image as one tile; an image whose grid is one tile has only that.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import Cut, Rule, grid_of, resized, tiled


class CanvasRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of Llama 4: tiles of a canvas with the image at its top left, followed by the whole image.

    The scale of a canvas is the factor that fits the image into it. The canvas with the smallest scale of at least 1 is
    used, otherwise the one with the largest scale; of several, the one with the fewest tiles. The image is not
    enlarged, except to a side of one tile. An image whose canvas is one tile has only that tile.

    Attributes:
        tile: pixels of a tile's side.
        most: maximum number of tiles of a canvas.
        grows: whether the canvas with the largest scale is used, and the image is enlarged to it.
    """

    tile: int
    most: int
    grows: bool = False

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`; scales are compared in fp32, as in transformers."""
        sides = grids_of(self.most)
        scales = (np.array(sides, np.float32) * self.tile / np.array((height, width), np.float32)).min(1)
        found = scales[scales >= 1]
        scale = found.min() if len(found) and not self.grows else scales.max()
        return cut_of(min((each for each, one in zip(sides, scales) if one == scale), key=math.prod), self.tile)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut, tile = self.cut(picture.height, picture.width), self.tile
        canvas = np.zeros((tile * max(cut.rows, 1), tile * max(cut.columns, 1), 3), np.uint8)
        high, wide, _ = canvas.shape
        if not self.grows:
            high, wide = min(max(picture.height, tile), high), min(max(picture.width, tile), wide)
        if wide / picture.width < high / picture.height:
            high = max(min(math.floor(picture.height * (wide / picture.width)), high), 1)
        else:
            wide = max(min(math.floor(picture.width * (high / picture.height)), wide), 1)
        canvas[:high, :wide] = resized(picture.pixels, high, wide, self.resample)
        return tiled(canvas, picture.pixels, cut, self.resample)


class FilledCanvasRule(CanvasRule, frozen=True, kw_only=True, tag=True):
    """Rule of Cohere 2 Vision: the canvas of `CanvasRule`, which the image fills, so that it may be enlarged."""

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut = self.cut(picture.height, picture.width)
        return tiled(filled(picture, cut, self.resample), picture.pixels, cut, self.resample)


class RatioRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of InternVL: the image fills a grid of tiles, which the whole image follows as a tile.

    The grid has the nearest ratio of width to height; of several, it is the last one that has less than twice the
    image's pixels, else the first, in the order of their tiles and columns. An image whose grid is one tile has only
    that tile.

    Attributes:
        tile: pixels of a tile's side.
        least, most: minimum and maximum number of tiles of a grid.
    """

    tile: int
    least: int = 1
    most: int

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        grids = [each for each in grids_of(self.most) if math.prod(each) >= self.least]
        grids.sort(key=lambda grid: (math.prod(grid), grid[1]))
        apart = [abs(width / height - columns / rows) for rows, columns in grids]
        first, *near = (each for each, one in zip(grids, apart) if one == min(apart))
        fits = [each for each in near if math.prod(each) * self.tile**2 < 2 * height * width]
        return cut_of(fits[-1] if fits else first, self.tile)

    def tiles(self, picture: Picture) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """See `Rule`."""
        cut = self.cut(picture.height, picture.width)
        return tiled(filled(picture, cut, self.resample), picture.pixels, cut, self.resample)


def grids_of(most: int) -> list[tuple[int, int]]:
    """Rows and columns of all grids of up to `most` tiles."""
    return [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]


def cut_of(grid: tuple[int, int], tile: int) -> Cut:
    """The `Cut` of a grid of square tiles."""
    return Cut(*((0, 0) if grid == (1, 1) else grid), tile, tile)


def filled(picture: Picture, cut: Cut, resample: int) -> NDArray[np.uint8]:
    """Stretch an image to the size of its grid."""
    return resized(picture.pixels, cut.height * max(cut.rows, 1), cut.width * max(cut.columns, 1), resample)


def with_whole(picture: Picture, cut: Cut, whole: Rule) -> list[NDArray[np.uint8]]:
    """The tiles of a grid, if there is one, that the image fills, and the tile of the whole image by another rule."""
    return [*(grid_of(filled(picture, cut, whole.resample), cut) if cut.rows else ()), *whole.tiles(picture)]
