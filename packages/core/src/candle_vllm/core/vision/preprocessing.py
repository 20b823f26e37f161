# SPDX-License-Identifier: MIT
"""Cut images into the tiles that a vision encoder reads, by the model's `preprocessor_config.json` (before step 3).

Each model family has a rule, one of `Rule`: it computes the grid of tiles from an image's size, and makes the tiles.

Pixels stay uint8 until the vision encoder reads them: this takes a quarter of the memory of float32, and a table maps
each value to its normalised float. Resampling is Pillow's, so that tiles equal those of transformers' Pillow processors
bit for bit. Shapes: N tiles of h x w pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.vision.pictures import Picture

_LANCZOS, _BILINEAR, _BICUBIC = 1, 2, 3  # Pillow's codes of resampling filters, which config files contain
_MOST_SIDE = 4096  # maximum pixels on a side of an image that is cut into tiles, as in transformers
_MOST_PARTS = 64  # maximum number of crops of an image by pan and scan
MAX_TILE = 4096
_MOST_RATIO = 200  # maximum ratio of an image's longer side to the other, as in transformers


class Cut(NamedTuple):
    """Grid of tiles of one image.

    Attributes:
        rows, columns: size of the grid of tiles; 0 for an image of one tile.
        height, width: size of a tile in pixels.
        last: height and width of the tile of the whole image, if its size is another.
        shown: see `GridRule`.
        joined: rows and columns of embeddings that are added to those of the tiles' cells; each row has one more.
        number: how many images stand before this one in a prompt; `TowerFamily.words_around` may write it.
        more: number of embeddings that no tile has.
    """

    rows: int
    columns: int
    height: int
    width: int
    last: tuple[int, int] | None = None
    shown: tuple[int, int] | None = None
    joined: tuple[int, int] | None = None
    number: int = 0
    more: int = 0

    @property
    def tiles(self) -> int:
        """Number of tiles: the grid's tiles, and one more for the whole image."""
        return self.rows * self.columns + 1

    def cells(self, size: int) -> tuple[int, int]:
        """Return rows and columns of a tile's cells; a cell of `size` x `size` pixels becomes one embedding."""
        return self.height // size, self.width // size


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Normalisation of pixel values: (value * scale - mean) / std, with a mean and std for each channel.

    Attributes:
        table: [256, 3] float32, the normalised value of each pixel value.
        narrow: the result of each operation is rounded to bfloat16.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    narrow: bool = False

    @property
    def table(self) -> NDArray[np.float32]:
        rounded = _bfloat16 if self.narrow else np.asarray
        scaled = rounded((np.arange(256, dtype=np.float64) * self.scale).astype(np.float32))[:, None]
        mean, std = (rounded(np.array(each, np.float32)) for each in (self.mean, self.std))
        return rounded(rounded(scaled - mean) / std)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round finite values to the nearest bfloat16, halves to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


class Pixels(msgspec.Struct, frozen=True, kw_only=True):
    """What all rules have: `resample`, Pillow's code of the resampling filter, and the pixels' `normalisation`."""

    resample: int
    normalisation: Normalisation


