# SPDX-License-Identifier: MIT
"""The vision encoders of DeepSeek-OCR 1: SAM's (`sam.py`) and CLIP's, with their projection to the text model.

The rows of SAM's encoder, each of 4 x 4 patches, are the embedded patches of CLIP's encoder, after its class token. Its
last outputs, without the class token's, and the rows of SAM's encoder side by side are projected to embeddings. Each
row of embeddings, which runs through the tiles of a grid, ends with a learned vector; the grid comes first, then the
tile of the whole image, then another learned vector.
Sources: Wei et al., 2025, arXiv:2510.18234; `UnlimitedOcrVisionModel` of transformers, which has the same encoders.
Shapes: n rows of a tile, E elements of CLIP's rows, C of SAM's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import SHAPES, Placement, on_host
from candle_vllm.core.loading.views import computed, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import sam
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.deepseek_ocr2_tower import words_around
from candle_vllm.core.models.deepseek_ocr_config import (
    DeepseekOcrTowerConfig,
    completed_clip,
    config_from_gguf,
    config_from_hf,
)
from candle_vllm.core.models.grid_positions import GridPositions, sharp
from candle_vllm.core.models.llava_onevision_tower import Newline
from candle_vllm.core.models.row_copies import RowNumbers, taken
from candle_vllm.core.models.sam import Halved, Neck, SamBlock, vector
from candle_vllm.core.models.sam_grid import Grid
from candle_vllm.core.models.siglip import Block
from candle_vllm.core.models.tower_family import Joining, Placed, TowerFamily, TowerStep, contents_template
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- model -----------------------------------------------------------------------------------------------------------


class ClipBlock(Block):
    """A block of CLIP's encoder, which passes the rows of SAM's encoder on."""

    def __call__(self, x: Value, step: TowerStep) -> Value:
        hidden, rows = x
        lengths = () if isinstance(hidden, Recorded) else (len(hidden),)
        return super().__call__(hidden, dataclasses.replace(step, lengths=lengths)), rows


class DeepseekOcrTower:
    """The vision encoders: patches of tiles to embeddings; see `JoiningTower`.

    From CLIP's encoder on, x is a pair: its rows [n + 1, E], and those of SAM's encoder [n, C].
    """

    mergers = ()

    def __init__(self, config: DeepseekOcrTowerConfig, placement: Placement) -> None:
        size, channels = config.clip.hidden_size, config.channels
        self.config = config
        self.patches = Linear(config.patch_size, config.hidden_size, placement, bias=True)
        self.positions = GridPositions(config.learned, config.hidden_size, placement, sharp)
        self._grid = Grid(config)
        self._joins, *self._last = (RowNumbers(config.patches) for _ in range(3))
        self.blocks = [SamBlock(config, layer, self._grid, placement) for layer in range(config.blocks)]
        self.neck = Neck(config, self._grid, placement)
        self.halves = [Halved(channels[at], channels[at + 1], self._grid.halves[at], placement) for at in range(2)]
        self.table = Embedding(sum(side**2 + 1 for side in config.sides), size, placement, wide=True)
        self.first_norm = LayerNorm(size, config.clip.norm_eps, placement)
        self.encoder = [ClipBlock(config.clip, placement) for _ in range(config.clip.num_layers)]
        self.projector = Linear(config.cell_size, config.text_size, placement, bias=True)
        self.newline, self.separator = (Newline(config.text_size, placement) for _ in range(2))
        parts = [part for block in self.blocks for part in (block.attention, block.mlp)]
        self.layers = [*parts, self.neck, *self.halves, self._join, *self.encoder]

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the table of positions of CLIP's encoder, which has fewer rows than patches."""
        self._grid.fill(grid[0])
        patches, sides = np.arange(grid[0] ** 2), self.config.sides
        count, number = grid[0] ** 2 // 16, sides.index(grid[0] // 4)
        self._joins.fill(np.arange(-1, count)[None])
        for more, rows in zip((1, 0), self._last):
            rows.fill(more + patches[None] // 16)
        numbers = sum(side**2 + 1 for side in sides[:number]) + np.minimum(patches, count)
        return Placed(numbers[first : first + len(places)], self.positions(places, grid))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        assert step.start is not None
        return step.start + self.patches(patches)

    def _join(self, x: Value, step: TowerStep) -> Value:
        """The class token and the rows of SAM's encoder with CLIP's positions, and these rows: see the class."""
        rows = taken(x, self._joins)
        places = step.places if isinstance(rows, Recorded) else step.places[: len(rows)]
        return side_by_side(self.first_norm(rows + self.table(places))), x

    def norm(self, x: Value) -> Value:
        """See `Tower`; the rows of both encoders for each patch's cell, without a norm."""
        return side_by_side(*(taken(each, rows) for each, rows in zip(x, self._last, strict=True)))

    def cells(self, hidden: Any) -> Any:
        """See `Tower`; the rows of a cell's patches are the same."""
        return hidden[:: self.config.cell**2]

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(cells)

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`."""
        yield from ()
        cut, size, cell = self.config.rule.cut(*whole), made.shape[1], self.config.cell_pixels
        side, last = cut.height // cell, (cut.last or (cut.height, cut.width))[0] // cell
        rows, columns = cut.rows, cut.columns
        tiles = made[: rows * columns * side**2].reshape(rows, columns, side, side, size).swapaxes(1, 2)
        newline, parts = on_host(self.newline.weight), list[NDArray[np.float32]]()
        for grid in (tiles.reshape(rows * side, columns * side, size), made[-(last**2) :].reshape(last, last, size)):
            ends = np.broadcast_to(newline, (len(grid), 1, size))
            parts.append(np.concatenate([grid, ends], 1).reshape(-1, size))
        return np.concatenate([*parts, on_host(self.separator.weight)[None]])


# ---- weight names ----------------------------------------------------------------------------------------------------

_IN, _BLOCK = "vision_model.transformer.layers.{i}.", "v.blk.{i}."
_TABLES = (  # names of CLIP's class token and of its positions
    ("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("v.class_embd", "v.position_embd.weight"),
)
_PARTS = {
    "attention_norm": ("layer_norm1", "ln1"), "output": ("self_attn.out_proj", "attn_out"),
    "mlp_norm": ("layer_norm2", "ln2"), "mlp.up": ("mlp.fc1", "ffn_up"), "mlp.down": ("mlp.fc2", "ffn_down"),
}  # fmt: skip
_UNUSED = (
    "vision_model.embeddings.patch_embedding.weight",
    "v.patch_embd.weight",
    "vision_model.embeddings.position_ids",
)
WEIGHTS = (
    *sam.WEIGHTS,
    WeightName("table:weight", _TABLES[0][1], _TABLES[1][1]),
    *pair("first_norm:", "vision_model.pre_layrnorm", "v.pre_ln"),
    *(
        WeightName(
            f"encoder.{{i}}.qkv:{part}.{kind}",
            Seen(f"{_IN}self_attn.qkv_proj.{kind}", row_part(number, 3)),
            (f"{_BLOCK}attn_{part}.{kind}", Seen(f"{_BLOCK}attn_qkv.{kind}", row_part(number, 3))),
        )
        for number, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    *(
        line
        for target, (hf, gguf) in _PARTS.items()
        for line in pair(f"encoder.{{i}}.{target}:", _IN + hf, _BLOCK + gguf)
    ),
    *pair("projector:", "projector.layers", "mm.model.fc"),
    WeightName("newline:weight", "image_newline", "v.image_newline", gguf_view=vector),
    WeightName("separator:weight", "view_seperator", "v.view_seperator", gguf_view=vector),
)


def prepared(tensors: Mapping[str, StoredTensor], config: Any) -> Mapping[str, StoredTensor]:
    """Join CLIP's class token and positions to a table for each size of tiles; drop what is not used."""
    found = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    side, size = config.clip.learned, config.clip.hidden_size
    for token, table in _TABLES:
        if token in found and table in found and found[table].shape == (side**2 + 1, size):
            first = found.pop(token)

            def tables(values: NDArray[np.float32], first: StoredTensor = first) -> NDArray[np.float32]:
                parts, grid = list[NDArray[np.float32]](), GridPositions(side, size, SHAPES, sharp)
                grid.weight = values[1:]
                for rows in config.sides:
                    places = np.indices((rows, rows)).reshape(2, -1).T
                    parts += [values[:1] + first.load("F32").reshape(1, -1), grid(places, (rows, rows))]
                return np.concatenate(parts)

            found[table] = computed(found[table], (sum(rows**2 + 1 for rows in config.sides), size), tables, "F32")
    return found


_MARK = "<image>"
FAMILY = TowerFamily(
    name="deepseek_ocr_tower",
    hf={"DeepseekOCRForCausalLM": "deepseek_vl_v2"},
    gguf=("deepseekocr",),
    settings=("crop_to_patches", "min_patches", "max_patches"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed_clip,
    prepared=prepared,
    build=DeepseekOcrTower,
    weights=WEIGHTS,
    mark=_MARK,
    template=contents_template(_MARK + "\n"),
    words_around=words_around,
)
