# SPDX-License-Identifier: MIT
"""Cut images into the tiles that a vision encoder reads, by the model's `preprocessor_config.json` (before step 3).

Each model family has a `Rule`: it computes the grid of tiles from an image's size, and makes the tiles. Rules that
several families share are here, and the others beside the families in `core/models`.

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
from typing import Any, Literal, NamedTuple

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
MAX_RATIO = 200  # maximum ratio of an image's longer side to the other, as in transformers


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


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Preprocessing rule of a model family: how images become tiles. Each class is tagged with its name.

    `resample` is Pillow's code of the resampling filter.
    """

    resample: int
    normalisation: Normalisation

    def cut(self, height: int, width: int) -> Cut:
        """Return the `Cut` of an image of this size.

        Raises InvalidParameterError if the rule does not allow this size.
        """
        raise NotImplementedError

    def tiles(self, picture: Picture) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Return the tiles of the image's `Cut`, each uint8 [h, w, 3]."""
        raise NotImplementedError

    @property
    def pixels(self) -> dict[str, Any]:
        """The fields that all rules have, for another rule."""
        return {"resample": self.resample, "normalisation": self.normalisation}


def rule_from(fields: Mapping[str, Any]) -> Rule:
    """Return the rule that another process sent as these fields; the module of its class must have been imported."""
    kinds = [Rule]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return msgspec.convert(fields, next(kind for kind in kinds if kind.__name__ == fields["type"]))


class TileRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of Idefics3 and SmolVLM: a grid of square tiles, row by row, followed by the whole image as one tile.

    The image is resized twice: its longer side to `longest`, also if that enlarges it, then both sides to whole tiles.

    `longest` and `tile`, the side of a tile, are in pixels. Without `splits` every image is one tile.
    """

    longest: int
    tile: int
    splits: bool

    def cut(self, height: int, width: int) -> Cut:
        rows = columns = 1
        if self.splits:
            height, width = self._second(*self._first(height, width))
            rows, columns = height // self.tile, width // self.tile
        grid = (0, 0) if rows == columns == 1 else (rows, columns)
        return Cut(*grid, self.tile, self.tile)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        cut, tile = self.cut(picture.height, picture.width), self.tile
        rows, columns = max(cut.rows, 1), max(cut.columns, 1)
        first = resized(picture.pixels, *self._first(picture.height, picture.width), self.resample)
        whole = resized(first, tile * rows, tile * columns, self.resample)
        return tiled(whole, whole, cut, self.resample)

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


class FitRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of Pixtral and Mistral 3: one tile of the image's size, shrunk to `longest`, its sides rounded up to cells.

    `longest` and `cell`, the side of a cell, are in pixels.
    """

    longest: int
    cell: int

    def cut(self, height: int, width: int) -> Cut:
        height, width = (-(-side // self.cell) * self.cell for side in self._shrunk(height, width))
        return Cut(0, 0, height, width)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        cut = self.cut(picture.height, picture.width)
        return resized(picture.pixels, cut.height, cut.width, self.resample)[None]

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        ratio = max(height / self.longest, width / self.longest)
        return (height, width) if ratio <= 1 else (max(int(height / ratio), 1), max(int(width / ratio), 1))


class StretchRule(Rule, frozen=True, kw_only=True, tag=True):
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
    """

    tile: int
    most_parts: int = 0
    least_part: int = 1
    ratio: float = 1.0
    middle: int = 0

    def cut(self, height: int, width: int) -> Cut:
        longer, other = max(height, width), min(height, width)
        if self.middle:
            require_ratio(height, width)
        rows = columns = 0
        if self.most_parts and longer / other >= self.ratio:
            count = min(math.floor(longer / self.least_part), math.floor(longer / other + 0.5))
            count = min(max(count, 2), self.most_parts)
            if min(math.ceil(longer / count), other) >= self.least_part:
                rows, columns = (1, count) if width >= height else (count, 1)
        return Cut(rows, columns, self.tile, self.tile)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        cut, parts = self.cut(picture.height, picture.width), [picture.pixels]
        if self.middle:
            shorter = min(picture.height, picture.width)
            height, width = (int(self.middle * side / shorter) for side in (picture.height, picture.width))
            y, x = (height - self.tile) // 2, (width - self.tile) // 2
            whole = resized(picture.pixels, height, width, self.resample)
            return np.ascontiguousarray(whole[y : y + self.tile, x : x + self.tile])[None]
        if cut.rows:
            height, width = math.ceil(picture.height / cut.rows), math.ceil(picture.width / cut.columns)
            places = [(height * row, width * column) for row in range(cut.rows) for column in range(cut.columns)]
            parts += [np.ascontiguousarray(picture.pixels[y : y + height, x : x + width]) for y, x in places]
        return np.stack([resized(part, self.tile, self.tile, self.resample) for part in parts])


class AreaRule(Rule, frozen=True, kw_only=True, tag=True):
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
        return self.cell * (math.isqrt(2 * MAX_RATIO * self.most) // self.cell + 2)

    @property
    def most_cells(self) -> int:
        """Upper bound of an image's cells; with sides rounded up, or to one cell, an image may exceed `most` pixels."""
        if self.fills:
            return self.most // self.cell**2
        return self.most // self.cell**2 + (self.longest + math.isqrt(self.most)) // self.cell + 2

    def cut(self, height: int, width: int) -> Cut:
        height, width = self._size(height, width)
        return Cut(0, 0, height, width, joined=(height // self.cell + 2, 0) if self.lined else None)

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        return resized(picture.pixels, *self._size(picture.height, picture.width), self.resample)[None]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Return both sides in whole cells, halves rounded to even; outside the bounds the image is scaled."""
        if self.fills:
            grown = math.sqrt(self.most / (height * width))
            rows, columns = (math.floor(grown * side / self.cell) for side in (height, width))
            if not rows or not columns:  # a very long image is one cell wide
                longer = min(max(height, width) // min(height, width), self.most // self.cell**2)
                rows, columns = (rows and longer) or 1, (columns and longer) or 1
            return rows * self.cell, columns * self.cell
        require_ratio(height, width)
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


def require_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_RATIO * min(height, width):
        said = f"{width} x {height} pixels; the longer side may be {MAX_RATIO} times the other"
        raise InvalidParameterError(said, "image")


def resized(pixels: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
    """Resize an image [H, W, 3] with Pillow; `resample` is its code of a filter."""
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling(resample)))


def tiled(canvas: NDArray[np.uint8], whole: NDArray[np.uint8], cut: Cut, resample: int) -> NDArray[np.uint8]:
    """Cut a canvas into square tiles, row by row, followed by `whole` as one tile unless the canvas is one tile."""
    made = grid_of(canvas, cut)
    return np.concatenate([made, resized(whole, cut.height, cut.width, resample)[None]]) if cut.rows else made


def grid_of(canvas: NDArray[np.uint8], cut: Cut) -> NDArray[np.uint8]:
    """Cut a canvas into tiles, row by row."""
    grid = canvas.reshape(max(cut.rows, 1), cut.height, max(cut.columns, 1), cut.width, 3).swapaxes(1, 2)
    return grid.reshape(-1, cut.height, cut.width, 3)


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


def window_order(rows: int, columns: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return cell indices, window by window of `side` x `side` cells (fewer at edges), and each window's cell count."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    window = row // side * -(-columns // side) + column // side
    return np.argsort(window, kind="stable"), np.bincount(window)


def _require_usual(fields: Fields, *others: tuple[str, bool]) -> None:
    for name, usual in (("do_resize", True), ("do_convert_rgb", True), ("do_center_crop", False), *others):
        if bool(fields.get(name, bool, usual)) != usual:
            said = "false" if usual else "true"
            raise UnsupportedModelError(f"{fields.path}: {name} is {said}, which is not implemented")


_HALF = ((0.5,) * 3, (0.5,) * 3)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _pixels(fields: Fields, resample: int, usual: Sequence[tuple[float, ...]] = _HALF) -> dict[str, Any]:
    """The fields that all rules have; `resample`, and mean and standard deviation in `usual`, stand for absent keys."""
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
    numbers = [Fields({key: value}, fields.path).get(key, float) for value in fields.get(key, list, list(usual))]
    if len(numbers) != 3:
        raise UnsupportedModelError(f"{fields.path}: {key} has {len(numbers)} numbers; images have 3 channels")
    return tuple(numbers)


def patch_rows(
    tiles: NDArray[np.uint8], patch: int, cell: int, normalisation: Normalisation
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Convert tiles to the normalised patches that a vision encoder reads.

    The cell x cell patches that become one embedding are consecutive, row by row, and so are the cells of a tile. So
    merging patches means reading several rows as one. Attention does not depend on the order.

    A side of a patch has `patch` pixels, a side of a cell `cell` patches; h and w of `tiles` [N, h, w, 3] divide into
    whole cells. Returns patches [N * P, 3 * patch * patch], channels before pixels, and their rows and columns in a
    tile [N * P, 2].
    """
    count, height, width, _ = tiles.shape
    grid = (count, height // (cell * patch), cell, patch, width // (cell * patch), cell, patch, 3)
    order = (0, 1, 4, 2, 5, 7, 3, 6)  # tile; row, column of the cell; of its patch; channel; row, column of the pixel
    values = tiles.reshape(grid).transpose(order)
    rows = np.empty(values.shape, np.float32)
    for channel, table in enumerate(normalisation.table.T):
        rows[..., channel, :, :] = table[values[..., channel, :, :]]
    return rows.reshape(-1, 3 * patch * patch), np.tile(patch_places(height // patch, width // patch, cell), (count, 1))


def patch_places(rows: int, columns: int, cell: int) -> NDArray[np.int64]:
    """Return row and column of the patches of a grid, [rows * columns, 2], in the order of `patch_rows`."""
    places = np.indices((rows, columns)).reshape(2, rows // cell, cell, columns // cell, cell)
    return places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
