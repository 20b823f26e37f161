# SPDX-License-Identifier: MIT
"""The vision encoder of Granite 4 Vision, SigLIP, with its projectors to layers of the text model, Granite.

The blocks are SigLIP's (`siglip.py`). Each projector reads the output of one block and makes a vector of each cell of
2 x 2 patches, which is added to the input of one layer of the text model: a patch of the cell, or the mean of all, plus
a learned query, attends to the cell's window, once among queries and once to all patches, as a layer of BLIP-2's
Q-Former does. An image is one tile of all of it, and a grid of tiles, joined as in `llava_onevision_tower.py`.
Sources: transformers' `granite4_vision`; Li et al., 2023, arXiv:2301.12597 (Q-Former).
Shapes: T patches of a tile, C cells, E hidden, P projectors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, on_host
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.granite4_vision_config import Granite4VisionTowerConfig, config_from_hf
from candle_vllm.core.models.llava_grid import GridRule
from candle_vllm.core.models.llava_onevision_tower import Newline, join_grid, words_around
from candle_vllm.core.models.siglip import Block
from candle_vllm.core.models.tower_family import Joining, Placed, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- projector -------------------------------------------------------------------------------------------------------


class Projector:
    """Vectors of cells from the output of a block, in four layers: rows are patches in the first and the third.

    The layers map a tuple: what is kept of the blocks and of earlier projectors, then what this one computes.
    """

    def __init__(self, config: Granite4VisionTowerConfig, number: int, placement: Placement) -> None:
        size, patches, eps = config.hidden_size, config.side**2, config.projector_eps
        self.size, self.heads, (offset, self.feature) = size, size // 64, config.projectors[number]
        shares = np.full(4, 0.25, np.float32) if offset < 0 else np.eye(4, dtype=np.float32)[offset]
        self.shares = placement.constant(shares.reshape(1, 1, 4))
        self.norm = LayerNorm(size, 1e-6, placement)
        self.queries = Embedding(patches, size, placement, wide=True)
        self.positions = Embedding(patches, size, placement, wide=True)
        self.start_norm, self.self_norm, self.cross_norm, self.end_norm = (
            LayerNorm(size, eps, placement) for _ in range(4)
        )
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=True)
        self.self_output, self.query, self.cross_output = (Linear(size, size, placement, bias=True) for _ in range(3))
        self.kv = Linear(size, {"k": size, "v": size}, placement, bias=True)
        self.up = Linear(size, config.inner_size, placement, bias=True)
        self.down = Linear(config.inner_size, size, placement, bias=True)
        self.output = Linear(size, config.text_size, placement, bias=True)

    def read(self, x: Value, feature: Value, step: TowerStep) -> Value:
        """Patches as queries [T, E], and their keys and values [T, 2 E]."""
        queries = self.queries(step.places) + self.norm(feature)
        return *x, queries, side_by_side(self.kv(self.positions(step.places) + self.norm(feature)))

    def attend(self, x: Value, step: TowerStep) -> Value:
        """Queries of cells, which attend to each other [C, E], and those of the next layer, for each patch [T, E]."""
        *kept, queries, kv = x
        cells = queries.unflatten(0, (-1, 4)).flatten(1)
        hidden = side_by_side(self.start_norm(mix_streams(cells, self.shares, level=False)))
        lengths = [count // 4 for count in step.windows]
        hidden = hidden + self.self_output(whole_attention(self.qkv(hidden), self.heads, lengths))
        hidden = side_by_side(self.self_norm(hidden))
        query = side_by_side(self.query(hidden))
        spread = side_by_side(query, query, query, query).unflatten(-1, (-1, self.size))
        return *kept, hidden, spread.flatten(0, 1), kv

    def cross(self, x: Value, step: TowerStep) -> Value:
        """The queries of a window attend to its patches, [T, E]; the four patches of a cell have the same result."""
        *kept, hidden, query, kv = x
        return *kept, hidden, whole_attention(side_by_side(query, kv), self.heads, step.windows)

    def finish(self, x: Value, step: TowerStep) -> Value:
        """Vectors of cells, [C, E]."""
        del step
        *kept, hidden, found = x
        first = found.unflatten(0, (-1, 4)).flatten(1).split([self.size] * 4, dim=-1)[0]
        hidden = side_by_side(self.cross_norm(hidden + self.cross_output(first)))
        return *kept, side_by_side(self.end_norm(hidden + self.down(activation(self.up(hidden), "gelu"))))


# ---- model -----------------------------------------------------------------------------------------------------------


class Granite4VisionTower:
    """The vision encoder: patches of tiles to embeddings; see `JoiningTower`.

    Between the layers, x is a tuple: x [T, E] and copies of earlier outputs that projectors read, then their results.
    """

    mergers = ()

    def __init__(self, config: Granite4VisionTowerConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.positions = Embedding(config.side**2, size, placement, wide=True)
        self.blocks = [Block(config, placement) for _ in range(config.num_layers)]
        self.projectors = [Projector(config, number, placement) for number in range(config.vectors)]
        self.newline = Newline(config.text_size, placement)
        self.features = sorted({layer for _, layer in config.projectors})

    @property
    def layers(self) -> Sequence[Callable[[Value, TowerStep], Value]]:
        """See `Tower`: the blocks, then four layers of each projector."""
        made = [self._block(block, number + 1 in self.features) for number, block in enumerate(self.blocks)]
        for each in self.projectors:
            made += [self._reading(each), each.attend, each.cross, each.finish]
        return made

    def _block(self, block: Block, keeps: bool) -> Callable[[Value, TowerStep], Value]:
        def run(x: Value, step: TowerStep) -> Value:
            hidden, *kept = x
            hidden = block(hidden, step)
            return (hidden, *kept, side_by_side(hidden)) if keeps else (hidden, *kept)

        return run

    def _reading(self, projector: Projector) -> Callable[[Value, TowerStep], Value]:
        place = 1 + self.features.index(projector.feature)
        return lambda x, step: projector.read(x, x[place], step)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the position tables, which list a tile's positions row by row."""
        del first, grid
        return Placed(places @ (self.config.side, 1))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return (self.positions(step.places) + self.patches(patches),)

    def norm(self, x: Value) -> Value:
        """See `Tower`; the results of all projectors side by side, [C, P * E], without a norm."""
        return side_by_side(*x[1 + len(self.features) :])

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return hidden

    def project(self, cells: Value) -> Value:
        """See `Tower`; the vectors for all layers side by side, [C, P * text size]."""
        parts = cells.split([self.config.hidden_size] * self.config.vectors, dim=-1)
        x = side_by_side(*(each.output(part) for each, part in zip(self.projectors, parts)))
        return x.scaled(self.config.factor) if isinstance(x, Recorded) else x * self.config.factor

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`; the vectors for all layers end a row with the same vector."""
        rule, config = self.config.rule, self.config
        assert isinstance(rule, GridRule)
        newline = np.tile(on_host(self.newline.weight) * np.float32(config.factor), config.vectors)
        return (yield from join_grid(made, rule.cut(*whole), config.side // config.cell, newline))


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT = ("vision_tower.vision_model", "vision_tower")
_UNUSED = re.compile(r"vision_tower\.(?:vision_model\.)?(?:post_layernorm\.|head\.|embeddings\.position_ids$)")
_LAYER = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.")
_PROJECTOR = re.compile(r"(layerwise|spatial)_projectors\.(\d+)\.(.*)")
_TO, _IN = "projectors.{e}.", "qformer.encoder.layer.0."
_PAIRS = {
    "norm:": "norm", "start_norm:": "qformer.layernorm", "self_norm:": f"{_IN}attention.output.LayerNorm",
    "cross_norm:": f"{_IN}crossattention.output.LayerNorm", "end_norm:": f"{_IN}output_query.LayerNorm",
    "qkv:q.": f"{_IN}attention.attention.query", "qkv:k.": f"{_IN}attention.attention.key",
    "qkv:v.": f"{_IN}attention.attention.value", "self_output:": f"{_IN}attention.output.dense",
    "query:": f"{_IN}crossattention.attention.query", "kv:k.": f"{_IN}crossattention.attention.key",
    "kv:v.": f"{_IN}crossattention.attention.value", "cross_output:": f"{_IN}crossattention.output.dense",
    "up:": f"{_IN}intermediate_query.dense", "down:": f"{_IN}output_query.dense", "output:": "out_linear",
}  # fmt: skip
WEIGHTS = (
    *(line for line in siglip.names(*_AT) if not line.target.startswith(("norm:", "layers."))),
    *(
        dataclasses.replace(line, target="blocks." + line.target.removeprefix("layers."))
        for line in siglip.names(*_AT)
        if line.target.startswith("layers.")
    ),
    WeightName("newline:weight", "image_newline", ()),
    *(line for target, name in _PAIRS.items() for line in pair(_TO + target, _TO + name)),
    WeightName(_TO + "queries:weight", _TO + "query", ()),
    WeightName(_TO + "positions:weight", _TO + "image_positions", ()),
)


def prepared(tensors: Mapping[str, StoredTensor], config: Any) -> Mapping[str, StoredTensor]:
    """Drop what is not used, number the projectors as in the config, and expand their tables to all patches of a tile.

    Both tables are those of a window: of its cells, and of its patches.
    """
    numbers = {number: place for place, (number, _) in enumerate(config.projectors)}
    found = dict[str, StoredTensor]()
    for name, tensor in tensors.items():
        layer, part = _LAYER.match(name), _PROJECTOR.fullmatch(name)
        if _UNUSED.match(name) or (layer is not None and int(layer[1]) >= config.num_layers):
            continue
        if part is not None:
            place = numbers.get(int(part[2]) if part[1] == "spatial" else -1 - int(part[2]))
            if place is None:
                continue
            name = f"projectors.{place}.{part[3]}"
            tensor = dataclasses.replace(tensor, name=name)
            if part[3] in ("query", "image_positions"):
                tensor = _expanded(tensor, config, 2 if part[3] == "query" else 1)
        found[name] = tensor
    return found


def _expanded(table: StoredTensor, config: Granite4VisionTowerConfig, each: int) -> StoredTensor:
    """A row for each patch of a tile, from rows for the squares of `each` x `each` patches of a window."""
    side, size = config.window * 2 // each, config.hidden_size
    if table.numel != side**2 * size:
        return table  # the loader reports the wrong shape
    at = np.arange(config.side) // each % side
    rows = (side * at[:, None] + at).reshape(-1)
    return computed(table, (len(rows), size), lambda values: values.reshape(-1, size)[rows])


FAMILY = TowerFamily(
    name="granite4_vision_tower",
    hf={"Granite4VisionForConditionalGeneration": "granite4_vision"},
    settings=("image_grid_pinpoints",),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=Granite4VisionTower,
    weights=WEIGHTS,
    mark="<image>",
    words_around=words_around,
)
