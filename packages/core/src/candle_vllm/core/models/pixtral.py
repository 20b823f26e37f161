# SPDX-License-Identifier: MIT
"""Pixtral's vision encoder, with the projectors of Mistral 3 and LLaVA to embeddings of the text model.

An image is one tile of whole cells, up to a longest side. Each block is x + attention(norm(x)), then x + mlp(norm(x)),
where queries and keys rotate by the row and the column of their patch; attention is over the whole image. Mistral 3
normalises the output, merges the patches of each cell by a matrix product, and projects cells; LLaVA projects patches.
Sources: Agrawal et al., 2024, arXiv:2410.07073; Liu et al., 2023, arXiv:2310.03744 (LLaVA's projector). Shapes: T
patches, E hidden, P elements of a patch, C cells, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.siglip import ACTIVATIONS, MOST_PATCHES, gguf_sizes, patch_kernel
from candle_vllm.core.models.tower_family import Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.models.towers import DEFAULTS
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, fit_rule, over

# ---- config ----------------------------------------------------------------------------------------------------------

_EPS = 1e-5  # epsilon of the encoder's norms, which config.json leaves out


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxialConfig(TowerConfig):
    """Config of a vision encoder whose heads rotate by row and column; `theta` is the base of the rotary embedding."""

    theta: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise InvalidFileError(f"vision encoder: head size {self.head_dim} must be a multiple of 4")
        if not self.theta > 0:
            raise InvalidFileError(f"vision encoder: rope_theta is {self.theta}; it must be above 0")

    @property
    def head_dim(self) -> int:
        """Elements of a head (D)."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixtralConfig(AxialConfig):
    """Config of Pixtral's vision encoder and its projectors.

    Attributes:
        merged_eps: epsilon of the norm before cells are merged (Mistral 3); None if patches are projected directly.
        projector_bias: both matrices of the projector have biases.
        projector_activation: activation between these matrices.
    """

    merged_eps: float | None = None
    projector_bias: bool = False
    projector_activation: Activation = "gelu"


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> PixtralConfig:
    """Read `config.json` and `preprocessor_config.json` of Mistral 3, and of LLaVA with Pixtral's vision encoder."""
    name = fields.get("architectures", list)[0]
    merges = name == "Mistral3ForConditionalGeneration"
    vision = fields.section("vision_config")
    vision.choice("hidden_act", "gelu", "silu")
    rotation = vision.section("rope_parameters")
    layers = vision.count("num_hidden_layers", 24, most=MAX_LAYERS)
    last = fields.values.get("vision_feature_layer", -1 if merges else -2)
    if last not in (-1, [-1], layers, [layers]):
        raise UnsupportedModelError(f"{fields.path}: vision_feature_layer is {last!r:.40}; implemented: -1, the last")
    if not merges:
        fields.choice("vision_feature_select_strategy", "default", "full")
    patch, cell = vision.count("patch_size", 16), fields.count("spatial_merge_size", 2, most=64) if merges else 1
    rotation.choice("rope_type", "axial", "axial", "default")
    text = fields.section("text_config")
    usual = DEFAULTS.get(text.get("model_type", str, "mistral"), DEFAULTS["mistral"])
    return _config(
        over(processor, said),
        hidden_size=vision.count("hidden_size", 1024),
        intermediate_size=vision.count("intermediate_size", 4096),
        num_layers=layers,
        num_heads=vision.count("num_attention_heads", 16),
        norm_eps=_EPS,
        patch=patch,
        cell=cell,
        text_size=text_size,
        theta=rotation.get("rope_theta", float, vision.get("rope_theta", float, 1e4)),
        merged_eps=text.get("rms_norm_eps", float, usual["rms_norm_eps"]) if merges else None,
        projector_bias=fields.get("multimodal_projector_bias", bool, not merges),
        projector_activation=ACTIVATIONS[fields.choice("projector_hidden_act", "gelu", *ACTIVATIONS)],
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> PixtralConfig:
    """Read the metadata of llama.cpp's `mmproj` files of Pixtral and Mistral 3; keys begin with `clip.`."""
    if not Fields(fields.values, fields.path).get("clip.use_silu", bool, False):
        raise UnsupportedModelError(f"{fields.path}: clip.use_silu is not true; implemented: true")
    cell = fields.count("spatial_merge_size", 1, most=64)
    values = gguf_sizes(fields, _EPS)
    numbers = {key: fields.get(key, list) for key in ("image_mean", "image_std")}
    processor = {"size": {"longest_edge": fields.count("image_size")}, **numbers}
    return _config(
        over(Fields(processor, fields.path), said),
        **values,
        cell=cell,
        text_size=text_size,
        merged_eps=values["norm_eps"] if cell > 1 else None,
        projector_bias=cell == 1,
    )


def _config(processor: Fields, *, patch: int, cell: int, **values: Any) -> PixtralConfig:
    rule = fit_rule(processor, patch, patch * cell)
    side = -(-rule.longest // rule.cell) * cell
    if side * side > MOST_PATCHES:
        raise InvalidFileError(
            f"{processor.path}: images with a longest side of {rule.longest} pixels may have more than {MOST_PATCHES} "
            f"patches of {patch} x {patch} pixels"
        )
    return PixtralConfig(activation="gelu", gated=True, patch=patch, side=side, cell=cell, rule=rule, **values)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """The tensors without the embedding of [IMG_BREAK], which the text model has too."""
    del config
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("v.token_embd.")}


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: PixtralConfig, tables: Tables, placement: Placement) -> None:
        size = config.hidden_size
        self.heads, self.tables = config.num_heads, tables
        self.attention_norm = RMSNorm(size, config.norm_eps, placement)
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement)
        self.output = Linear(size, size, placement)
        self.mlp_norm = RMSNorm(size, config.norm_eps, placement)
        self.mlp = GatedMLP(size, config.intermediate_size, placement)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        turned = Turned(step.places, *self.tables.both)
        x = x + self.output(whole_attention(self.qkv(self.attention_norm(x)), self.heads, step.lengths, turned))
        return x + self.mlp(self.mlp_norm(x))


