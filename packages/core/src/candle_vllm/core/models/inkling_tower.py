# SPDX-License-Identifier: MIT
"""The vision encoder of Inkling, which has no attention: patches of an image are folded and projected one by one.

Each layer joins squares of neighbouring vectors, projects them, and normalises the result; GELU follows in all but the
last layer. A square of 40 x 40 pixels becomes one embedding; an image has two equal frames, which a layer joins. Images
are padded at the right and at the bottom with the pixel value -1. As squares do not depend on each other, each row of
them is a tile. Source: transformers' `InklingVisionModel`, `InklingImageProcessor`. Shapes: T patches, C cells.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, InvalidParameterError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.local_layers import refuse_others
from candle_vllm.core.models.tower_family import Placed, TileRows, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, Rule, area_rule, over, resized

_FRAMES, _EPS, _MOST_LAYERS, _LANCZOS, MOST_SIDE = 2, 1e-6, 32, 1, 4096

# ---- images ----------------------------------------------------------------------------------------------------------


class BandRule(Rule, frozen=True, kw_only=True, tag=True):
    """Rule of Inkling: a tile for each row of cells, not padded; there is one more column than whole cells.

    Attributes:
        cell: pixels of a cell's side.
        factor: factor of the image's size; None to keep it.
        longest: maximum pixels of a longer side that the factor enlarges; None without a maximum.
    """

    cell: int
    factor: float | None
    longest: int | None

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the resized image."""
        if self.factor is None:
            return height, width
        longer = max(height, width)
        wanted = longer * self.factor
        wanted = wanted if self.longest is None else min(wanted, max(self.longest, longer))
        height, width = (math.floor(side * (wanted / longer) + 0.5) for side in (height, width))
        return height, width

    def cut(self, height: int, width: int) -> Cut:
        """See `Rule`."""
        height, width = self.sides(height, width)
        if not 0 < min(height, width) <= max(height, width) <= MOST_SIDE:
            raise InvalidParameterError(f"the image has {height} x {width} pixels; a side must have 1 to {MOST_SIDE}")
        return Cut(-(-height // self.cell) - 1, 1, self.cell, (width // self.cell + 1) * self.cell)

    def tiles(self, picture: Picture) -> list[NDArray[np.uint8]]:
        """See `Rule`."""
        sides, pixels = self.sides(picture.height, picture.width), picture.pixels
        pixels = pixels if self.factor is None else resized(pixels, *sides, self.resample)
        return [pixels[top : top + self.cell] for top in range(0, sides[0], self.cell)]


class Band(TileRows):
    """A row of cells; the patches that are joined first follow each other, and their elements are pixel by pixel."""

    @property
    def grid(self) -> tuple[int, int]:
        """See `TileRows.grid`."""
        side = self.config.cell
        return side, self.config.count(self.tile) * side

    def strips(self, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """See `TileRows.strips`."""
        del most
        config, normalisation, tile = self.config, self.config.rule.normalisation, self.tile
        assert isinstance(config, InklingTowerConfig)
        cells, side = config.count(tile), config.cell_pixels
        around = (-normalisation.scale - np.array(normalisation.mean)) / np.array(normalisation.std)  # value -1
        canvas = np.broadcast_to(around.astype(np.float32), (side, cells * side, 3)).copy()
        canvas[: tile.shape[0], : tile.shape[1]] = normalisation.table[tile, np.arange(3)]
        parts = canvas.reshape(config.cell, config.patch, cells, config.cell, config.patch, 3)
        patches = parts.transpose(2, 0, 3, 1, 4, 5).reshape(cells, config.cell**2, -1)[:, config.nested]
        yield np.arange(len(self.places)), patches.reshape(len(self.places), -1)


# ---- config ----------------------------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """A layer: rows that are joined (not by the first layer), whether frames are joined, elements before and after."""

    rows: int
    frames: bool
    inputs: int
    outputs: int
    first: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class InklingTowerConfig(TowerConfig):
    """Config of the encoder; `hidden_size` is the width of the last layer's rows before they are joined."""

    folds: tuple[Fold, ...]

    @property
    def cell_rows(self) -> int:
        """See `TowerConfig`."""
        return self.folds[-1].rows

    def patches_of_row(self, layer: int) -> int:
        """See `TowerConfig`."""
        return math.prod(fold.rows for fold in self.folds[: min(layer + 1, len(self.folds) - 1)])

    @property
    def nested(self) -> NDArray[np.int64]:
        """Indices in a cell, row by row, of its patches in the order in which layers join them."""
        sides = [math.isqrt(fold.rows) for fold in reversed(self.folds)]
        grid = np.arange(self.cell**2).reshape(*sides, *sides)
        order = [axis for pair in zip(range(len(sides)), range(len(sides), 2 * len(sides))) for axis in pair]
        return grid.transpose(order).reshape(-1)

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`."""
        each = sum(3 * fold.inputs + 2 * fold.outputs for fold in self.folds) + 32 * (threads + 16)
        return 4 * (self.patches * each + 256 * 4 * (3 * self.folds[-1].inputs + self.text_size))

    def count(self, tile: NDArray[np.uint8]) -> int:
        """See `TowerConfig`."""
        return tile.shape[1] // self.cell_pixels + 1

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        rows = self.count(tile) * self.cell**2
        return Band(tile, self, np.zeros((rows, 2), np.int64), None, (rows,))


def planned(patch: int, layers: int, text_size: int) -> tuple[int, tuple[Fold, ...]]:
    """Return the pixels of the first layer's side, and the layers of an encoder of squares of `patch` pixels.

    Squares grow by the prime factors of `patch`, the largest first, then frames are joined. Layers end at those of
    these sizes whose logarithms are nearest to equal steps. Source: transformers' `plan_out_scales`.
    """
    factors, rest = list[int](), patch
    for prime in range(2, patch + 1):
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
    sides = [1, *itertools.accumulate(reversed(factors), lambda a, b: a * b)]
    scales = [(1, side) for side in sides] + [(_FRAMES, patch)]
    widths = [3, *(-(-(side**2 * 3) // 64) * 64 for _, side in scales[1:-1]), 64 * _FRAMES * patch**2 * 3]
    ideal = np.linspace(0, np.log(np.float32(_FRAMES * patch**2 * 3)), layers + 1, dtype=np.float32)
    logs = np.log(np.array([frames * side**2 for frames, side in scales], np.float32))
    costs = np.abs(ideal[:, None] - logs)
    if layers >= len(scales):
        chosen = [int(each) for each in costs.argmin(1)]
    else:
        choices = itertools.combinations(range(len(scales)), layers + 1)
        chosen = list(min(choices, key=lambda each: float(costs[range(layers + 1), list(each)].sum())))
    chosen[0], chosen[-1] = 0, len(scales) - 1
    folds: list[Fold] = []
    for number, (a, b) in enumerate(itertools.pairwise(chosen)):
        side, frames = scales[b][1] // scales[a][1], scales[b][0] // scales[a][0]
        outputs = text_size if number == layers - 1 else widths[b]
        rows = side**2 if number else 1
        folds.append(Fold(rows, frames > 1, widths[a] * side**2 * frames, outputs, not number))
    return scales[chosen[1]][1], tuple(folds)


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> InklingTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision, processor = fields.section("vision_config"), over(processor, said).with_absent(resample=_LANCZOS)
    names = {"num_channels": 3, "n_channels": 3, "temporal_patch_size": _FRAMES}
    refuse_others(vision, names | {"vision_encoder_type": "hmlp", "use_vision_norm": True})
    side = vision.count("patch_size", 40, most=256)
    layers = vision.count("n_layers", vision.count("num_hidden_layers", 24, most=_MOST_LAYERS), most=_MOST_LAYERS)
    size = processor.section("size")
    if side < 2 or any(size.count(key, 40) != side for key in ("height", "width")):
        raise InvalidFileError(f"{processor.path}: size is {dict(size.values)!r:.60}; the encoder reads {side} pixels")
    factor = processor.get("rescale_image_frac", float, None)
    if factor is not None and not 0 < factor <= MOST_SIDE:
        raise InvalidFileError(f"{processor.path}: rescale_image_frac is {factor}; it must be above 0")
    longest = processor.with_absent(rescale_image_max_upscaled_long_edge=2048)
    longest = longest.get("rescale_image_max_upscaled_long_edge", int, None)
    pixels = area_rule(Fields({**processor.values, "size": {}}, processor.path), side, most=1 << 40).pixels
    first, folds = planned(side, layers, text_size)
    cell, cells, last = side // first, MOST_SIDE // side + 1, folds[-1]
    sizes: dict[str, Any] = {"side": cells * cell, "cell": cell, "patch": first, "most_patches": cells * cell**2}
    sizes |= {"num_layers": layers - 1, "num_heads": 1, "intermediate_size": 0, "text_size": text_size}
    sizes["hidden_size"] = last.inputs // last.rows // (_FRAMES if last.frames else 1)
    rule = BandRule(cell=side, factor=factor, longest=longest, **pixels)
    return InklingTowerConfig(**sizes, norm_eps=_EPS, activation="gelu", rule=rule, folds=folds)


# ---- model -----------------------------------------------------------------------------------------------------------


class Layer:
    """A layer of the encoder before its GELU: x [T, E] -> [T / rows, outputs]; the input's GELU is still to be done."""

    def __init__(self, fold: Fold, placement: Placement) -> None:
        self.fold = fold
        self.projection = Linear(fold.inputs, fold.outputs, placement)
        self.norm = RMSNorm(fold.outputs, _EPS, placement)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        del step
        return self.project(x if self.fold.rows == 1 else x.unflatten(0, (-1, self.fold.rows)).flatten(1))

    def project(self, x: Value) -> Value:
        """The layer's result from rows that are joined."""
        x = side_by_side(x, x) if self.fold.frames else x
        return side_by_side(self.norm(self.projection(x if self.fold.first else activation(x, "gelu"))))


class InklingTower:
    """The vision encoder: patches of images to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: InklingTowerConfig, placement: Placement) -> None:
        self.config = config
        self.layers = [Layer(fold, placement) for fold in config.folds[:-1]]
        self.last = Layer(config.folds[-1], placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`."""
        del grid
        return Placed(np.arange(first, first + len(places)))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        del step
        return patches

    def norm(self, x: Value) -> Value:
        """See `Tower`."""
        return x

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.last.project(cells)


# ---- weight names ----------------------------------------------------------------------------------------------------


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Return the tensors by published names, with the last matrix under the name "visual.last.weight"."""
    last = f"layers.linear_{config.num_layers}."

    def renamed(name: str) -> str:
        name = name.replace("vision_tower.encoder_", "visual.").replace("vision_tower.", "visual.")
        name = re.sub(r"layers\.(\d+)\.projection\.", r"layers.linear_\1.", name)
        name = re.sub(r"layers\.(\d+)\.layer_norm\.", r"layers.norm_\1.", name)
        return name.replace(last, "last.")

    return {renamed(name): tensor for name, tensor in tensors.items()}


WEIGHTS = [
    WeightName("layers.{i}.projection:weight", "visual.layers.linear_{i}.weight", None),
    WeightName("layers.{i}.norm:weight", "visual.layers.norm_{i}.weight", None),
    WeightName("last.projection:weight", "visual.last.weight", None),
    WeightName("last.norm:weight", "visual.final_norm.weight", None),
]
MARK = "<|unused_200054|>"

FAMILY = TowerFamily(
    name="inkling_tower",
    hf={"InklingForConditionalGeneration": "inkling_mm_model"},
    settings=("rescale_image_frac", "rescale_image_max_upscaled_long_edge"),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=InklingTower,
    weights=WEIGHTS,
    mark=MARK,
    words_around=lambda cut, grid: MARK * (cut.tiles * math.prod(grid)),
)
