# SPDX-License-Identifier: MIT
"""Gemma 4's vision encoder. (Its unified models have no vision encoder; see `gemma4_unified_tower.py`.)

Each block is x + norm(attention(norm(x))), then x + norm(mlp(norm(x))); queries and keys rotate by the column and the
row of their patch, and values have a norm without a weight. The mean of a cell's patches becomes an embedding. In some
models the inputs and outputs of matrices are clamped. Source: Gemma Team, 2026, "Gemma 4 model card".
Shapes: T patches, E hidden, C cells, N positions of columns, and of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, write_rows
from candle_vllm.core.loading.views import computed, constant
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.gemma4_tower_config import Gemma4TowerConfig, config_from_gguf, config_from_hf
from candle_vllm.core.models.gemma4_tower_parts import BOUNDS, BoundedLinear, Positions, QueryNorm, Standard
from candle_vllm.core.models.siglip import patch_kernel
from candle_vllm.core.models.tower_family import Placed, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import Cut

# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: Gemma4TowerConfig, tables: tuple[Value, Value], placement: Placement) -> None:
        size, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
        self.heads, self.head_dim, self.tables = config.num_heads, size // config.num_heads, tables
        self.q, self.k, self.v, self.output = (BoundedLinear(size, size, config.clipped, placement) for _ in range(4))
        self.gate, self.up = (BoundedLinear(size, inner, config.clipped, placement) for _ in range(2))
        self.down = BoundedLinear(inner, size, config.clipped, placement)
        self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm = (
            RMSNorm(size, eps, placement) for _ in range(4)
        )
        self.q_norm, self.k_norm = QueryNorm(self.head_dim, eps, placement), RMSNorm(self.head_dim, eps, placement)
        self.v_norm = RMSNorm(self.head_dim, eps, placement, weighted=False)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        normed, turned = self.attention_norm(x), Turned(step.places, *self.tables)
        parts = ((self.q, self.q_norm), (self.k, self.k_norm), (self.v, self.v_norm))
        qkv = [norm(made(normed).unflatten(-1, (-1, self.head_dim))).flatten(1) for made, norm in parts]
        attended = whole_attention(side_by_side(*qkv), self.heads, step.lengths, turned)
        x = x + self.attention_post_norm(self.output(attended))
        normed = self.mlp_norm(x)
        inner = gated(self.up(normed), self.gate(normed), "gelu_tanh")
        return x + self.mlp_post_norm(self.down(inner))


# ---- model -----------------------------------------------------------------------------------------------------------


class Gemma4Tower:
    """The vision encoder: patches of an image to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: Gemma4TowerConfig, placement: Placement) -> None:
        self.config, size = config, config.hidden_size
        self.patches, self.positions = Linear(config.patch_size, size, placement), Positions(config, placement)
        empty = np.zeros((config.most_patches, size // config.num_heads // 2), np.float32)
        self._tables = placement.constant(empty), placement.constant(empty.copy())  # cos and sin of an image's patches
        self.layers = [Block(config, self._tables, placement) for _ in range(config.num_layers)]
        self.standard = Standard(config, placement) if config.standardised else None
        self.cell_norm = RMSNorm(size, config.norm_eps, placement, weighted=False)
        self.projector = Linear(size, config.text_size, placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; writes rows of the tables, whose first half rotates by the column, the second by the row."""
        del grid
        quarter = self._tables[0].shape[1] // 2
        exponents = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
        frequencies = np.float32(1) / np.float32(self.config.theta) ** exponents
        angles = (places[:, ::-1, None].astype(np.float32) * frequencies).reshape(len(places), -1)
        for table, function in zip(self._tables, (np.cos, np.sin)):
            write_rows(table, first, function(angles.astype(np.float64)).astype(np.float32))
        return Placed(np.arange(first, first + len(places)), self.positions(places))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return step.start + self.patches(patches)

    def norm(self, x: Value) -> Value:
        """See `Tower`; this encoder has no last norm."""
        return x

    def cells(self, hidden: Any) -> Any:
        """See `Tower`; means of patches times the root of E, in some models shifted and scaled."""
        means = self.config.cells(hidden) * self.config.hidden_size**0.5
        return means if self.standard is None else self.standard(means)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(self.cell_norm(cells))


# ---- weight names ----------------------------------------------------------------------------------------------------

_MATRICES = {
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "output": ("self_attn.o_proj", "attn_out"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
_NORMS = {
    "attention_norm": ("input_layernorm", "ln1"),
    "attention_post_norm": ("post_attention_layernorm", "attn_post_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "ln2"),
    "mlp_post_norm": ("post_feedforward_layernorm", "ffn_post_norm"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
}
_LAYER, _BLOCK = "vision_tower.encoder.layers.{i}.", "v.blk.{i}."


def _halves(stored: StoredTensor, config: Any) -> StoredTensor:
    """Reorder rows of q or k, or of their norms: rotary pairs within a half of a head become pairs across both."""
    size = config.hidden_size // config.num_heads
    if not stored.shape or stored.shape[0] % size:
        return stored  # the loader reports the wrong shape
    head = np.arange(size).reshape(2, 2, -1).swapaxes(0, 1).reshape(-1)
    order = (np.arange(0, stored.shape[0], size)[:, None] + head).reshape(-1)
    if len(stored.shape) == 1:
        return computed(stored, stored.shape, lambda values: values[order])
    return stored.select(order)


def pixels_last(stored: StoredTensor, config: Any) -> StoredTensor:
    """Columns, or a vector, in the order [pixel, channel] of a patch, reordered to [channel, pixel]."""
    if stored.shape[-1:] != (config.patch_size,):
        return stored
    sides = (*stored.shape[:-1], config.patch, config.patch, 3)
    return computed(
        stored, stored.shape, lambda values: np.moveaxis(values.reshape(sides), -1, -3).reshape(stored.shape)
    )


def stacked(stored: StoredTensor, config: Any) -> StoredTensor:
    """The tables of columns and of rows [2, N, E] as one [2 * N, E]."""
    shape = (2 * config.learned, config.hidden_size)
    if stored.shape != (2, config.learned, config.hidden_size):
        return stored
    return computed(stored, shape, lambda values: values.reshape(shape))


def _one(stored: StoredTensor, config: Any) -> StoredTensor:
    del config
    return computed(stored, (1,), lambda values: values.reshape(1)) if stored.shape == () else stored


def _matrix(target: str, hf: str, gguf: str) -> list[WeightName]:
    view = _halves if target in "qk" else None
    matrix, bounds = f"layers.{{i}}.{target}.matrix:weight", f"layers.{{i}}.{target}.bounds:"
    return [
        WeightName(matrix, f"{_LAYER}{hf}.linear.weight", f"{_BLOCK}{gguf}.weight", hf_view=view, gguf_view=view),
        *(
            WeightName(f"{bounds}{name}", f"{_LAYER}{hf}.{name}", f"{_BLOCK}{gguf}.{name}", hf_view=_one)
            for name in BOUNDS
        ),
    ]


def _norm(target: str, hf: str, gguf: str) -> WeightName:
    view = _halves if target in ("q_norm", "k_norm") else None
    name = f"layers.{{i}}.{target}:weight"
    return WeightName(name, f"{_LAYER}{hf}.weight", f"{_BLOCK}{gguf}.weight", hf_view=view, gguf_view=view)


_AT = "vision_tower.patch_embedder."
WEIGHTS: Sequence[WeightName] = (
    WeightName(
        "patches:weight", _AT + "input_proj.weight", "v.patch_embd.weight", hf_view=pixels_last, gguf_view=patch_kernel
    ),
    WeightName(
        "positions:weight",
        _AT + "position_embedding_table",
        "v.position_embd.weight",
        hf_view=stacked,
        gguf_view=stacked,
    ),
    *(line for target, (hf, gguf) in _MATRICES.items() for line in _matrix(target, hf, gguf)),
    *(_norm(target, hf, gguf) for target, (hf, gguf) in _NORMS.items()),
    WeightName("standard:bias", "vision_tower.std_bias", "v.std_bias"),
    WeightName("standard:scale", "vision_tower.std_scale", "v.std_scale"),
    WeightName("projector:weight", "embed_vision.embedding_projection.weight", "mm.input_projection.weight"),
)


def prepared(tensors: Mapping[str, StoredTensor], config: Any) -> Mapping[str, StoredTensor]:
    """The tensors for images; to those of a GGUF file, missing bounds and shifts are added with neutral values."""
    found = {name: each for name, each in tensors.items() if not name.startswith(("a.", "mm.a."))}
    if "v.patch_embd.weight" not in found:
        return found
    path, size = found["v.patch_embd.weight"].path, config.hidden_size
    missing = {"v.std_bias": np.zeros(size), "v.std_scale": np.ones(size)}
    for layer in range(config.num_layers):
        matrices = [f"v.blk.{layer}.{name}" for _, name in _MATRICES.values()]
        missing |= {f"{name}.{bound}": np.array([value]) for name in matrices for bound, value in BOUNDS.items()}
    for name, values in missing.items():
        found.setdefault(name, constant(name, values, path))
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------

MARK = "<|image|>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image with `grid` rows and columns of cells in a prompt."""
    del cut
    return f"<|image>{MARK * math.prod(grid)}<image|>"


FAMILY = TowerFamily(
    name="gemma4_tower",
    hf={"Gemma4ForConditionalGeneration": "gemma4"},
    seen=("gemma4_vision",),
    gguf=("gemma4v",),
    settings=("max_soft_tokens",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=Gemma4Tower,
    weights=WEIGHTS,
    mark=MARK,
    words_around=words_around,
)
