# SPDX-License-Identifier: MIT
"""Llama 4's vision encoder, with its adapter and projection to embeddings of the text model.

A tile's patches, followed by a class token, get learned positions and a norm. Each block is x + attention(norm(x)),
then x + mlp(norm(x)), where queries and keys rotate by the column and the row of their patch; attention is over the
whole tile. After the last norm the class token is dropped, cells of s x s patches become one vector, and an MLP and a
matrix map each to an embedding.
Sources: Meta, 2025, "Llama 4 model card"; Heo et al., 2024, arXiv:2403.13298 (rotation by rows and columns).
Shapes: T patches of a tile, E hidden, P elements of a patch, C cells, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import siglip
from candle_vllm.core.models.canvas_rules import CanvasRule
from candle_vllm.core.models.pixtral import AxialConfig, adjacent
from candle_vllm.core.models.siglip import check_tiles, patch_kernel, prepared
from candle_vllm.core.models.tower_family import Placed, TileRows, TowerFamily, TowerStep
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, Cut, over, stretch_rule

# ---- config ----------------------------------------------------------------------------------------------------------

_EPS = 1e-5  # epsilon of the encoder's norms; transformers does not read it from config.json
_ADAPTER = 4096  # elements of the adapter's vectors in published models; GGUF files do not store them


class Rows(TileRows):
    """A tile's patches, followed by the row of the class token: its pixels are zeros, its row and column -1."""

    @classmethod
    def of(cls, rows: TileRows) -> TileRows:
        """The rows of a tile without windows, with that of the class token."""
        places = np.concatenate([rows.places, np.full((1, 2), -1)])
        return cls(rows.tile, rows.config, places, None, (len(places),))

    def strips(self, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """See `TileRows`."""
        yield from super().strips(most)
        yield np.array([len(self.places) - 1]), np.zeros((1, self.config.patch_size), np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4TowerConfig(AxialConfig):
    """Config of Llama 4's vision encoder; `adapter_size` is the size of a cell's vector in and after the adapter."""

    adapter_size: int

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        return Rows.of(super().read(tile))


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> Llama4TowerConfig:
    """Read `config.json` and `preprocessor_config.json` of Llama 4."""
    vision = fields.section("vision_config")
    vision.choice("hidden_act", "gelu", "gelu")
    rotation = vision.section("rope_parameters")
    rotation.choice("rope_type", "default", "default")
    cell, adapter = cell_of(vision, "pixel_shuffle_ratio"), vision.count("projector_input_dim", _ADAPTER)
    for key, usual in (("projector_output_dim", _ADAPTER), ("vision_output_dim", 7680)):
        if (found := vision.count(key, usual)) != adapter:
            raise InvalidFileError(f"{fields.path}: {key} is {found}; projector_input_dim is {adapter}")
    size, patch = vision.count("hidden_size", 768), vision.count("patch_size", 14)
    inner = vision.count("intermediate_size", 5632)
    if inner != size * cell**2:
        raise InvalidFileError(f"{fields.path}: intermediate_size is {inner}; cells have {size * cell**2} elements")
    return _config(
        over(processor, said),
        hidden_size=size,
        intermediate_size=inner,
        num_layers=vision.count("num_hidden_layers", 34, most=MAX_LAYERS),
        num_heads=vision.count("num_attention_heads", 16),
        norm_eps=_EPS,
        patch=patch,
        side=vision.count("image_size", 448) // patch,
        cell=cell,
        text_size=text_size,
        theta=rotation.get("rope_theta", float, vision.get("rope_theta", float, 1e4)),
        adapter_size=adapter,
    )


def cell_of(fields: Fields, key: str) -> int:
    """The side of a cell in patches; the value of `key` is 1 divided by it."""
    ratio = fields.get(key, float, 0.5)
    cell = round(1 / ratio) if 1 / 64 <= ratio <= 0.5 else 0
    if not cell or 1 / cell != ratio:
        raise InvalidFileError(f"{fields.path}: {key} is {ratio}; it must be one of 1/2, 1/3, ..., 1/64")
    return cell


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> Llama4TowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files of Llama 4, which do not store the adapter's size."""
    tile = fields.count("image_size", most=MAX_TILE)
    processor = over(siglip.processor_of_gguf(fields, {"size": {"height": tile, "width": tile}}), said)
    values: dict[str, Any] = siglip.gguf_values(fields, tile)
    values |= {"norm_eps": fields.get("attention.layer_norm_epsilon", float, _EPS)}
    del values["activation"]
    return _config(processor, **values, text_size=text_size, adapter_size=_ADAPTER)


def _config(processor: Fields, *, patch: int, side: int, cell: int, **values: Any) -> Llama4TowerConfig:
    shared = stretch_rule(Fields({"size": {"height": 336, "width": 336}, **processor.values}, processor.path))
    both = all(processor.get(key, bool, True) for key in ("do_rescale", "do_normalize"))
    rule = CanvasRule(
        tile=shared.tile,
        most=processor.count("max_patches", 16, most=64),
        grows=processor.get("resize_to_max_canvas", bool, False),
        resample=shared.resample,
        normalisation=dataclasses.replace(shared.normalisation, narrow=both),  # transformers computes both in bfloat16
    )
    check_tiles(processor, rule.tile, patch, side, cell)
    count = side**2 + 1
    return Llama4TowerConfig(
        activation="gelu", patch=patch, side=side, cell=cell, rule=rule, learned=count, most_patches=count, **values
    )


# ---- block -----------------------------------------------------------------------------------------------------------


class Block(siglip.Block):
    """One layer: x [T + 1, E] -> [T + 1, E] in fp32."""

    def __init__(self, config: Llama4TowerConfig, tables: Tables, placement: Placement) -> None:
        super().__init__(config, placement)
        self.tables = tables

    def __call__(self, x: Value, step: TowerStep) -> Value:
        turned = Turned(step.places, *self.tables.both)
        x = x + self.output(whole_attention(self.qkv(self.attention_norm(x)), self.heads, step.lengths, turned))
        return x + self.mlp(self.mlp_norm(x))


class Tables:
    """Rotary angles of each patch of a tile and of the class token; one table for the encoder."""

    def __init__(self, config: Llama4TowerConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement

    @functools.cached_property
    def both(self) -> tuple[Value, Value]:
        """cos and sin [T + 1, D / 2] in fp32: pairs that rotate by the column, then pairs that rotate by the row.

        Rows and columns count from 1; the class token does not rotate.
        """
        side, half = self._config.side, self._config.head_dim // 2
        exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
        powers = np.power(self._config.theta, exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1) / powers
        angles = np.arange(1, side + 1, dtype=np.float32)[:, None] * frequencies
        whole = np.concatenate([np.tile(angles, (side, 1)), np.repeat(angles, side, 0)], 1)
        whole = np.concatenate([whole, np.zeros((1, half), np.float32)]).astype(np.float64)
        cos, sin = (self._placement.constant(turn(whole).astype(np.float32)) for turn in (np.cos, np.sin))
        return cos, sin


class Positions:
    """Learned vectors of patches and of the class token [T + 1, E], and the class token's embedding [E]."""

    def __init__(self, config: Llama4TowerConfig, placement: Placement) -> None:
        self.weight = placement.empty(config.learned, config.hidden_size)
        self.token = placement.empty(config.hidden_size)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """What is added to the embedded patches: vectors [n, E]."""
        table = on_host(self.weight)
        found = table[numbers]
        found[numbers == len(table) - 1] += on_host(self.token)
        return found

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight), "token": TensorParameter(self.token)}


# ---- model -----------------------------------------------------------------------------------------------------------


class Llama4Tower:
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: Llama4TowerConfig, placement: Placement) -> None:
        size, wide = config.hidden_size, config.adapter_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement)
        self.positions = Positions(config, placement)
        self.first_norm, self.norm = (LayerNorm(size, config.norm_eps, placement) for _ in range(2))
        tables = Tables(config, placement)
        self.layers = [Block(config, tables, placement) for _ in range(config.num_layers)]
        self.first = Linear(config.cell_size, wide, placement)
        self.second = Linear(wide, wide, placement)
        self.projector = Linear(wide, config.text_size, placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the tables, which follow a tile row by row; the last is the class token's."""
        del first, grid
        numbers = np.where(places[:, 0] < 0, self.config.side**2, places @ (self.config.side, 1))
        return Placed(numbers, self.positions(numbers))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return side_by_side(self.first_norm(step.start + self.patches(patches)))

    def cells(self, hidden: Any) -> Any:
        """See `Tower`; without the class token, if its row is there."""
        return self.config.cells(hidden[: len(hidden) // self.config.cell**2 * self.config.cell**2])

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(activation(self.second(activation(self.first(cells), "gelu")), "gelu"))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _names() -> Iterator[WeightName]:
    """SigLIP's table without patches and positions, with the names of Llama 4's checkpoints."""
    renamed = {
        "vision_model.encoder.": "vision_model.model.",
        "layer_norm1": "input_layernorm",
        "layer_norm2": "post_attention_layernorm",
        "out_proj": "o_proj",
        "post_layernorm": "layernorm_post",
    }
    for line in siglip.names("vision_model"):
        name = str(line.hf)
        for old, new in renamed.items():
            name = name.replace(old, new)
        view = adjacent if ":q." in line.target or ":k." in line.target else None
        gguf = str(line.gguf)
        if not line.target.startswith(("patches:", "positions:")):
            newer = gguf.replace(".ln2.", ".attn_post_norm.")  # by llama.cpp's converter of 2026
            both = gguf if gguf == newer else (gguf, newer)
            yield dataclasses.replace(line, hf=name, gguf=both, hf_view=view, gguf_view=view)


_AT, _MLP = "vision_model.", "vision_model.vision_adapter.mlp."
WEIGHTS: Sequence[WeightName] = (
    *_names(),
    WeightName("patches:weight", _AT + "patch_embedding.linear.weight", "v.patch_embd.weight", gguf_view=patch_kernel),
    WeightName("positions:weight", _AT + "positional_embedding_vlm", "v.position_embd.weight"),
    WeightName("positions:token", _AT + "class_embedding", "v.class_embd"),
    *(
        WeightName(f"first_norm:{kind}", f"{_AT}layernorm_pre.{kind}", f"v.pre_ln.{kind}")
        for kind in ("weight", "bias")
    ),
    WeightName("first:weight", _MLP + "fc1.weight", "mm.model.mlp.1.weight"),
    WeightName("second:weight", _MLP + "fc2.weight", "mm.model.mlp.2.weight"),
    WeightName("projector:weight", "multi_modal_projector.linear_1.weight", "mm.model.fc.weight"),
)


# ---- words -----------------------------------------------------------------------------------------------------------

_ASKS, _MARK = "<|image|>", "<|patch|>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: the tiles of its grid, row by row, followed by the tile of the whole image."""
    tile = _MARK * math.prod(grid)
    row = "<|tile_x_separator|>".join([tile] * cut.columns) + "<|tile_y_separator|>"
    return f"<|image_start|>{row * cut.rows}{_ASKS}{tile}<|image_end|>"


FAMILY = TowerFamily(
    name="llama4_tower",
    hf={"Llama4ForConditionalGeneration": "llama4"},
    gguf=("llama4",),
    settings=("max_patches", "resize_to_max_canvas"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=Llama4Tower,
    weights=WEIGHTS,
    mark=_MARK,
    asks=_ASKS,
    words_around=words_around,
)
