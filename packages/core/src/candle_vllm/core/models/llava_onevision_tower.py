# SPDX-License-Identifier: MIT
"""The vision encoder of LLaVA-OneVision, SigLIP, with the projection to embeddings of the text model, Qwen2.

The blocks are SigLIP's (`siglip.py`), without a norm after the last; two matrices project each patch to an embedding.
An image is one tile of all of it, and a grid of tiles: the rows of the grid's embeddings run through its tiles, without
those that do not show the image, and each row ends with a learned vector. If there are more embeddings than nine tiles
have, they are interpolated to fewer.
Sources: Li et al., 2024, arXiv:2408.03326; transformers' `llava_onevision`.
Shapes: T patches of a tile, E hidden, C embeddings.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.grid_positions import centred
from candle_vllm.core.models.llava_grid import GridRule, grid_rule
from candle_vllm.core.models.siglip import ACTIVATIONS, LARGE, MOST_PATCHES, SMALL, Block, hf_values
from candle_vllm.core.models.tower_family import Joining, Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, over

# ---- config ----------------------------------------------------------------------------------------------------------

_GRIDS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_SIZE = {"height": 384, "width": 384}
_LARGE = {**LARGE, "patch_size": 14, "image_size": 384}
"""The `vision_config` of a config without one, as in transformers; SigLIP's defaults complete one that is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOnevisionTowerConfig(TowerConfig):
    """Config of this vision encoder.

    Attributes:
        projector_activation: activation between the matrices of the projection.
        projector_bias: both matrices of the projection have biases.
        tiles: maximum number of tiles of an image.
    """

    projector_activation: Activation
    projector_bias: bool
    tiles: int

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the vectors within the projection, and copies of all tiles' embeddings."""
        return super().step_bytes(threads) + 4 * (256 * 4 * 2 + 3 * self.tiles * self.patches) * self.text_size


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> LlavaOnevisionTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.with_defaults(vision_config=_LARGE).section("vision_config")
    fields.choice("vision_feature_select_strategy", "full", "full")
    if (layer := fields.values.get("vision_feature_layer", -1)) not in (-1, [-1]):
        raise UnsupportedModelError(f"{fields.path}: vision_feature_layer is {layer!r:.40}; implemented: -1, the last")
    patch = vision.count("patch_size", 16)
    rule = _rule(fields, over(processor, said), patch)
    side = vision.count("image_size", 224) // patch
    if not 0 < side**2 <= MOST_PATCHES or rule.tile // patch != side:
        raise InvalidFileError(
            f"{processor.path}: tiles of {rule.tile} pixels; the model has {side} x {side} patches of {patch} pixels, "
            f"and at most {MOST_PATCHES} are supported"
        )
    return LlavaOnevisionTowerConfig(
        **hf_values(vision.with_defaults(**SMALL)),
        projector_activation=ACTIVATIONS[fields.choice("projector_hidden_act", "gelu", *ACTIVATIONS)],
        projector_bias=fields.get("multimodal_projector_bias", bool, True),
        tiles=1 + max(rows * columns for rows, columns in rule.grids),
        patch=patch,
        side=side,
        cell=1,
        text_size=text_size,
        rule=rule,
    )


def _rule(fields: Fields, processor: Fields, patch: int) -> GridRule:
    ratio = fields.get("vision_aspect_ratio", str, "anyres_max_9")
    if (most := re.fullmatch(r"anyres_max_([1-9]\d?)", ratio)) is None:
        raise UnsupportedModelError(f"{fields.path}: vision_aspect_ratio is {ratio!r:.40}; implemented: anyres_max_9")
    return grid_rule(Fields({"size": _SIZE, **processor.values}, processor.path), patch, int(most[1]), _GRIDS)


# ---- model -----------------------------------------------------------------------------------------------------------


class Newline:
    """The vector [E] at the end of each row of embeddings."""

    def __init__(self, size: int, placement: Placement) -> None:
        self.weight = placement.empty(size)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)}


