# SPDX-License-Identifier: MIT
"""The vision encoders of LLaVA-NeXT (LLaVA 1.6), CLIP's or SigLIP's, and those of LLaVA in llama.cpp's files.

The encoders are those of `clip_tower.py` and `llava_onevision_tower.py`. The outputs of one or several blocks, side by
side, are projected by two matrices: Granite Vision takes four blocks of SigLIP. An image is one tile of all of it, and
a grid of tiles: the rows of the grid's embeddings run through its tiles, without those that do not show the image, and
each row ends with a learned vector. A file of LLaVA 1.5 has no grids: there an image is one tile.
Sources: Liu et al., 2024, "LLaVA-NeXT"; transformers' `llava_next`; llama.cpp's `tools/mtmd/clip.cpp`.
Shapes: T patches of a tile, E hidden, F blocks whose outputs are projected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, on_host
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llava_onevision_tower, siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.internvl_tensors import joined_positions
from candle_vllm.core.models.llava_grid import GridRule
from candle_vllm.core.models.llava_next_config import LlavaNextTowerConfig, completed, config_from_gguf, config_from_hf
from candle_vllm.core.models.llava_onevision_tower import Newline, join_grid
from candle_vllm.core.models.siglip import Block
from candle_vllm.core.models.tower_family import Joining, Placed, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import Cut

# ---- model -----------------------------------------------------------------------------------------------------------


class KeepingBlock(Block):
    """A block of SigLIP; with `keeps`, a copy of its output is kept."""

    keeps = False

    def __call__(self, x: Value, step: TowerStep) -> Value:
        hidden, *kept = x
        hidden = super().__call__(hidden, step)
        return (hidden, *kept, side_by_side(hidden)) if self.keeps else (hidden, *kept)


class LlavaNextTower:
    """The vision encoder: patches of tiles to embeddings; see `JoiningTower`.

    Between the blocks, x is a tuple of x [T, E] and of copies of the earlier outputs that are projected.
    """

    mergers = ()

    def __init__(self, config: LlavaNextTowerConfig, placement: Placement) -> None:
        size, text, bias = config.hidden_size, config.text_size, config.projector_bias
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=not config.classed)
        self.positions = Embedding(config.side**2 + config.classed, size, placement, wide=True)
        self.first_norm = LayerNorm(size, config.norm_eps, placement) if config.classed else None
        self.layers = [KeepingBlock(config, placement) for _ in range(config.num_layers)]
        for number in {*config.features} - {0, config.num_layers}:
            self.layers[number - 1].keeps = True
        self.first = Linear(config.cell_size, text, placement, bias=bias)
        self.second = Linear(text, text, placement, bias=bias)
        self.newline = Newline(text, placement) if isinstance(config.rule, GridRule) else None

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the table, which lists a tile's positions row by row, after the class token."""
        del first, grid
        rows = places @ (self.config.side, 1)
        return Placed(np.where(places[:, 0] < 0, 0, 1 + rows) if self.config.classed else rows)

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        x = self.positions(step.places) + self.patches(patches)
        x = x if self.first_norm is None else side_by_side(self.first_norm(x))
        return (x, side_by_side(x)) if 0 in self.config.features else (x,)

    def norm(self, x: Value) -> Value:
        """See `Tower`; the outputs side by side, [T, F * E], without a norm."""
        hidden, *kept = x
        features = self.config.features
        found = dict(zip(sorted({*features}), (*kept, hidden), strict=True))
        return side_by_side(*(found[number] for number in features)) if features[1:] else hidden

    def cells(self, hidden: Any) -> Any:
        """See `Tower`; without the class token, the last row."""
        return hidden[: self.config.side**2]

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        factor = self.config.factor
        x = self.second(activation(self.first(cells), self.config.projector_activation))
        return x.scaled(factor) if isinstance(x, Recorded) else x * factor

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`."""
        rule = self.config.rule
        if self.newline is None or not isinstance(rule, GridRule):
            return made
        newline = on_host(self.newline.weight) * np.float32(self.config.factor)
        return (yield from join_grid(made, rule.cut(*whole), self.config.side, newline))


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT = ("vision_tower.vision_model", "vision_tower")
_UNUSED = re.compile(r"vision_tower\.(?:vision_model\.)?(?:post_layernorm\.|head\.|embeddings\.position_ids$)")
_LAYER = re.compile(r"(?:vision_tower\.(?:vision_model\.)?encoder\.layers|v\.blk)\.(\d+)\.")
_TOKENS = {f"{at}.embeddings.position_embedding.weight": f"{at}.embeddings.class_embedding" for at in _AT}
_TOKENS["v.position_embd.weight"] = "v.class_embd"  # tables of positions, and the class tokens in their first rows
WEIGHTS = (
    *(line for line in siglip.names(*_AT) if not line.target.startswith("norm:")),
    *pair("first_norm:", tuple(f"{at}.pre_layrnorm" for at in _AT), "v.pre_ln"),
    WeightName("newline:weight", "image_newline", ("model.image_newline", "v.image_newline")),
    *pair("first:", "multi_modal_projector.linear_1", "mm.0"),
    *pair("second:", "multi_modal_projector.linear_2", "mm.2"),
)


def prepared(tensors: Mapping[str, StoredTensor], config: Any) -> Mapping[str, StoredTensor]:
    """Drop what comes after the last block that is used, and add the class token to the first row of positions."""
    found = {name: tensor for name, tensor in siglip.prepared(tensors, config).items() if not _UNUSED.match(name)}
    for name in tensors:
        if (layer := _LAYER.match(name)) is not None and int(layer[1]) >= config.num_layers:
            found.pop(name, None)
    for table, token in _TOKENS.items():
        if table in found and config.classed:
            if token not in found:
                raise WeightsError(f"{found[table].path}: tensor {token} is missing")
            found[table] = joined_positions(found[table], found.pop(token), None, config)
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<image>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each of its embeddings."""
    return _MARK * math.prod(grid) if cut.joined is None else llava_onevision_tower.words_around(cut, grid)


FAMILY = TowerFamily(
    name="llava_next_tower",
    hf={"LlavaNextForConditionalGeneration": "llava_next"},
    seen=("clip_vision_model", "siglip_vision_model", None),
    gguf=("mlp",),
    settings=("image_grid_pinpoints",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed,
    prepared=prepared,
    build=LlavaNextTower,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=words_around,
    stand_in="<unk>",  # GGUF files of LLaVA 1.5 and 1.6 have the tokenizer of their text model
)