class TileRule(Pixels, frozen=True, kw_only=True, tag=True):
    """Rule of Idefics3 and SmolVLM: a grid of square tiles, row by row, followed by the whole image as one tile.

    The image is resized twice: its longer side to `longest`, also if that enlarges it, then both sides to whole tiles.

    Attributes:
        longest: pixels of the longer side.
        tile: pixels of a tile's side.
        splits: whether to make a grid; otherwise every image is one tile.
    """

    longest: int
    tile: int
    splits: bool

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        rows = columns = 1
        if self.splits:
            height, width = self._second(*self._first(height, width))
            rows, columns = height // self.tile, width // self.tile
        grid = (0, 0) if rows == columns == 1 else (rows, columns)
        return Cut(*grid, self.tile, self.tile)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut, tile = self.cut(picture.height, picture.width), self.tile
        rows, columns = max(cut.rows, 1), max(cut.columns, 1)
        first = _resized(picture.pixels, *self._first(picture.height, picture.width), self.resample)
        whole = _resized(first, tile * rows, tile * columns, self.resample)
        return _tiled(whole, whole, cut, self.resample)

    def _first(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width for a longer side of `longest`; the other side is even."""
        ratio = width / height
        other = int(self.longest / ratio if ratio >= 1 else self.longest * ratio)
        other = max(other + other % 2, 1)
        return (other, self.longest) if ratio >= 1 else (self.longest, other)

    def _second(self, height: int, width: int) -> tuple[int, int]:
        """Round both sides up to multiples of a tile."""
        ratio, tile = width / height, self.tile
        longer = math.ceil(max(height, width) / tile) * tile
        other = max(math.ceil(int(longer / ratio if ratio >= 1 else longer * ratio) / tile) * tile, tile)
        return (other, longer) if ratio >= 1 else (longer, other)


class FitRule(Pixels, frozen=True, kw_only=True, tag=True):
    """Rule of Pixtral and Mistral 3: one tile of the image's size, shrunk to `longest`, its sides rounded up to cells.

    Attributes:
        longest: maximum number of pixels of a side.
        cell: pixels of a cell's side.
        patches: Kimi K2.5's rule: the image is also shrunk to this number of patches, counted without parts of patches,
            and is not stretched to whole cells: black fills them at the right and at the bottom. 0 in other rules.
        patch: pixels of a patch's side in Kimi K2.5's rule.
    """

    longest: int
    cell: int
    patches: int = 0
    patch: int = 1

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        height, width = (-(-side // self.cell) * self.cell for side in self._shrunk(height, width))
        return Cut(0, 0, height, width)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut = self.cut(picture.height, picture.width)
        tile, sides = np.zeros((1, cut.height, cut.width, 3), np.uint8), (cut.height, cut.width)
        height, width = self._shrunk(picture.height, picture.width) if self.patches else sides
        tile[0, :height, :width] = _resized(picture.pixels, height, width, self.resample)
        return tile

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        if self.patches:
            count = max(height // self.patch, 1) * max(width // self.patch, 1)
            scale = min(1.0, math.sqrt(self.patches / count), self.longest / height, self.longest / width)
            return min(max(int(height * scale), 1), self.longest), min(max(int(width * scale), 1), self.longest)
        ratio = max(height / self.longest, width / self.longest)
        return (height, width) if ratio <= 1 else (max(int(height / ratio), 1), max(int(width / ratio), 1))


class StretchRule(Pixels, frozen=True, kw_only=True, tag=True):
    """Rule of Gemma 3 and LLaVA: the image as a square tile, followed, with pan and scan, by tiles of its crops.

    Pan and scan cuts an oblong image along its longer side into crops of nearly equal size. Each tile is resized from
    the pixels of the original image.

    Attributes:
        tile: pixels of a tile's side.
        most_parts: maximum number of crops of an image; 0 without pan and scan.
        least_part: minimum number of pixels of a crop's side.
        ratio: minimum ratio of the longer side to the other for which crops are made.
        middle: LLaVA's rule: the shorter side becomes this number of pixels, and the tile is the middle of the image;
            0 for a tile of the whole image.
        margin: DeepSeek-OCR's rule: the longer side fills the tile, the margins have this grey, and a vector follows.
        ends: a vector also follows each row of this number of pixels; 0 for none.
    """

    tile: int
    most_parts: int = 0
    least_part: int = 1
    ratio: float = 1.0
    middle: int = 0
    margin: int | None = None
    ends: int = 0

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        longer, other = max(height, width), min(height, width)
        if self.middle:
            _require_ratio(height, width)
        rows = columns = 0
        if self.most_parts and longer / other >= self.ratio:
            count = min(math.floor(longer / self.least_part), math.floor(longer / other + 0.5))
            count = min(max(count, 2), self.most_parts)
            if min(math.ceil(longer / count), other) >= self.least_part:
                rows, columns = (1, count) if width >= height else (count, 1)
        more = int(self.margin is not None) + (self.tile // self.ends if self.ends else 0)
        return Cut(rows, columns, self.tile, self.tile, more=more)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut, parts = self.cut(picture.height, picture.width), [picture.pixels]
        if self.margin is not None:
            scale, made = self.tile / max(picture.height, picture.width), np.empty((self.tile, self.tile, 3), np.uint8)
            high, wide = (max(round(side * scale), 1) for side in (picture.height, picture.width))
            y, x = (self.tile - high) // 2, (self.tile - wide) // 2
            made[:] = self.margin
            made[y : y + high, x : x + wide] = _resized(picture.pixels, high, wide, self.resample)
            return made[None]
        if self.middle:
            shorter = min(picture.height, picture.width)
            height, width = (int(self.middle * side / shorter) for side in (picture.height, picture.width))
            y, x = (height - self.tile) // 2, (width - self.tile) // 2
            whole = _resized(picture.pixels, height, width, self.resample)
            return np.ascontiguousarray(whole[y : y + self.tile, x : x + self.tile])[None]
        if cut.rows:
            height, width = math.ceil(picture.height / cut.rows), math.ceil(picture.width / cut.columns)
            places = [(height * row, width * column) for row in range(cut.rows) for column in range(cut.columns)]
            parts += [np.ascontiguousarray(picture.pixels[y : y + height, x : x + width]) for y, x in places]
        return np.stack([_resized(part, self.tile, self.tile, self.resample) for part in parts])


class AreaRule(Pixels, frozen=True, kw_only=True, tag=True):
    """Rule of Qwen2-VL: one tile of nearly the image's aspect ratio, its sides multiples of a cell, its area bounded.

    Attributes:
        cell: pixels of a cell's side.
        least, most: bounds of the image's pixels; a very long image may have more.
        fills: Gemma 4's rule: every image, small ones too, is scaled to `most` pixels, and its sides are rounded down.
        grows: GLM-4V's and PaddleOCR's rule: an image with a side shorter than a cell is first enlarged until this side
            is a cell; pixels of the other side are "cut" or "rounded" to whole ones. In LFM2-VL's rule the other side
            is "kept".
        lined: HunyuanOCR's rule: each row of embeddings ends with one more, and the image has one more at either end.
    """

    cell: int
    least: int
    most: int
    fills: bool = False
    grows: Literal["", "cut", "rounded", "kept"] = ""
    lined: bool = False

    @property
    def longest(self) -> int:
        """Upper bound of the pixels of a side."""
        if self.fills:
            return self.most // self.cell
        return self.cell * (math.isqrt(2 * _MOST_RATIO * self.most) // self.cell + 2)

    @property
    def most_cells(self) -> int:
        """Upper bound of an image's cells; with sides rounded up, or to one cell, an image may exceed `most` pixels."""
        if self.fills:
            return self.most // self.cell**2
        return self.most // self.cell**2 + (self.longest + math.isqrt(self.most)) // self.cell + 2

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        height, width = self._size(height, width)
        return Cut(0, 0, height, width, joined=(height // self.cell + 2, 0) if self.lined else None)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        return _resized(picture.pixels, *self._size(picture.height, picture.width), self.resample)[None]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Return both sides in whole cells, halves rounded to even; outside the bounds the image is scaled."""
        if self.fills:
            grown = math.sqrt(self.most / (height * width))
            rows, columns = (math.floor(grown * side / self.cell) for side in (height, width))
            if not rows or not columns:  # a very long image is one cell wide
                longer = min(max(height, width) // min(height, width), self.most // self.cell**2)
                rows, columns = (rows and longer) or 1, (columns and longer) or 1
            return rows * self.cell, columns * self.cell
        _require_ratio(height, width)
        cell, sides = self.cell, (height, width)
        if self.grows in ("cut", "rounded") and min(sides) < cell:
            whole = int if self.grows == "cut" else round
            height, width = sides = tuple(whole(side * (cell / min(sides))) for side in sides)
        near = [max(round(side / cell), self.grows == "kept") * cell for side in sides]
        if math.prod(near) > self.most:
            shrunk = math.sqrt(height * width / self.most)
            near = [max(cell, math.floor(side / shrunk / cell) * cell) for side in sides]
        elif math.prod(near) < self.least:
            grown = math.sqrt(self.least / (height * width))
            near = [math.ceil(side * grown / cell) * cell for side in sides]
        return near[0], near[1]


class CanvasRule(Pixels, frozen=True, kw_only=True, tag=True):
    """Rule of Llama 4 and InternVL: tiles of a canvas with the image at its top left, followed by the whole image.

    The scale of a canvas is the factor that fits the image into it. The canvas with the smallest scale of at least 1 is
    used, otherwise the one with the largest scale; of several, the one with the fewest tiles. The image is not
    enlarged, except to a side of one tile. An image whose canvas is one tile has only that tile.

    Attributes:
        tile: pixels of a tile's side.
        most: maximum number of tiles of a canvas.
        grows: whether the canvas with the largest scale is used, and the image is enlarged to it.
        least: minimum number of tiles of a canvas.
        stretches: InternVL's rule: the image fills the canvas with the nearest ratio of width to height; of several,
            the last one that has less than twice the image's pixels, else the first.
        fills: Cohere 2 Vision's rule: the image fills the canvas, so that it may be enlarged.
        whole: LFM2-VL's and DeepSeek-OCR's rule: the tile of the whole image is by this rule.
        alone: an image of up to this many pixels, its sides rounded to cells of `whole`, has only that tile; with a
            `StretchRule` an image whose sides are not longer than a tile's.
    """

    tile: int
    most: int
    grows: bool
    least: int = 1
    stretches: bool = False
    fills: bool = False
    whole: AreaRule | StretchRule | None = None
    alone: int = 0

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`; scales are compared in fp32, as in transformers."""
        sides = [(rows, columns) for rows in range(1, self.most + 1) for columns in range(1, self.most // rows + 1)]
        if self.stretches:
            sides = sorted(
                (each for each in sides if math.prod(each) >= self.least), key=lambda at: (math.prod(at), at[1])
            )
            apart = [abs(width / height - columns / rows) for rows, columns in sides]
            first, *near = (each for each, one in zip(sides, apart) if one == min(apart))
            fits = [each for each in near if math.prod(each) * self.tile**2 < 2 * height * width]
            rows, columns = fits[-1] if fits else first
        else:
            scales = (np.array(sides, np.float32) * self.tile / np.array((height, width), np.float32)).min(1)
            found = scales[scales >= 1]
            scale = found.min() if len(found) and not self.grows else scales.max()
            rows, columns = min((each for each, one in zip(sides, scales) if one == scale), key=math.prod)
        grid = Cut(*((0, 0) if rows == columns == 1 else (rows, columns)), self.tile, self.tile)
        if self.whole is None:
            return grid
        whole = self.whole.cut(height, width)
        more = whole.more
        if isinstance(self.whole, StretchRule):
            small = max(height, width) <= self.tile
            more += self.whole.ends and rows * self.tile // self.whole.ends
        else:
            cell = self.whole.cell
            small = math.prod(round(side / cell) * cell for side in (height, width)) <= self.alone
        return whole if small or not grid.rows else grid._replace(last=whole[2:4], more=more)

    def tiles(self, picture: Picture) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """See `Rule`."""
        cut, tile = self.cut(picture.height, picture.width), self.tile
        rows, columns = max(cut.rows, 1), max(cut.columns, 1)
        if self.whole is not None:
            canvas = _resized(picture.pixels, tile * rows, tile * columns, self.resample) if cut.rows else None
            return [*(() if canvas is None else _grid(canvas, cut)), *self.whole.tiles(picture)]
        if self.stretches or self.fills:
            canvas = _resized(picture.pixels, tile * rows, tile * columns, self.resample)
            return _tiled(canvas, picture.pixels, cut, self.resample)
        canvas = np.zeros((tile * rows, tile * columns, 3), np.uint8)
        high, wide, _ = canvas.shape
        if not self.grows:
            high, wide = min(max(picture.height, tile), high), min(max(picture.width, tile), wide)
        if wide / picture.width < high / picture.height:
            high = max(min(math.floor(picture.height * (wide / picture.width)), high), 1)
        else:
            wide = max(min(math.floor(picture.width * (high / picture.height)), wide), 1)
        canvas[:high, :wide] = _resized(picture.pixels, high, wide, self.resample)
        return _tiled(canvas, picture.pixels, cut, self.resample)


class GridRule(Pixels, frozen=True, kw_only=True, tag=True):
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
        _require_ratio(height, width)

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
        canvas[top : top + high, left : left + wide] = _resized(picture.pixels, high, wide, self.resample)
        whole = _resized(picture.pixels, tile, tile, self.resample)[None]
        parts = np.concatenate([whole, _grid(canvas, cut._replace(height=tile, width=tile))])
        return np.ascontiguousarray(parts[:, : cut.height, : cut.width])


class SliceRule(Pixels, frozen=True, kw_only=True, tag=True):
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
        _require_ratio(height, width)
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
        whole, *canvas = (_resized(picture.pixels, *size, self.resample) for size in sizes if size[0])
        return [whole, *(tile for each in canvas for tile in _grid(each, cut))]

    def _near(self, height: int, width: int, grows: bool) -> tuple[int, int]:
        if grows or height * width > self.tile**2:
            ratio = width / height
            height = int(self.tile / math.sqrt(ratio))
            width = int(height * ratio)
        return max(round(height / self.cell), 1) * self.cell, max(round(width / self.cell), 1) * self.cell


class PaddedRule(Pixels, frozen=True, kw_only=True, tag=True):
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
        _require_ratio(height, width)
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
        canvas[top : top + inner] = _resized(pixels, inner, wide, self.resample)
        canvas = np.ascontiguousarray(canvas.swapaxes(0, 1) if tall else canvas)
        return [*_grid(canvas, cut), canvas]


def _require_ratio(height: int, width: int) -> None:
    if max(height, width) > _MOST_RATIO * min(height, width):
        said = f"{width} x {height} pixels; the longer side may be {_MOST_RATIO} times the other"
        raise InvalidParameterError(said, "image")


def _resized(pixels: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
    """Resize an image [H, W, 3] with Pillow; `resample` is its code of a filter."""
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling(resample)))


def _tiled(canvas: NDArray[np.uint8], whole: NDArray[np.uint8], cut: Cut, resample: int) -> NDArray[np.uint8]:
    """Cut a canvas into square tiles, row by row, followed by `whole` as one tile unless the canvas is one tile."""
    made = _grid(canvas, cut)
    return np.concatenate([made, _resized(whole, cut.height, cut.width, resample)[None]]) if cut.rows else made


def _grid(canvas: NDArray[np.uint8], cut: Cut) -> NDArray[np.uint8]:
    """Cut a canvas into tiles, row by row."""
    grid = canvas.reshape(max(cut.rows, 1), cut.height, max(cut.columns, 1), cut.width, 3).swapaxes(1, 2)
    return grid.reshape(-1, cut.height, cut.width, 3)


Rule: TypeAlias = TileRule | FitRule | StretchRule | AreaRule | CanvasRule | GridRule | SliceRule | PaddedRule
"""Preprocessing rule of a model family; tagged, so that another process decodes the same class. Each rule has

- `normalisation`: normalisation of the pixels,
- `cut(height, width)`: the `Cut` of an image of this size, or an `InvalidParameterError`,
- `tiles(picture)`: the tiles of that `Cut`, each uint8 [h, w, 3].
"""


NOTHING: Mapping[str, Any] = MappingProxyType({})
"""`mm_processor_kwargs` that change no setting of the model's files."""


def over(fields: Fields, said: Mapping[str, Any]) -> Fields:
    """Override `preprocessor_config.json` with an operator's `mm_processor_kwargs`, which error messages then name."""
    if not said:
        return fields
    values = dict(fields.values)
    for key, value in said.items():
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return Fields(values, Path("mm_processor_kwargs"))


def tile_rule(fields: Fields) -> TileRule:
    """Read `preprocessor_config.json` of Idefics3 and SmolVLM.

    Raises:
        InvalidFileError: a number is missing or impossible.
        UnsupportedModelError: the file requires preprocessing that is not implemented.
    """
    _require_usual(fields)
    return TileRule(
        longest=fields.section("size").count("longest_edge", most=_MOST_SIDE),
        tile=fields.section("max_image_size").count("longest_edge", most=MAX_TILE),
        splits=fields.get("do_image_splitting", bool, True),
        **_pixels(fields, _LANCZOS),
    )


def fit_rule(fields: Fields, patch: int, cell: int) -> FitRule:
    """Read `preprocessor_config.json` of Pixtral and Mistral 3, for sides in pixels; raises as `tile_rule`."""
    _require_usual(fields)
    given = fields.values.get("patch_size", patch)
    sides = given if isinstance(given, dict) else {"height": given, "width": given}
    for name in ("height", "width"):
        if Fields(sides, fields.path).count(name) not in (patch, cell):
            raise InvalidFileError(
                f"{fields.path}: patch_size is {given!r:.60}; config.json asks for patches of {patch} pixels, "
                f"{cell // patch} x {cell // patch} of which are one embedding"
            )
    longest = fields.section("size").count("longest_edge", most=MAX_TILE)
    return FitRule(longest=longest, cell=cell, **_pixels(fields, _BICUBIC, _CLIP))


def stretch_rule(fields: Fields) -> StretchRule:
    """Read `preprocessor_config.json` of Gemma 3; raises as `tile_rule`."""
    _require_usual(fields)
    size = fields.section("size")
    parts: dict[str, Any] = {}
    tile = size.count("height", most=MAX_TILE)
    if size.count("width") != tile:
        raise InvalidFileError(f"{fields.path}: size is {dict(size.values)!r:.60}; tiles are squares")
    if fields.get("do_pan_and_scan", bool, False):
        least = fields.count("pan_and_scan_min_crop_size", 256)
        most = fields.count("pan_and_scan_max_num_crops", 4, most=_MOST_PARTS)
        ratio = fields.get("pan_and_scan_min_ratio_to_activate", float, 1.2)
        if least < most:
            raise InvalidFileError(
                f"{fields.path}: pan_and_scan_min_crop_size is {least}, less than pan_and_scan_max_num_crops, {most}"
            )
        parts = {"most_parts": most, "least_part": least, "ratio": ratio}
    return StretchRule(tile=tile, **_pixels(fields, _BILINEAR), **parts)


def crop_rule(fields: Fields) -> StretchRule:
    """Read `preprocessor_config.json` of LLaVA with CLIP's vision encoder; raises as `tile_rule`."""
    crops = fields.get("do_center_crop", bool, True)
    _require_usual(Fields({**fields.values, "do_center_crop": False}, fields.path), ("do_pad", False))

    def side(key: str, *names: str) -> int:
        value = fields.values.get(key, 224)
        values = Fields(value if isinstance(value, dict) else dict.fromkeys(names, value), fields.path)
        sides = {values.count(name, most=MAX_TILE) for name in names if name in values}
        if len(sides) != 1:
            raise InvalidFileError(f"{fields.path}: {key} is {value!r:.60}; tiles are squares")
        return sides.pop()

    middle = side("size", "shortest_edge") if crops else 0
    tile = side("crop_size", "height", "width") if crops else side("size", "height", "width")
    if crops and middle < tile:
        raise InvalidFileError(f"{fields.path}: crop_size is {tile}, more than size, {middle}")
    return StretchRule(tile=tile, middle=middle, **_pixels(fields, _BICUBIC, _CLIP))


def area_rule(fields: Fields, cell: int, most: int) -> AreaRule:
    """Read `preprocessor_config.json` of Qwen2-VL and models with its rule; raises as `tile_rule`.

    `most` bounds the file's `max_pixels`.
    """
    _require_usual(fields)
    size = fields.section("size")
    least = fields.count("min_pixels", size.count("shortest_edge", 56 * 56, most=most), most=most)
    largest = fields.count("max_pixels", size.count("longest_edge", 28 * 28 * 1280, most=1 << 40), most=1 << 40)
    if largest < least:
        raise InvalidFileError(f"{fields.path}: images must have at least {least} pixels and at most {largest}")
    return AreaRule(cell=cell, least=least, most=min(largest, most), **_pixels(fields, _BICUBIC, _CLIP))


def budget_rule(fields: Fields, patch: int, cell: int) -> AreaRule:
    """Read `preprocessor_config.json` of Gemma 4; raises as `tile_rule`.

    A cell is `cell` x `cell` patches of `patch` x `patch` pixels.
    """
    _require_usual(fields)
    for key, known in (("patch_size", patch), ("pooling_kernel_size", cell)):
        if fields.count(key, known) != known:
            raise InvalidFileError(f"{fields.path}: {key} is {fields.count(key)}; config.json says {known}")
    count = fields.count("max_soft_tokens", 280)
    if count not in (70, 140, 280, 560, 1120):
        raise InvalidFileError(f"{fields.path}: max_soft_tokens is {count}; it must be 70, 140, 280, 560 or 1120")
    plain = Fields({"do_normalize": False, **fields.values}, fields.path)
    pixels, kept = count * (cell * patch) ** 2, _pixels(plain, _BICUBIC, ((0.0,) * 3, (1.0,) * 3))
    return AreaRule(cell=cell * patch, least=pixels, most=pixels, fills=True, **kept)


def _require_usual(fields: Fields, *others: tuple[str, bool]) -> None:
    for name, usual in (("do_resize", True), ("do_convert_rgb", True), ("do_center_crop", False), *others):
        if bool(fields.get(name, bool, usual)) != usual:
            said = "false" if usual else "true"
            raise UnsupportedModelError(f"{fields.path}: {name} is {said}, which is not implemented")


_HALF = ((0.5,) * 3, (0.5,) * 3)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _pixels(fields: Fields, resample: int, usual: Sequence[tuple[float, ...]] = _HALF) -> dict[str, Any]:
    """The fields of `Pixels`; `resample`, and mean and standard deviation in `usual`, stand for absent keys."""
    number = fields.get("resample", int, resample)
    if number not in (_LANCZOS, _BILINEAR, _BICUBIC):
        raise UnsupportedModelError(
            f"{fields.path}: resample is {number}; implemented: {_LANCZOS} (Lanczos), {_BILINEAR} (bilinear) and "
            f"{_BICUBIC} (bicubic)"
        )
    scale = fields.get("rescale_factor", float, 1 / 255) if fields.get("do_rescale", bool, True) else 1.0
    mean, std = ((0.0,) * 3, (1.0,) * 3)
    if fields.get("do_normalize", bool, True):
        mean, std = (_three(fields, key, each) for key, each in zip(("image_mean", "image_std"), usual))
    if not all(std):
        raise UnsupportedModelError(f"{fields.path}: image_std has a 0")
    made = Normalisation(scale, mean, std)
    with np.errstate(all="ignore"):  # values may be too large or too small for fp32
        if not np.isfinite(made.table).all():
            raise InvalidFileError(
                f"{fields.path}: with its image_mean, image_std and rescale_factor pixels are infinite"
            )
    return {"resample": number, "normalisation": made}


def _three(fields: Fields, key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    values = fields.get(key, list, list(usual))
    numbers = [Fields({key: value}, fields.path).get(key, float) for value in values]
    if len(numbers) != 3:
        raise UnsupportedModelError(f"{fields.path}: {key} has {len(numbers)} numbers; images have 3 channels")
    return tuple(numbers)