class LlavaOnevisionTower:
    """The vision encoder: patches of tiles to embeddings; see `JoiningTower`."""

    mergers = ()

    def __init__(self, config: LlavaOnevisionTowerConfig, placement: Placement) -> None:
        size, text, bias = config.hidden_size, config.text_size, config.projector_bias
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.positions = Embedding(config.side**2, size, placement, wide=True)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.first = Linear(size, text, placement, bias=bias)
        self.second = Linear(text, text, placement, bias=bias)
        self.newline = Newline(text, placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the position table, which lists a tile's positions row by row."""
        del first, grid
        return Placed(places @ (self.config.side, 1))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return self.positions(step.places) + self.patches(patches)

    def norm(self, x: Value) -> Value:
        """See `Tower`; this encoder has no last norm."""
        return x

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.second(activation(self.first(cells), self.config.projector_activation))

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`."""
        rule = self.config.rule
        assert isinstance(rule, GridRule)
        return (yield from join_grid(made, rule.cut(*whole), self.config.side, on_host(self.newline.weight)))


_PIECE = 0.03  # seconds of work between two steps of other requests


def join_grid(made: NDArray[np.float32], cut: Cut, side: int, newline: NDArray[np.float32]) -> Joining:
    """Rows of the embeddings that show an image, each followed by `newline`, after those of the whole image's tile.

    Yields after each `_PIECE` of work, because joining a large image takes more than a second.

    Args:
        made: embeddings of all tiles [tiles * side * side, text size].
        cut: `GridRule`'s, with `shown` and `joined`.
        side: side of a tile in embeddings.
        newline: a vector, [text size].
    """
    assert cut.shown is not None
    assert cut.joined is not None
    size, (high, wide), shape = made.shape[1], cut.shown, cut.joined
    tiles = made[side**2 :].reshape(cut.rows, cut.columns, side, side, size)
    top, left = (cut.rows * side - high) // 2, (cut.columns * side - wide) // 2
    whole = np.empty((side**2 + shape[0] * (shape[1] + 1), size), np.float32)
    whole[: side**2] = made[: side**2]
    found = whole[side**2 :].reshape(shape[0], shape[1] + 1, size)

    def line(row: int) -> NDArray[np.float32]:
        """Row of the embeddings that show the image, [wide, text size]."""
        at = top + row
        return tiles[at // side, :, at % side].reshape(-1, size)[left : left + wide]

    rows, shares = centred(np.arange(shape[0]), shape[0], high)
    columns, parts = centred(np.arange(shape[1]), shape[1], wide)
    began = time.perf_counter()
    for row in range(shape[0]):
        found[row, -1] = newline
        if shape == cut.shown:
            found[row, :-1] = line(row)
        else:
            mixed = np.add.reduce([line(near[row]) * share[row] for near, share in zip(rows, shares)])
            found[row, :-1] = np.add.reduce([mixed[near] * part[:, None] for near, part in zip(columns, parts)])
        if time.perf_counter() - began > _PIECE:
            yield
            began = time.perf_counter()
    return whole


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT = ("vision_tower.vision_model", "vision_tower")
_UNUSED = re.compile(r"vision_tower\.(?:vision_model\.)?(?:post_layernorm|head)\.")
WEIGHTS = (
    *(line for line in siglip.names(*_AT) if not line.target.startswith("norm:")),
    WeightName("newline:weight", "image_newline", ()),
    *pair("first:", "multi_modal_projector.linear_1"),
    *pair("second:", "multi_modal_projector.linear_2"),
)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Drop the encoder's last norm and its pooling head, which are not used."""
    del config
    return {name: tensor for name, tensor in tensors.items() if not _UNUSED.match(name)}


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<image>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each of its embeddings."""
    assert cut.joined is not None
    rows, columns = cut.joined
    return _MARK * (grid[0] * grid[1] + rows * (columns + 1))


FAMILY = TowerFamily(
    name="llava_onevision_tower",
    hf={"LlavaOnevisionForConditionalGeneration": "llava_onevision"},
    settings=("image_grid_pinpoints",),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=LlavaOnevisionTower,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=words_around,
)
