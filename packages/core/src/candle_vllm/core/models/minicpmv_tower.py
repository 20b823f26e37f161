# SPDX-License-Identifier: MIT
"""The vision encoder of MiniCPM-V 4.6 and MiniCPM-OCR, with its projection to the text model, Qwen3.5.

The blocks are SigLIP's (`siglip.py`): x + attention(norm(x)), then x + mlp(norm(x)), over a tile. After one of the
first blocks the patches of each square of 2 x 2 attend to each other and become one vector: their mean, plus two
matrices with GELU of the four, side by side and normalised. With `downsample_mode` 4x this is left out. After the last
norm, squares of 2 x 2 vectors become embeddings. A large image has tiles of a grid after the tile of the whole image.
Sources: Yu et al., 2025, arXiv:2509.18154 (MiniCPM-V 4.5); Xu et al., 2024, arXiv:2403.11703 (the grid); transformers'
`minicpmv4_6` and `minicpm_ocr`.
Shapes: T patches of a tile, E hidden, S squares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.minicpmv_config import (
    OCR,
    MiniCPMVTowerConfig,
    completed,
    config_from_gguf,
    config_from_hf,
)
from candle_vllm.core.models.siglip import Block
from candle_vllm.core.models.tower_family import Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import Cut

# ---- model -----------------------------------------------------------------------------------------------------------


class Merger:
    """The patches of each square attend to each other, `attend`, and become one vector, `merge`."""

    def __init__(self, config: MiniCPMVTowerConfig, placement: Placement) -> None:
        size, whole, self.heads = config.hidden_size, 4 * config.hidden_size, config.num_heads
        self.attention_norm = LayerNorm(size, config.norm_eps, placement)
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=True)
        self.output = Linear(size, size, placement, bias=True)
        self.square_norm = LayerNorm(whole, config.norm_eps, placement)
        self.up = Linear(whole, 4 * config.intermediate_size, placement, bias=True)
        self.down = Linear(4 * config.intermediate_size, size, placement, bias=True)
        self.mean = placement.constant(np.full((1, 1, 4), 0.25, np.float32))

    def attend(self, x: Value, step: TowerStep) -> Value:
        """x [T, E] -> [T, E]."""
        return x + self.output(whole_attention(self.qkv(self.attention_norm(x)), self.heads, step.windows))

    def merge(self, x: Value, step: TowerStep) -> Value:
        """x [T, E] -> [S, E]."""
        del step
        squares = x.unflatten(0, (-1, 4)).flatten(1)
        mean = mix_streams(squares, self.mean, level=False)
        return mean + self.down(activation(self.up(self.square_norm(squares)), "gelu_tanh"))


class MiniCPMVTower:
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: MiniCPMVTowerConfig, placement: Placement) -> None:
        size, whole = config.hidden_size, config.cell_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.positions = Embedding(config.table**2, size, placement, wide=True)
        self.blocks = [Block(config, placement) for _ in range(config.num_layers)]
        self.merger = Merger(config, placement) if config.merged_at else None
        self.norm = LayerNorm(size, config.norm_eps, placement)
        self.cell_norm = LayerNorm(whole, 1e-6, placement)
        self.first = Linear(whole, whole, placement, bias=True)
        self.second = Linear(whole, config.text_size, placement, bias=True)

    @property
    def layers(self) -> Sequence[Callable[[Value, TowerStep], Value]]:
        """See `Tower`: the blocks, and between them the two steps of the merger."""
        if self.merger is None:
            return self.blocks
        first, last = self.blocks[: self.config.merged_at], self.blocks[self.config.merged_at :]
        return [*first, self.merger.attend, self.merger.merge, *(_of_squares(block) for block in last)]

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; the nearest rows of the table, which covers the whole tile."""
        del first
        return Placed(places * self.config.table // np.array(grid) @ (self.config.table, 1))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return self.positions(step.places) + self.patches(patches)

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.second(activation(self.first(self.cell_norm(cells)), "gelu"))


def _of_squares(block: Block) -> Callable[[Value, TowerStep], Value]:
    return lambda x, step: block(x, dataclasses.replace(step, lengths=[count // 4 for count in step.lengths]))


# ---- weight names ----------------------------------------------------------------------------------------------------

_MERGER, _IN_GGUF = "vision_tower.vit_merger.", "v.vit_merger."

WEIGHTS = (
    *(
        dataclasses.replace(line, target=line.target.replace("layers.", "blocks."))
        for line in siglip.names("vision_tower")
    ),
    *pair("merger.attention_norm:", _MERGER + "layer_norm1", _IN_GGUF + "ln1"),
    *pair("merger.qkv:q.", _MERGER + "self_attn.q_proj", _IN_GGUF + "attn_q"),
    *pair("merger.qkv:k.", _MERGER + "self_attn.k_proj", _IN_GGUF + "attn_k"),
    *pair("merger.qkv:v.", _MERGER + "self_attn.v_proj", _IN_GGUF + "attn_v"),
    *pair("merger.output:", _MERGER + "self_attn.out_proj", _IN_GGUF + "attn_out"),
    *pair("merger.square_norm:", _MERGER + "pre_norm", _IN_GGUF + "ds_ln"),
    *pair("merger.up:", _MERGER + "linear_1", _IN_GGUF + "ds_ffn_up"),
    *pair("merger.down:", _MERGER + "linear_2", _IN_GGUF + "ds_ffn_down"),
    *pair("cell_norm:", "merger.mlp.0.pre_norm", "mm.input_norm"),
    *pair("first:", "merger.mlp.0.linear_1", "mm.up"),
    *pair("second:", "merger.mlp.0.linear_2", "mm.down"),
)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Drop the merger of squares if it is left out; otherwise see `siglip.prepared`."""
    unused = () if config.windowed else (_MERGER, _IN_GGUF)
    return siglip.prepared({name: each for name, each in tensors.items() if not name.startswith(unused)}, config)


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<|image_pad|>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: its number, the tile of the whole image, and the grid's tiles, a line for a row."""
    tile, side = f"<slice>{_MARK * math.prod(grid)}</slice>", cut.height // grid[0]
    whole = _MARK * math.prod(pixels // side for pixels in cut.last or (cut.height, cut.width))
    tiles = "\n".join(tile * cut.columns for _ in range(cut.rows))
    return f"<image_id>{cut.number}</image_id><image>{whole}</image>{tiles}"


FAMILY = TowerFamily(
    name="minicpmv_tower",
    hf={"MiniCPMV4_6ForConditionalGeneration": "minicpmv4_6", OCR: "minicpm_ocr"},
    gguf=("minicpmv4_6",),
    settings=("downsample_mode", "max_slice_nums", "scale_resolution", "slice_mode", "small_image_upsize"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed,
    prepared=prepared,
    build=MiniCPMVTower,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=words_around,
)
