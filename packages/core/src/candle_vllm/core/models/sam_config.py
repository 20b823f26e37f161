# SPDX-License-Identifier: MIT
"""Config of SAM's vision encoder (`sam.py`), and how images are resized and cut for the encoders that begin with it.

An image is a grid of tiles with nearly its shape, followed by a tile of all of it in the middle of a grey square. An
image whose sides are not longer than a tile's has only the second.
Source: `DeepseekOcr2SamVisionConfig` and `DeepseekOcr2ImageProcessor` of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models.canvas_rules import RatioRule, with_whole
from candle_vllm.core.models.siglip import MOST_PATCHES
from candle_vllm.core.models.tower_family import TileRows, TowerConfig
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import MAX_TILE, Cut, Rule, over, patch_places, resized, stretch_rule

_MOST_CHANNELS = 1 << 14


class SamRows(TileRows):
    """A tile's patches and windows, where the layers behind the blocks have fewer rows than patches."""

    def lengths(self, layer: int, *, windowed: bool) -> tuple[int, ...]:
        """See `TileRows`."""
        config, count = self.config, len(self.places)
        assert isinstance(config, SamConfig)
        if windowed:
            return self.windows
        behind = layer - 2 * config.blocks  # 0 and 1: norms and convolutions without strides
        return (count if behind <= 0 else config.rows_behind(behind, count),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig(TowerConfig):
    """Config of an encoder that begins with SAM's; its fields without a comment are SAM's.

    Attributes:
        num_layers: the largest number of layers of an encoder.
        blocks: number of SAM's blocks.
        tiles: sides of the tiles in patches, one or two.
        channels: elements of a row after the first convolution, and after each of those with strides.
        qkv_bias: queries, keys and values have biases.
    """

    blocks: int
    tiles: tuple[int, ...]
    channels: tuple[int, int, int]
    qkv_bias: bool = True

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        side = len(tile) // self.patch
        windows = (self.window**2,) * self.windows_of(side)
        return SamRows(tile, self, patch_places(side, side, self.cell), None, windows)

    def windows_of(self, side: int) -> int:
        """Number of windows of a tile with this side in patches."""
        return (-(-side // self.window)) ** 2

    @property
    def windows(self) -> int:
        """See `TowerConfig`."""
        return self.windows_of(self.side)

    def rows_behind(self, layer: int, count: int) -> int:
        """Rows of a layer behind SAM's blocks and the convolution without a stride, for a tile with `count` patches."""
        return count >> 2 * min(layer, 2)

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds what relative positions and convolutions need."""
        wide = self.num_heads * (self.head_dim + 2 * max(self.side, self.window))
        runs = 2 * self.num_heads * sum(map(self.run_width, self.tiles))
        each = 12 * wide + runs + 18 * sum(self.channels)
        return super().step_bytes(threads) + 4 * self.patches * each

    def run_width(self, side: int) -> int:
        """Columns from which runs of relative positions of a tile with this side are taken, for an axis."""
        return side - 1 + max(self.tiles)


def sam_from_hf(vision: Fields) -> dict[str, Any]:
    """Read transformers' `sam_config`: arguments of a `SamConfig` except `tiles`; positions and keys of one value."""
    vision.choice("hidden_act", "gelu", "gelu")
    for key, known in (("use_abs_pos", True), ("use_rel_pos", True)):
        if vision.get(key, bool, known) != known:
            raise UnsupportedModelError(f"{vision.path}: {key} of the vision encoder is false; implemented: true")
    if vision.count("num_channels", 3) != 3:
        raise UnsupportedModelError(f"{vision.path}: num_channels is {vision.count('num_channels')}; implemented: 3")
    size, layers = vision.count("hidden_size", 768), vision.count("num_hidden_layers", 12, most=MAX_LAYERS)
    indexes = vision.get("global_attn_indexes", list, [2, 5, 8, 11])
    if not all(type(index) is int and 0 <= index < layers for index in indexes):
        raise InvalidFileError(
            f"{vision.path}: global_attn_indexes is {indexes!r:.60}, not numbers of the {layers} layers"
        )
    channels = [vision.count("output_channels", 256), *vision.get("downsample_channels", list, [512, 896])]
    if len(channels) != 3 or not all(type(each) is int and 0 < each <= _MOST_CHANNELS for each in channels):
        raise InvalidFileError(f"{vision.path}: downsample_channels must be two numbers from 1 to {_MOST_CHANNELS}")
    ratio = vision.get("mlp_ratio", float, 4.0)
    if not 0 < ratio <= 64:
        raise InvalidFileError(f"{vision.path}: mlp_ratio is {ratio}; it must be above 0 and at most 64")
    return {
        "hidden_size": size,
        "intermediate_size": vision.count("mlp_dim", int(size * ratio)),
        "blocks": layers,
        "num_heads": vision.count("num_attention_heads", 12),
        "norm_eps": vision.get("layer_norm_eps", float, 1e-6),
        "activation": "gelu",
        "patch": (patch := vision.count("patch_size", 16)),
        "learned": vision.count("image_size", 1024, most=MAX_TILE) // patch,
        "window": vision.count("window_size", 14, most=256),
        "windowed": frozenset(2 * layer for layer in range(layers) if layer not in indexes),
        "channels": tuple(channels),
        "qkv_bias": vision.get("qkv_bias", bool, True),
    }


def sam_from_original(vision: Fields, channels: list[int]) -> dict[str, Any]:
    """The same from the `vision_config` of the original repositories, whose code has the values of other keys.

    `channels` are the elements of a row after each of the convolutions with strides.
    """
    sam = vision.section("width").section("sam_vit_b")
    named = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    values = {key: sam.count(name) for key, name in named.items() if name in sam}
    more = {key: sam.get(key, list) for key in ("global_attn_indexes",) if key in sam}
    sizes = {"image_size": vision.count("image_size", 1024), "downsample_channels": channels}
    return sam_from_hf(Fields(values | more | sizes, vision.path))


def sam_from_gguf(fields: Fields, last: int) -> dict[str, Any]:
    """The same from the metadata of llama.cpp's `mmproj` files; see `completed`.

    Args:
        fields: the metadata; keys begin with `clip.vision.`.
        last: elements of a row after the last convolution.
    """
    if not Fields(fields.values, fields.path).get("clip.use_gelu", bool, True):
        raise UnsupportedModelError(f"{fields.path}: clip.use_gelu is false; implemented: true")
    layers = fields.count("sam.block_count", most=MAX_LAYERS)
    usual = {
        "hidden_size": fields.count("sam.embedding_length"), "num_hidden_layers": layers,
        "global_attn_indexes": [layer for layer in (2, 5, 8, 11) if layer < layers],  # as in llama.cpp
        "num_attention_heads": fields.count("sam.head_count"), "window_size": fields.count("window_size"),
        "patch_size": fields.count("patch_size", 16), "image_size": fields.count("image_size", 1024),
        "downsample_channels": [512, last],
    }  # fmt: skip
    return sam_from_hf(Fields(usual, fields.path))


def completed(config: Any, tensors: Mapping[str, StoredTensor]) -> Any:
    """Add what only the tensors of a GGUF file show: the sizes of the MLP and of the convolutions."""
    names = ("v.sam.blk.0.mlp.lin1.weight", "v.sam.neck.0.weight", "v.sam.net_2.weight")
    inner, first, second = (tensors[name].shape[0] if name in tensors else 1 for name in names)
    return dataclasses.replace(config, intermediate_size=inner, channels=(first, second, config.channels[2]))


def shared(
    processor: Fields,
    said: Mapping[str, Any],
    tile: int,
    most: int,
    own: Mapping[str, Any],
    *,
    ends: bool = False,
    fills: bool = False,
) -> dict[str, Any]:
    """The fields of a `SamConfig` that follow from the settings of images, with those in `own`.

    Args:
        processor, said: `preprocessor_config.json`, and an operator's values.
        tile, most: side of a tile, and maximum number of tiles of a grid, if the file does not have them.
        own: what `sam_from_hf` returns.
        ends: each row of embeddings ends with a vector.
        fills: without a grid, an image is a tile of `size`, which it fills up to `maximum_pad_value` (Unlimited-OCR).
    """
    usual = {"tile_size": tile, "max_patches": most, "size": {"height": 1024, "width": 1024}}
    rule, pixels = _rule(over(processor.with_absent(**usual), said), (cell := 4 * own["patch"]) * ends, fills)
    if any(side % cell for side in pixels):
        raise InvalidFileError(f"{processor.path}: tiles of {pixels} pixels do not have whole cells of {cell} pixels")
    if own["hidden_size"] % 16:
        raise UnsupportedModelError(
            f"{processor.path}: hidden_size of SAM's encoder is {own['hidden_size']}; implemented: multiples of 16"
        )
    sides = sorted({side // own["patch"] for side in pixels})
    rows = (-(-sides[-1] // own["window"]) * own["window"]) ** 2  # with those of windows at the edges
    if rows > MOST_PATCHES:
        raise InvalidFileError(
            f"{processor.path}: tiles of {max(pixels)} pixels with windows of {own['window']} patches have {rows} "
            f"patches; at most {MOST_PATCHES} are supported"
        )
    return {**own, "rule": rule, "tiles": tuple(sides), "side": sides[-1], "cell": 4, "most_patches": rows}


class MarginRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of DeepSeek-OCR: one square tile, whose longer side the image fills, or both sides.

    Attributes:
        tile: pixels of the tile's side.
        margin: grey of the margins.
        ends: a vector follows each row of this number of pixels, and one the image; 0 for the latter alone.
        fills: the image is stretched to the whole tile.
    """

    tile: int
    margin: int
    ends: int = 0
    fills: bool = False

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        del height, width
        return Cut(0, 0, self.tile, self.tile, more=1 + (self.ends and self.tile // self.ends))

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        scale, made = self.tile / max(picture.height, picture.width), np.empty((self.tile, self.tile, 3), np.uint8)
        sides = (picture.height, picture.width)
        high, wide = (self.tile if self.fills else max(round(side * scale), 1) for side in sides)
        y, x = (self.tile - high) // 2, (self.tile - wide) // 2
        made[:] = self.margin
        made[y : y + high, x : x + wide] = resized(picture.pixels, high, wide, self.resample)
        return made[None]


class RatioMarginRule(RatioRule, frozen=True, kw_only=True, tag=True):
    """Rule of DeepSeek-OCR: the grid of `RatioRule`, and the whole image by `whole`; rows of the grid have vectors too.

    An image whose sides are not longer than a tile's has no grid.
    """

    whole: MarginRule

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        grid, whole = super().cut(height, width), self.whole.cut(height, width)
        if max(height, width) <= self.tile or not grid.rows:
            return whole
        more = whole.more + (self.whole.ends and grid.rows * self.tile // self.whole.ends)
        return grid._replace(last=(whole.height, whole.width), more=more)

    def tiles(self, picture: Picture) -> list[NDArray[np.uint8]]:
        """See `Rule`."""
        return with_whole(picture, self.cut(picture.height, picture.width), self.whole)


def _rule(processor: Fields, ends: int, fills: bool) -> tuple[RatioMarginRule | MarginRule, tuple[int, ...]]:
    """The rule of images, and the sides of tiles in pixels."""
    processor = processor.with_absent(resample=3, background_color=[127] * 3)
    tile, margin = processor.count("tile_size", most=MAX_TILE), processor.get("background_color", list)
    if len(margin) != 3 or len({*margin}) != 1 or type(margin[0]) is not int or not 0 <= margin[0] <= 255:
        raise UnsupportedModelError(f"{processor.path}: background_color is {margin!r:.40}; implemented: one grey")
    given = stretch_rule(processor)
    whole = MarginRule(tile=given.tile, margin=margin[0], ends=ends, **given.pixels)
    least, most = processor.count("min_patches", 2, most=64), processor.count("max_patches", most=64)
    if not processor.get("crop_to_patches", bool, True):
        tile = whole.tile if fills else tile
        fills = fills and tile <= processor.count("maximum_pad_value", 640)
        return msgspec.structs.replace(whole, tile=tile, fills=fills), (tile,)
    if not 2 <= least <= most:
        raise InvalidFileError(f"{processor.path}: min_patches is {least}; it must be 2 to max_patches, {most}")
    return RatioMarginRule(tile=tile, least=least, most=most, whole=whole, **whole.pixels), (tile, whole.tile)
