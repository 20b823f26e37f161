# SPDX-License-Identifier: MIT
"""How Phi-3-vision cuts images into tiles, and shrinks the whole image to one.

Source: `Phi3VImageProcessor` of the published models.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import Cut, Rule, grid_of, require_ratio, resized


class PaddedRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of Phi-3-vision: a grid of tiles with the image in its middle on white, then all of the grid as it is.

    The grid has nearly the image's shape, and the image fills its longer side. The encoder shrinks the last tile.

    Attributes:
        tile, cell: pixels of a tile's side, and of a cell's side.
        most: maximum number of tiles of a grid.
    """

    tile: int
    cell: int
    most: int

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`; a vector follows each row of cells, and one the grid."""
        require_ratio(height, width)
        ratio = max(height, width) / min(height, width)
        longer = max(each for each in range(1, self.most + 1) if each * math.ceil(each / ratio) <= self.most)
        sides = math.ceil(max(int(longer * self.tile / ratio), 1) / self.tile), longer
        rows, columns = sides if height <= width else sides[::-1]
        return Cut(rows, columns, self.tile, self.tile, more=(rows + 1) * (self.tile // self.cell) + 1)

    def tiles(self, picture: Picture) -> list[NDArray[np.uint8]]:
        """See `Rule`; a tall image is resized as a wide one, which may round differently."""
        cut, tall = self.cut(picture.height, picture.width), picture.height > picture.width
        high, wide = (self.tile * side for side in sorted((cut.rows, cut.columns)))
        inner = max(int(wide / (max(picture.height, picture.width) / min(picture.height, picture.width))), 1)
        canvas, top = np.full((high, wide, 3), 255, np.uint8), (high - inner) // 2
        pixels = np.ascontiguousarray(picture.pixels.swapaxes(0, 1) if tall else picture.pixels)
        canvas[top : top + inner] = resized(pixels, inner, wide, self.resample)
        canvas = np.ascontiguousarray(canvas.swapaxes(0, 1) if tall else canvas)
        return [*grid_of(canvas, cut), canvas]


_TAPS = ((-1, -3 / 32), (0, 19 / 32), (1, 19 / 32), (2, -3 / 32))
"""Weights of the pixels around a point in the middle of two, by Keys' cubic with the factor -0.75."""


def shrunk(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Pixels [side, side, 3] of an image whose sides are multiples of `side`, as by torch's `interpolate`, bicubic.

    As that does not smooth, each pixel is the middle one of the pixels that it stands for; of an even number of pixels,
    it is interpolated between the two in the middle. The result is exact, and may exceed 0 to 255.
    """
    found: NDArray[Any] = pixels
    for axis in (0, 1):
        length = found.shape[axis]
        near = np.arange(side) * (length // side) + (length // side - 1) // 2
        if length // side % 2:
            found = found.take(near, axis)
        else:
            parts = ((found.take(np.clip(near + step, 0, length - 1), axis), share) for step, share in _TAPS)
            found = np.add.reduce([part * np.float32(share) for part, share in parts])
    return found.astype(np.float32)
