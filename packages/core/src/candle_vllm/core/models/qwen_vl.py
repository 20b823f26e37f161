# SPDX-License-Identifier: MIT
"""The vision encoders of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and Qwen4, with their projection to the text model.

Each block is x + attention(norm(x)), then x + mlp(norm(x)); queries and keys rotate by the row and the column of
their patch. Attention is over the whole image, in most layers of Qwen2.5-VL over a window of it.
After the last norm, cells of 2 x 2 patches become one vector, which two matrices project to an embedding.
Images keep their own size, in multiples of a cell. For the patch kernels a still image is two equal frames.
Qwen3-VL also has learned positions, of a grid that is interpolated to the image's grid. It projects the outputs of some
layers to embeddings too, which are added to the hidden states after the text model's first layers (DeepStack).
The vision encoder of Qwen3.5 (3.6, 3.8) and Qwen4 is Qwen3-VL's without DeepStack.
Source: Wang et al., 2024, arXiv:2409.12191; Bai et al., 2025, arXiv:2502.13923 and arXiv:2511.21631.
Shapes: T patches, E hidden, P elements of a patch, C cells, D head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP, GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, write_rows
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.views import computed, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.grid_positions import GridPositions, linear
from candle_vllm.core.models.siglip import ACTIVATIONS, require_true
from candle_vllm.core.models.siglip import prepared as swapped_back
from candle_vllm.core.models.tower_family import (
    Placed,
    TowerConfig,
    TowerFamily,
    TowerStep,
    mark_of_cells,
    turned_by_grid,
)
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, AreaRule, area_rule, over

# ---- config ----------------------------------------------------------------------------------------------------------

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"quick_gelu": "quick_gelu", **ACTIVATIONS})
FRAMES = 2  # frames of a patch
_EPS = 1e-6
_MOST_HEAD = 1024  # elements of a head
MOST_PATCHES, MOST_ASKED = 1 << 14, 1 << 16
"""Maximum number of patches of an image: the default limit, and the maximum of an operator's limit. Published settings
allow the second, but attention over this number of patches takes minutes on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenTowerConfig(TowerConfig):
    """Config of these vision encoders; with gated MLPs (Qwen2.5-VL) the norms of layers and the last norm are RMS.

    Attributes:
        theta: rotary base.
        kv_heads: heads of keys and values if they are fewer than those of queries (`exaone4_5_tower.py`); 0 otherwise.
    """

    theta: float = 10000.0
    kv_heads: int = 0

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        super().__post_init__()
        if (size := self.head_dim) % 4 or size > _MOST_HEAD:
            raise InvalidFileError(
                f"vision encoder: head size {size} must be a multiple of 4, and at most {_MOST_HEAD}"
            )


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> QwenTowerConfig:
    """Read `config.json` and `preprocessor_config.json` of all these families."""
    vision, named = fields.section("vision_config"), fields.get("architectures", list)[0]
    third = named.startswith(("Qwen3", "Qwen4"))
    patch, cell = vision.count("patch_size", 16 if third else 14), vision.count("spatial_merge_size", 2, most=64)
    check_sizes(vision, processor, patch, cell, temporal_patch_size=FRAMES)
    layers = vision.count("depth", 27 if third else 32, most=MAX_LAYERS)
    if third:
        usual = [8, 16, 24] if named.startswith("Qwen3VL") else []
        own: dict[str, Any] = {
            "hidden_size": vision.count("hidden_size", 1152),
            "intermediate_size": vision.count("intermediate_size", 4304),
            "activation": _ACTIVATIONS[vision.choice("hidden_act", "gelu_pytorch_tanh", *_ACTIVATIONS)],
            "learned": math.isqrt(vision.count("num_position_embeddings", 2304, most=MOST_PATCHES)),
            "deep": _deep(vision.get("deepstack_visual_indexes", list, usual), layers, vision),
        }
    elif named in ("Qwen2_5_VLForConditionalGeneration", "Exaone4_5_ForConditionalGeneration"):
        vision.choice("hidden_act", "silu", "silu")
        size = vision.count("hidden_size", 3584)
        own = {
            "hidden_size": size,
            "intermediate_size": vision.count("intermediate_size", 3420),
            "activation": "gelu",  # activation between the projection's matrices
            "gated": True,
            **_windows(vision, layers, patch * cell),
        }
    else:
        size = vision.count("embed_dim", 1280)
        own = {
            "hidden_size": size,
            "intermediate_size": int(size * vision.get("mlp_ratio", float, 4.0)),
            "activation": _ACTIVATIONS[vision.choice("hidden_act", "quick_gelu", *_ACTIVATIONS)],
        }
    return _config(
        **own,
        num_layers=layers,
        num_heads=vision.count("num_heads", 16),
        patch=patch,
        cell=cell,
        text_size=text_size,
        rule=rule_of(processor, patch, cell, said),
    )


