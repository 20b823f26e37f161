# SPDX-License-Identifier: MIT
"""SAM's vision encoder (ViTDet) with the convolutions of DeepSeek-OCR behind it, which make a row of 4 x 4 patches.

Each block is x + attention(norm(x)), then x + mlp(norm(x)). Attention is over windows, or over the whole tile in some
layers; windows at the edges are filled with zeros, which are read like patches. To a score q k / sqrt(D) of a query in
row r and column c, and a key in row r' and column c', q R[r - r'] + q C[c - c'] is added. It is computed as a part of
the score: S columns beside q have q R[r - j] for all rows j, and S columns beside k are 1 for j = r' and otherwise 0.
After the blocks come a matrix, a norm, a convolution over 3 x 3 patches, a norm, and two convolutions with stride 2.
Sources: Kirillov et al., 2023, arXiv:2304.02643; Li et al., 2022, arXiv:2203.16527; Wei et al., 2025, arXiv:2510.18234;
`DeepseekOcr2SamVisionEncoder` of transformers.
Shapes: T patches of a tile, E hidden, H heads, D elements of a head, S rows of a tile or of a window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import first_of_heads, side_by_side
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import View, computed, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.grid_positions import centred
from candle_vllm.core.models.row_copies import RowNumbers, Runs, Shared, taken, widened
from candle_vllm.core.models.sam_config import SamConfig
from candle_vllm.core.models.sam_grid import Grid
from candle_vllm.core.models.siglip import patch_kernel
from candle_vllm.core.models.tower_family import TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor

_EPS = 1e-6  # of the norms between the convolutions

# ---- blocks ----------------------------------------------------------------------------------------------------------


class SamAttention:
    """x + attention(norm(x)): x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: SamConfig, layer: int, grid: Grid, placement: Placement) -> None:
        size, self.heads, self.dim = config.hidden_size, config.num_heads, config.head_dim
        self.windowed, self.grid = 2 * layer in config.windowed, grid
        side = config.window if self.windowed else max(config.tiles)
        width = 2 * side - 1 if self.windowed else sum(map(config.run_width, config.tiles))
        self.norm = LayerNorm(size, config.norm_eps, placement)
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=config.qkv_bias)
        self.relative = Linear(self.dim, {"rows": width, "columns": width}, placement)
        self.output = Linear(size, size, placement, bias=True)
        self.side = side
        self.wide = math.sqrt(self.dim + 2 * side)
        self.ones = placement.constant(np.eye(side, dtype=np.float32) * np.float32(self.wide))

    def __call__(self, x: Value, step: TowerStep) -> Value:
        normed, grid = side_by_side(self.norm(x)), self.grid
        places = grid.cut if self.windowed else grid.whole
        qkv = self.qkv(taken(normed, grid.windows) if self.windowed else normed)
        runs = [self.relative(q) for q in qkv.split([self.dim] * 3 * self.heads, -1)[: self.heads]]
        qkv = widened(
            qkv,
            (self.heads, self.heads),
            self.dim,
            [Runs(runs, places.first_row, self.side), Runs(runs, places.first_column, self.side)],
            [Shared(self.ones, places.rows), Shared(self.ones, places.columns)],
            self.wide / math.sqrt(self.dim),
        )
        y = whole_attention(qkv, self.heads, step.windows if self.windowed else step.lengths)
        y = first_of_heads(y.unflatten(-1, (-1, self.dim + 2 * self.side)), self.dim)
        return x + self.output(taken(y, grid.back) if self.windowed else y)


