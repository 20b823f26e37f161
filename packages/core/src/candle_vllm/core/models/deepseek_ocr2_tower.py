# SPDX-License-Identifier: MIT
"""The vision encoders of DeepSeek-OCR 2: SAM's (`sam.py`), and Qwen2's layers, with their projection to the text model.

The rows of SAM's encoder, each of 4 x 4 patches, are followed by as many learned queries, which are of the tile's size.
In the layers of Qwen2 the rows attend to each other, and a query to all rows and to the queries up to itself: columns
beside each head hide other keys, as `row_copies.py` describes. The outputs of the queries are projected to embeddings.
An image has a grid of tiles, followed by the tile of the whole image on grey, and ends with a learned vector.
Sources: Wei et al., 2026, "DeepSeek-OCR 2: Visual Causal Flow"; `DeepseekOcr2ForConditionalGeneration` of transformers.
Shapes: n rows of a tile and queries, E hidden, H query heads, K key heads, D elements of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.side_by_side import first_of_heads
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, on_host
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import sam
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.deepseek_ocr2_config import (
    SIDES,
    DeepseekOcr2TowerConfig,
    config_from_gguf,
    config_from_hf,
)
from candle_vllm.core.models.grid_positions import GridPositions, sharp
from candle_vllm.core.models.llava_onevision_tower import Newline
from candle_vllm.core.models.row_copies import RowNumbers, Shared, taken, widened
from candle_vllm.core.models.sam import Halved, Neck, SamBlock, vector
from candle_vllm.core.models.sam_config import completed
from candle_vllm.core.models.sam_grid import Grid
from candle_vllm.core.models.tower_family import Joining, Placed, TowerFamily, TowerStep, contents_template
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import Cut

_HIDDEN = -3e4  # added to scores of keys that are not read, times sqrt(D + 256)

# ---- layers ----------------------------------------------------------------------------------------------------------


class Queries:
    """Which keys a tile's rows and queries read, and the rotary tables; `joins` and `last` are filled for each tile.

    Attributes:
        joins: rows of SAM's encoder, followed by zeros.
        last: the query of each patch's cell.
        reads, read: rows of `rows` and `columns` for queries and for keys of attention.
    """

    def __init__(self, config: DeepseekOcr2TowerConfig, placement: Placement) -> None:
        most, half = SIDES[0] ** 2, config.size // config.heads // 2
        self.joins, self.last = RowNumbers(config.patches), RowNumbers(config.patches)
        self.reads = RowNumbers(config.patches)
        one = np.ones((most, most), np.float32)
        self.rows = placement.constant(np.concatenate([one[:1], np.triu(one, 1)]))
        self.columns = placement.constant(
            np.concatenate([0 * one[:1], np.float32(_HIDDEN) * np.eye(most)]).astype("f4")
        )
        places = np.concatenate([np.arange(2 * side**2, dtype=np.float32) for side in SIDES])
        powers = np.float32(config.theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
        angles = (places[:, None] * (np.float32(1) / powers)).astype(np.float64)
        self.turns = tuple(placement.constant(turn(angles).astype(np.float32)) for turn in (np.cos, np.sin))

    def fill(self, patches: int) -> NDArray[np.int64]:
        """Fill the tables for a tile; returns rows of the tables of learned queries and of angles for each patch."""
        count = patches // 16
        rows = np.arange(count)
        self.joins.fill(np.concatenate([rows, np.full(count, -1)])[None])
        self.last.fill(count + np.arange(patches)[None] // 16)
        self.reads.fill(np.concatenate([0 * rows, 1 + rows])[None])
        first = 0 if count == SIDES[0] ** 2 else 2 * SIDES[0] ** 2
        return first + np.minimum(np.arange(patches), 2 * count - 1)


class Layer:
    """A layer of Qwen2: x [2 n, E] -> [2 n, E] in fp32."""

    def __init__(self, config: DeepseekOcr2TowerConfig, queries: Queries, placement: Placement) -> None:
        size, self.heads, self.queries = config.size, (config.heads, config.kv_heads), queries
        self.dim = size // config.heads
        shards = {"q": size, "k": self.dim * config.kv_heads, "v": self.dim * config.kv_heads}
        self.attention_norm, self.mlp_norm = (RMSNorm(size, config.eps, placement) for _ in range(2))
        self.qkv = Linear(size, shards, placement, bias=True)
        self.output = Linear(size, size, placement)
        self.mlp = GatedMLP(size, config.inner, placement)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        queries, (heads, kv_heads) = self.queries, self.heads
        places, lengths = _within(step.places, x)
        columns = [Shared(queries.rows, queries.reads)], [Shared(queries.columns, queries.reads)]
        wide = self.dim + queries.rows.shape[1]
        qkv = widened(self.qkv(self.attention_norm(x)), self.heads, self.dim, *columns, math.sqrt(wide / self.dim))
        turned = Turned(places, *queries.turns)
        y = whole_attention(qkv, heads, lengths, turned, kv_heads=kv_heads)
        x = x + self.output(first_of_heads(y.unflatten(-1, (-1, wide)), self.dim))
        return x + self.mlp(self.mlp_norm(x))


def _within(places: Value, x: Value) -> tuple[Value, tuple[int, ...]]:
    """The places of the rows of x, and their number, which a compiled step has elsewhere."""
    return (places, ()) if isinstance(x, Recorded) else (places[: len(x)], (len(x),))


# ---- model -----------------------------------------------------------------------------------------------------------


class DeepseekOcr2Tower:
    """The vision encoders: patches of tiles to embeddings; see `JoiningTower`."""

    mergers = ()

    def __init__(self, config: DeepseekOcr2TowerConfig, placement: Placement) -> None:
        size, channels = config.size, config.channels
        self.config = config
        self.patches = Linear(config.patch_size, config.hidden_size, placement, bias=True)
        self.positions = GridPositions(config.learned, config.hidden_size, placement, sharp)
        self._grid, self._queries = Grid(config), Queries(config, placement)
        self.blocks = [SamBlock(config, layer, self._grid, placement) for layer in range(config.blocks)]
        self.neck = Neck(config, self._grid, placement)
        self.halves = [Halved(channels[at], channels[at + 1], self._grid.halves[at], placement) for at in range(2)]
        self.queries = Embedding(2 * sum(side**2 for side in SIDES), size, placement, wide=True)
        self.encoder = [Layer(config, self._queries, placement) for _ in range(config.depth)]
        self.last = RMSNorm(size, config.eps, placement)
        self.projector = Linear(size, config.text_size, placement, bias=True)
        self.separator = Newline(config.text_size, placement)
        parts = [part for block in self.blocks for part in (block.attention, block.mlp)]
        self.layers = [*parts, self.neck, *self.halves, self._join, *self.encoder]

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the tables for rows and queries, of which there are fewer than patches."""
        self._grid.fill(grid[0])
        numbers = self._queries.fill(grid[0] ** 2)
        return Placed(numbers[first : first + len(places)], self.positions(places, grid))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        assert step.start is not None
        return step.start + self.patches(patches)

    def _join(self, x: Value, step: TowerStep) -> Value:
        """The rows of SAM's encoder, followed by the queries of the tile's size: [n, E] -> [2 n, E]."""
        rows = taken(x, self._queries.joins)
        return rows + self.queries(_within(step.places, rows)[0])

    def norm(self, x: Value) -> Value:
        """See `Tower`; the query of each patch's cell."""
        return self.last(taken(x, self._queries.last))

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(cells)

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`."""
        del whole
        yield from ()
        return np.concatenate([made, on_host(self.separator.weight)[None]])


# ---- weight names ----------------------------------------------------------------------------------------------------

_IN = ("vision_tower.vision_encoder.", "qwen2_model.model.model.")
_BLOCK = {
    "attention_norm:": ("input_layernorm", "ln1"),
    "output:": ("self_attn.o_proj", "attn_out"),
    "mlp_norm:": ("post_attention_layernorm", "ln2"),
    "mlp.gate_up:gate.": ("mlp.gate_proj", "ffn_gate"),
    "mlp.gate_up:up.": ("mlp.up_proj", "ffn_up"),
    "mlp.down:": ("mlp.down_proj", "ffn_down"),
} | {f"qkv:{part}.": (f"self_attn.{part}_proj", f"attn_{part}") for part in "qkv"}
_QUERIES = tuple(
    (
        f"vision_tower.query_{side}_resolution.weight",
        f"qwen2_model.query_{side}.weight",
        f"v.resample_query_{side}.weight",
    )
    for side in (1024, 768)
)
WEIGHTS = (
    *sam.WEIGHTS,
    WeightName("queries:weight", _QUERIES[0][:2], _QUERIES[0][2]),
    *(
        line
        for target, (hf, gguf) in _BLOCK.items()
        for line in pair(
            f"encoder.{{i}}.{target}", tuple(f"{at}layers.{{i}}.{hf}" for at in _IN), f"v.blk.{{i}}.{gguf}"
        )
    ),
    *pair("last:", tuple(f"{at}norm" for at in _IN), "v.post_ln"),
    *pair("projector:", ("multi_modal_projector", "projector.layers"), "mm.model.fc"),
    WeightName("separator:weight", ("view_separator", "view_seperator"), "v.view_seperator", gguf_view=vector),
)


def prepared(tensors: Mapping[str, StoredTensor], config: Any) -> Mapping[str, StoredTensor]:
    """Join the learned queries of both sizes to a table, each after as many rows of zeros."""
    found = dict(tensors)
    for large, small in zip(*_QUERIES):
        shapes = [(side**2, config.size) for side in SIDES]
        if large in found and small in found and [found[large].shape, found[small].shape] == shapes:
            one, other = found[large], found.pop(small)
            zeros = [np.zeros(shape, np.float32) for shape in shapes]

            def joined(values: NDArray[np.float32], other: StoredTensor = other, zeros: Any = zeros) -> NDArray[Any]:
                return np.concatenate([zeros[0], values, zeros[1], other.load("F32")])

            found[large] = computed(one, (2 * sum(side**2 for side in SIDES), config.size), joined, "F32")
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<image>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each embedding of each tile, and for the vector at the end."""
    cell = cut.height // grid[0]
    last = cut.last or (cut.height, cut.width)
    return _MARK * (cut.rows * cut.columns * math.prod(grid) + math.prod(side // cell for side in last) + cut.more)


FAMILY = TowerFamily(
    name="deepseek_ocr2_tower",
    hf={"DeepseekOcr2ForConditionalGeneration": "deepseek_ocr2", "DeepseekOCR2ForCausalLM": "deepseek_vl_v2"},
    gguf=("deepseekocr2",),
    settings=("crop_to_patches", "min_patches", "max_patches"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed,
    prepared=prepared,
    build=DeepseekOcr2Tower,
    weights=WEIGHTS,
    mark=_MARK,
    template=contents_template(_MARK + "\n"),
    words_around=words_around,
)