def check_sizes(vision: Fields, processor: Fields, patch: int, cell: int, *, frames: int = FRAMES, **more: int) -> None:
    """Refuse sizes in `vision_config` that are not implemented, and a processor with other sizes than the encoder."""
    for name, known in {"patch_size": patch, "merge_size": cell, "temporal_patch_size": frames}.items():
        if processor.count(name, known) != known:
            raise InvalidFileError(f"{processor.path}: {name} is {processor.count(name)}; the tower's is {known}")
    for name, known in {"in_channels": 3, "in_chans": 3, **more}.items():
        if vision.count(name, known) != known:
            raise UnsupportedModelError(
                f"{vision.path}: vision_config.{name} is {vision.count(name)}; implemented: {known}"
            )


def _deep(layers: list[Any], count: int, vision: Fields) -> tuple[int, ...]:
    """Check the layers whose outputs become further embeddings; `count` is the number of all layers."""
    if not all(isinstance(each, int) and 0 <= each < count for each in layers) or layers != sorted(set(layers)):
        raise InvalidFileError(
            f"{vision.path}: vision_config.deepstack_visual_indexes is {layers!r:.80}, not some of {count} layers in "
            "their order"
        )
    return tuple(layers)


def _windows(vision: Fields, layers: int, pixels: int) -> dict[str, Any]:
    """The side of a window in cells of `pixels` x `pixels`, and the layers with windows."""
    side, whole = vision.count("window_size", 112), vision.get("fullatt_block_indexes", list, [7, 15, 23, 31])
    if side < pixels:
        raise InvalidFileError(f"{vision.path}: vision_config.window_size is {side}; a cell has sides of {pixels}")
    if not all(isinstance(layer, int) for layer in whole):
        raise InvalidFileError(f"{vision.path}: vision_config.fullatt_block_indexes is {whole!r:.80}, not layers")
    return {"window": side // pixels, "windowed": frozenset(range(layers)) - frozenset(whole)}


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> QwenTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files of these models; keys begin with `clip.vision.`."""
    whole = Fields(fields.values, fields.path)
    kind = whole.get("clip.projector_type", str, fields.get("projector_type", str, ""))
    patch, cell = fields.count("patch_size"), fields.count("spatial_merge_size", 2, most=64)
    size, layers = fields.count("embedding_length"), fields.count("block_count", most=MAX_LAYERS)
    inner = fields.get("feed_forward_length", int, 0)
    processor = {
        "min_pixels": fields.count("image_min_pixels", 256**2 if kind == "qwen3vl_merger" else 56**2),
        "max_pixels": fields.count("image_max_pixels", MOST_PATCHES * patch**2),
        **{f"image_{key}": fields.values[f"{fields.prefix}image_{key}"] for key in ("mean", "std")
           if f"image_{key}" in fields},
    }  # fmt: skip
    if kind == "qwen3vl_merger":
        require_true(fields, "clip.use_gelu")
        deep = [at for at, whether in enumerate(fields.get("is_deepstack_layers", list, [])) if whether]
        own: dict[str, Any] = {
            "activation": "gelu_tanh",
            "learned": fields.count("image_size") // patch,
            "deep": _deep(deep, layers, fields),
        }
    elif kind == "qwen2.5vl_merger":
        require_true(fields, "clip.use_silu")
        every = fields.get("n_wa_pattern", int, 0)
        windows = {"window_size": fields.count("window_size", 112)}
        full = [layer for layer in range(layers) if every <= 0 or (layer + 1) % every == 0]
        own = {
            "activation": "gelu",
            "gated": True,
            **_windows(Fields(windows | {"fullatt_block_indexes": full}, fields.path), layers, patch * cell),
        }
    else:
        own = {"activation": "gelu" if whole.get("clip.use_gelu", bool, False) else "quick_gelu"}
        inner = inner or 4 * size  # older files have 0
    if inner < 1:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}feed_forward_length is {inner}")
    return _config(
        **own,
        hidden_size=size,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=fields.count("attention.head_count"),
        patch=patch,
        cell=cell,
        text_size=text_size,
        rule=rule_of(Fields(processor, fields.path), patch, cell, said),
    )


def rule_of(processor: Fields, patch: int, cell: int, said: Mapping[str, Any], most: int = MOST_PATCHES) -> AreaRule:
    """How images are resized; an operator's area limits, as pixels or as edges of `size`, override the file's.

    `most` is the maximum number of patches without an operator's limit.
    """
    size = said.get("size", NOTHING)
    named = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    asked = {name: said.get(name, size.get(edge)) for name, edge in named if name in said or edge in size}
    fields, most = over(processor, asked), most * patch**2
    if "max_pixels" in asked:
        most = MOST_ASKED * patch**2
        fields.count("max_pixels", most=most)
    return area_rule(fields, patch * cell, most=most)


def _config(*, rule: AreaRule, patch: int, cell: int, **own: Any) -> QwenTowerConfig:
    most: dict[str, Any] = {"side": rule.longest // patch, "most_patches": rule.most_cells * cell**2}
    return QwenTowerConfig(**own, **most, norm_eps=_EPS, patch=patch, cell=cell, rule=rule)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Merge the kernels of both frames, correct swapped names of up and down, and number DeepStack's mergers from 0."""
    first, second = "v.patch_embd.weight", "v.patch_embd.weight.1"
    found = dict(swapped_back(tensors, config))
    if first in found and second in found and found[first].shape == found[second].shape:
        one, other = found[first], found.pop(second)
        found[first] = computed(one, one.shape, lambda values: values + other.load("F32"), "F32")
    for number, layer in enumerate(config.deep):  # a number is never above its layer's, so no tensor is overwritten
        for name in [name for name in found if name.startswith(f"v.deepstack.{layer}.")]:
            right = name.replace(f".{layer}.", f".{number}.", 1)
            found[right] = dataclasses.replace(found.pop(name), name=right)
    return found


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: QwenTowerConfig, layer: int, tables: tuple[Value, Value], placement: Placement) -> None:
        size, inner, norm = config.hidden_size, config.intermediate_size, RMSNorm if config.gated else LayerNorm
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        kv_size = self.kv_heads * config.head_dim
        self.windowed = layer in config.windowed
        self.tables = tables
        self.attention_norm = norm(size, config.norm_eps, placement)
        self.qkv = Linear(size, {"q": size, "k": kv_size, "v": kv_size}, placement, bias=True)
        self.output = Linear(size, size, placement, bias=True)
        self.mlp_norm = norm(size, config.norm_eps, placement)
        if config.gated:
            self.mlp = GatedMLP(size, inner, placement, bias=True)
        else:
            self.mlp = MLP(size, inner, placement, activation=config.activation)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        lengths = step.windows if self.windowed else step.lengths
        turned, qkv = Turned(step.places, *self.tables), self.qkv(self.attention_norm(x))
        x = x + self.output(whole_attention(qkv, self.heads, lengths, turned, kv_heads=self.kv_heads))
        return x + self.mlp(self.mlp_norm(x))