class SamMLP:
    """x + mlp(norm(x)): x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: SamConfig, placement: Placement) -> None:
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, placement, activation=config.activation)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        del step
        return x + self.mlp(self.norm(x))


class SamBlock:
    """Both parts of a block, which have different numbers of rows."""

    def __init__(self, config: SamConfig, layer: int, grid: Grid, placement: Placement) -> None:
        self.attention = SamAttention(config, layer, grid, placement)
        self.mlp = SamMLP(config, placement)


class Neck:
    """A matrix, a norm, a convolution over 3 x 3 patches and a norm: x [T, E] -> [T, channels]."""

    def __init__(self, config: SamConfig, grid: Grid, placement: Placement) -> None:
        size, self.near = config.channels[0], grid.near
        self.first = Linear(config.hidden_size, size, placement)
        self.second = Linear(9 * size, size, placement)
        self.first_norm, self.second_norm = (LayerNorm(size, _EPS, placement) for _ in range(2))

    def __call__(self, x: Value, step: TowerStep) -> Value:
        del step
        x = side_by_side(self.first_norm(self.first(x)))
        return side_by_side(self.second_norm(self.second(taken(x, self.near))))


class Halved:
    """A convolution over 3 x 3 rows with stride 2: x [T, C] -> [T / 4, C']."""

    def __init__(self, inputs: int, outputs: int, rows: RowNumbers, placement: Placement) -> None:
        self.rows, self.kernel = rows, Linear(9 * inputs, outputs, placement)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        del step
        return side_by_side(self.kernel(taken(x, self.rows)))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _relative(stored: StoredTensor, config: SamConfig) -> StoredTensor:
    """Relative positions [2 S - 1, D] in reverse order, for each side of tiles resized, and filled up with zeros."""
    length, dim, window = stored.shape[0], config.head_dim, 2 * config.window - 1
    if stored.shape not in ((window, dim), (2 * config.learned - 1, dim)):
        return stored  # the loader reports the wrong shape
    if length == window:
        return computed(stored, stored.shape, lambda values: np.ascontiguousarray(values[::-1]))

    def resized(values: NDArray[np.float32]) -> NDArray[np.float32]:
        made = np.zeros((sum(map(config.run_width, config.tiles)), dim), np.float32)
        first = 0
        for side in config.tiles:
            count = 2 * side - 1
            near, shares = centred(np.arange(count), count, length)
            table = np.add.reduce([values[each] * share[:, None] for each, share in zip(near, shares)])
            made[first : first + count] = table[::-1]
            first += config.run_width(side)
        return made

    return computed(stored, (sum(map(config.run_width, config.tiles)), dim), resized, "F32")


def vector(stored: StoredTensor, config: Any) -> StoredTensor:
    """A vector [E], which GGUF files store as [1, E]."""
    del config
    return dataclasses.replace(stored, shape=stored.shape[1:]) if stored.shape[:-1] == (1,) else stored


def kernel_rows(stored: StoredTensor, config: Any) -> StoredTensor:
    """The kernel of a convolution [C', C, h, w] as a matrix [C', h * w * C]."""
    del config
    if len(stored.shape) != 4:
        return stored
    shape = (stored.shape[0], math.prod(stored.shape[1:]))
    return computed(stored, shape, lambda values: values.transpose(0, 2, 3, 1).reshape(shape))


def positions(stored: StoredTensor, config: SamConfig) -> StoredTensor:
    """The table of positions [S * S, E], which is stored as [1, S, S, E]."""
    shape = (config.learned**2, config.hidden_size)
    if stored.numel != math.prod(shape):
        return stored
    return computed(stored, shape, lambda values: values.reshape(shape), "F32")


_AT = ("vision_tower.sam_encoder.", "sam_model.", "v.sam.")
_IN = (_AT[0] + "layers.{i}.", _AT[1] + "blocks.{i}.", "v.sam.blk.{i}.")
_BLOCK = {  # names in transformers, in the original files and in GGUF
    "attention.norm:": ("layer_norm1", "norm1", "pre_ln"),
    "attention.output:": ("attn.proj", "attn.proj", "attn.out"),
    "mlp.norm:": ("layer_norm2", "norm2", "post_ln"),
    "mlp.mlp.up:": ("mlp.lin1",) * 3,
    "mlp.mlp.down:": ("mlp.lin2",) * 3,
}
_NORMS = {"neck.first_norm:": ("neck.layer_norm1", "neck.1"), "neck.second_norm:": ("neck.layer_norm2", "neck.3")}
_KERNELS = {
    "neck.first:weight": ("neck.conv1", "neck.0"),
    "neck.second:weight": ("neck.conv2", "neck.2"),
    "halves.0.kernel:weight": ("proj.conv1", "net_2"),
    "halves.1.kernel:weight": ("proj.conv2", "net_3"),
}


def _line(target: str, places: Sequence[str], names: Sequence[str], view: View | None = None) -> WeightName:
    hf, original, gguf = (at + name for at, name in zip(places, names, strict=True))
    return WeightName(target, (hf, original), gguf, hf_view=view, gguf_view=view)


WEIGHTS = (
    _line(
        "patches:weight", _AT, ("patch_embed.projection.weight", "patch_embed.proj.weight", "patch_embd.weight"),
        patch_kernel,
    ),
    _line("patches:bias", _AT, ("patch_embed.projection.bias", "patch_embed.proj.bias", "patch_embd.bias")),
    _line("positions:weight", _AT, ("pos_embed", "pos_embed", "pos_embd.weight"), positions),
    *(
        WeightName(
            f"blocks.{{i}}.attention.qkv:{part}.{kind}",
            tuple(Seen(f"{at}attn.qkv.{kind}", row_part(number, 3)) for at in _IN[:2]),
            Seen(f"{_IN[2]}attn.qkv.{kind}", row_part(number, 3)),
        )
        for number, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    *(
        _line(
            f"blocks.{{i}}.attention.relative:{axis}.weight", _IN,
            (f"attn.rel_pos_{letter}", f"attn.rel_pos_{letter}", f"attn.pos_{letter}.weight"), _relative,
        )
        for axis, letter in (("rows", "h"), ("columns", "w"))
    ),
    *(
        _line(f"blocks.{{i}}.{target}{kind}", _IN, [f"{name}.{kind}" for name in names])
        for target, names in _BLOCK.items()
        for kind in ("weight", "bias")
    ),
    *(
        _line(target + kind, _AT, [f"{name}.{kind}" for name in (*names, names[-1])])
        for target, names in _NORMS.items()
        for kind in ("weight", "bias")
    ),
    *(
        _line(target, _AT, [f"{name}.weight" for name in (*names, names[-1])], kernel_rows)
        for target, names in _KERNELS.items()
    ),
)  # fmt: skip