class Tables:
    """Rotary angles of each position in the largest image; one table for the encoder, computed at its first use."""

    def __init__(self, config: PixtralConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement

    @functools.cached_property
    def both(self) -> tuple[Value, Value]:
        """cos and sin [side * side, D / 2] in fp32: pairs that rotate by the row, then pairs that rotate by the column.

        Rows and columns use the frequencies of D / 2 pairs alternately.
        """
        side, dim = self._config.side, self._config.head_dim
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = (1 / np.power(self._config.theta, exponents.astype(np.float64)).astype(np.float32)).astype(
            np.float32
        )
        places = np.arange(side, dtype=np.float32)[:, None]
        rows, columns = places * frequencies[::2], places * frequencies[1::2]
        angles = np.concatenate([np.repeat(rows, side, 0), np.tile(columns, (side, 1))], 1).astype(np.float64)
        cos, sin = (self._placement.constant(turn(angles).astype(np.float32)) for turn in (np.cos, np.sin))
        return cos, sin


# ---- model -----------------------------------------------------------------------------------------------------------


class Pixtral:
    """The vision encoder: patches of images to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: PixtralConfig, placement: Placement) -> None:
        size, text, bias = config.hidden_size, config.text_size, config.projector_bias
        self.config = config
        self.patches = Linear(config.patch_size, size, placement)
        self.first_norm = RMSNorm(size, config.norm_eps, placement)
        tables = Tables(config, placement)
        self.layers = [Block(config, tables, placement) for _ in range(config.num_layers)]
        self.merged_norm = self.merger = None
        if config.merged_eps is not None:
            self.merged_norm = RMSNorm(size, config.merged_eps, placement)
            self.merger = Linear(config.cell_size, size, placement)
        self.first = Linear(size, text, placement, bias=bias)
        self.second = Linear(text, text, placement, bias=bias)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns row numbers of the tables, which list the largest image's positions row by row."""
        del first, grid
        return Placed(places @ (self.config.side, 1))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        del step
        return side_by_side(self.first_norm(self.patches(patches)))

    def norm(self, x: Value) -> Value:
        """See `Tower`; the norm before cells are merged, because this encoder has no last norm."""
        return x if self.merged_norm is None else self.merged_norm(x)

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        x = cells if self.merger is None else self.merger(cells)
        return self.second(activation(self.first(x), self.config.projector_activation))


# ---- weight names ----------------------------------------------------------------------------------------------------


def adjacent(stored: StoredTensor, config: Any) -> StoredTensor:
    """Rows of queries or keys reordered from interleaved rotary pairs to half-split order."""
    if stored.shape[:1] != (config.hidden_size,):
        return stored  # the loader reports the wrong shape
    heads = np.arange(config.hidden_size).reshape(config.num_heads, -1, 2)
    return stored.select(heads.swapaxes(1, 2).reshape(-1))


def _cells(stored: StoredTensor, config: Any) -> StoredTensor:
    """The matrix that merges cells: columns [channel, patch] reordered to [patch, channel]."""
    if stored.shape != (config.hidden_size, config.cell_size):
        return stored  # the loader reports the wrong shape
    parts = (config.hidden_size, config.hidden_size, config.cell**2)
    return computed(stored, stored.shape, lambda values: values.reshape(parts).swapaxes(1, 2).reshape(stored.shape))


_AT, _LAYER, _BLOCK = "vision_tower.", "vision_tower.transformer.layers.{i}.", "v.blk.{i}."
_TO = "multi_modal_projector."


def _line(target: str, hf: str, gguf: str, **views: Any) -> WeightName:
    return WeightName(f"{target}weight", f"{hf}.weight", f"{gguf}.weight", **views)


WEIGHTS: Sequence[WeightName] = (
    _line("patches:", _AT + "patch_conv", "v.patch_embd", hf_view=patch_kernel, gguf_view=patch_kernel),
    _line("first_norm:", _AT + "ln_pre", "v.pre_ln"),
    _line("layers.{i}.attention_norm:", _LAYER + "attention_norm", _BLOCK + "ln1"),
    _line("layers.{i}.qkv:q.", _LAYER + "attention.q_proj", _BLOCK + "attn_q", gguf_view=adjacent),
    _line("layers.{i}.qkv:k.", _LAYER + "attention.k_proj", _BLOCK + "attn_k", gguf_view=adjacent),
    _line("layers.{i}.qkv:v.", _LAYER + "attention.v_proj", _BLOCK + "attn_v"),
    _line("layers.{i}.output:", _LAYER + "attention.o_proj", _BLOCK + "attn_out"),
    _line("layers.{i}.mlp_norm:", _LAYER + "ffn_norm", _BLOCK + "ln2"),
    _line("layers.{i}.mlp.gate_up:gate.", _LAYER + "feed_forward.gate_proj", _BLOCK + "ffn_gate"),
    _line("layers.{i}.mlp.gate_up:up.", _LAYER + "feed_forward.up_proj", _BLOCK + "ffn_up"),
    _line("layers.{i}.mlp.down:", _LAYER + "feed_forward.down_proj", _BLOCK + "ffn_down"),
    _line("merged_norm:", _TO + "norm", "mm.input_norm"),
    _line("merger:", _TO + "patch_merger.merging_layer", "mm.patch_merger", hf_view=_cells, gguf_view=_cells),
    _line("first:", _TO + "linear_1", "mm.1"),
    WeightName("first:bias", _TO + "linear_1.bias", "mm.1.bias"),
    _line("second:", _TO + "linear_2", "mm.2"),
    WeightName("second:bias", _TO + "linear_2.bias", "mm.2.bias"),
)


# ---- words -----------------------------------------------------------------------------------------------------------

_MARK = "[IMG]"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image in a prompt: a mark per cell, [IMG_BREAK] between rows, [IMG_END] at the end."""
    del cut
    rows, columns = grid
    return "[IMG_BREAK]".join([_MARK * columns] * rows) + "[IMG_END]"


FAMILY = TowerFamily(
    name="pixtral",
    hf={"Mistral3ForConditionalGeneration": "mistral3", "LlavaForConditionalGeneration": "llava"},
    seen=("pixtral",),
    gguf=("pixtral",),
    settings=("size.longest_edge",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=Pixtral,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=words_around,
)