# ---- model -----------------------------------------------------------------------------------------------------------


class Merger:
    """DeepStack: cells [C, cell size] of a layer's output, with patches side by side, to embeddings [C, text size]."""

    def __init__(self, config: QwenTowerConfig, placement: Placement) -> None:
        joined = config.cell_size
        self.norm = LayerNorm(joined, config.norm_eps, placement)
        self.first = Linear(joined, joined, placement, bias=True)
        self.second = Linear(joined, config.text_size, placement, bias=True)

    def __call__(self, cells: Value) -> Value:
        return self.second(activation(self.first(self.norm(cells)), "gelu"))


class QwenTower:
    """The vision encoder: patches of an image to embeddings; see `Tower`."""

    def __init__(self, config: QwenTowerConfig, placement: Placement) -> None:
        size, joined = config.hidden_size, config.cell_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=bool(config.learned))
        self.positions = GridPositions(config.learned, size, placement, linear) if config.learned else None
        empty = np.zeros((config.most_patches, config.head_dim // 2), np.float32)
        self._tables = placement.constant(empty), placement.constant(empty.copy())  # filled by `place`
        self.layers: Sequence[Callable[[Value, TowerStep], Value]] = [
            Block(config, layer, self._tables, placement) for layer in range(config.num_layers)
        ]
        self.norm: Callable[[Value], Value] = (RMSNorm if config.gated else LayerNorm)(size, config.norm_eps, placement)
        self.joined = Linear(joined, joined, placement, bias=True)
        self.projector = Linear(joined, config.text_size, placement, bias=True)
        self.mergers = [Merger(config, placement) for _ in config.deep]

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the tables."""
        angles = self.angles(places)
        for table, function in zip(self._tables, (np.cos, np.sin)):
            write_rows(table, first, function(angles.astype(np.float64)).astype(np.float32))
        start = None if self.positions is None else self.positions(places, grid)
        return Placed(np.arange(first, first + len(places)), start)

    def angles(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rotary angles [n, D/2] of patches: the first half is by the row, the second by the column."""
        quarter = self._tables[0].shape[1] // 2
        frequencies = np.float32(1) / np.float32(self.config.theta) ** (np.arange(quarter, dtype=np.float32) / quarter)
        return (places[:, :, None].astype(np.float32) * frequencies.astype(np.float32)).reshape(len(places), -1)

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        x = self.patches(patches)
        return x if step.start is None else step.start + x

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(activation(self.joined(cells), "gelu"))


# ---- weight names ----------------------------------------------------------------------------------------------------


def kernel(stored: StoredTensor, config: Any) -> StoredTensor:
    """The kernels of a convolution over both frames [E, 3, 2, h, w], or their sum, as a matrix [E, 3 * h * w]."""
    side, shape = config.patch, (stored.shape[0], config.patch_size)
    if stored.shape[1:] == (3, FRAMES, side, side):
        return computed(stored, shape, lambda values: values.sum(2, dtype=np.float32).reshape(shape), "F32")
    if stored.shape[1:] == (3, side, side):
        return computed(stored, shape, lambda values: values.reshape(shape), "F32")
    return stored  # the loader reports the wrong shape


_AT, _LAYER, _BLOCK = "visual.", "visual.blocks.{i}.", "v.blk.{i}."
_MERGER = "visual.deepstack_merger_list.{i}."
_DOWN = ("fc2", "down_proj", "linear_fc2")
_KINDS = ("weight", "bias")


def _pair(target: str, hf: Sequence[str], gguf: str) -> list[WeightName]:
    return [WeightName(f"{target}{kind}", tuple(f"{name}.{kind}" for name in hf), f"{gguf}.{kind}") for kind in _KINDS]


def _of_qkv(number: int, part: str) -> list[WeightName]:
    third = row_part(number, 3)
    return [
        WeightName(
            f"layers.{{i}}.qkv:{part}.{kind}",
            Seen(f"{_LAYER}attn.qkv.{kind}", third),
            (f"{_BLOCK}attn_{part}.{kind}", Seen(f"{_BLOCK}attn_qkv.{kind}", third)),
        )
        for kind in _KINDS
    ]


WEIGHTS: Sequence[WeightName] = (
    WeightName(
        "patches:weight", _AT + "patch_embed.proj.weight", "v.patch_embd.weight", hf_view=kernel, gguf_view=kernel
    ),
    WeightName("patches:bias", _AT + "patch_embed.proj.bias", "v.patch_embd.bias"),
    WeightName("positions:weight", _AT + "pos_embed.weight", "v.position_embd.weight"),
    *_pair("layers.{i}.attention_norm:", [_LAYER + "norm1"], _BLOCK + "ln1"),
    *(line for number, part in enumerate("qkv") for line in _of_qkv(number, part)),
    *_pair("layers.{i}.output:", [_LAYER + "attn.proj"], _BLOCK + "attn_out"),
    *_pair("layers.{i}.mlp_norm:", [_LAYER + "norm2"], _BLOCK + "ln2"),
    *_pair("layers.{i}.mlp.up:", [_LAYER + "mlp.fc1", _LAYER + "mlp.linear_fc1"], _BLOCK + "ffn_up"),
    *_pair("layers.{i}.mlp.gate_up:gate.", [_LAYER + "mlp.gate_proj"], _BLOCK + "ffn_gate"),
    *_pair("layers.{i}.mlp.gate_up:up.", [_LAYER + "mlp.up_proj"], _BLOCK + "ffn_up"),
    *_pair("layers.{i}.mlp.down:", [_LAYER + f"mlp.{name}" for name in _DOWN], _BLOCK + "ffn_down"),
    *_pair("norm:", [_AT + "merger.ln_q", _AT + "merger.norm"], "v.post_ln"),
    *_pair("joined:", [_AT + "merger.mlp.0", _AT + "merger.linear_fc1"], "mm.0"),
    *_pair("projector:", [_AT + "merger.mlp.2", _AT + "merger.linear_fc2"], "mm.2"),
    *_pair("mergers.{i}.norm:", [_MERGER + "norm"], "v.deepstack.{i}.norm"),
    *_pair("mergers.{i}.first:", [_MERGER + "linear_fc1"], "v.deepstack.{i}.fc1"),
    *_pair("mergers.{i}.second:", [_MERGER + "linear_fc2"], "v.deepstack.{i}.fc2"),
)


# ---- words -----------------------------------------------------------------------------------------------------------

_MARK = "<|image_pad|>"


FAMILY = TowerFamily(
    name="qwen_vl",
    hf={
        "Qwen2VLForConditionalGeneration": "qwen2_vl",
        "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
        "Qwen3VLForConditionalGeneration": "qwen3_vl",
        "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
        "Qwen3_5ForConditionalGeneration": "qwen3_5",
        "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
        "Qwen4ExpForConditionalGeneration": "qwen4_exp",
    },
    gguf=("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger"),
    settings=("min_pixels", "max_pixels", "size.shortest_edge", "size.longest_edge"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=QwenTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"<|vision_start|>{_MARK}<|vision_end|>",
    words_around=mark_of_cells(_MARK),
    turned=turned_by_grid,
)
