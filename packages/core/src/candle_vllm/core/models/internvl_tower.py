# SPDX-License-Identifier: MIT
"""The vision encoder of InternVL 2 to 3.5 (InternViT) and Qianfan-OCR, with its projection to the text model.

Each block is x + scale * attention(norm(x)), then x + scale * mlp(norm(x)), with a learned scale of each element.
Attention is over a tile's patches and a class token, which is dropped after the last block. Cells of s x s patches
become one vector, which a norm and two matrices map to an embedding. The encoder of 6 billion parameters has RMS norms,
also of queries and keys.
Sources: Chen et al., 2024, arXiv:2312.14238 and arXiv:2412.05271; Dong et al., 2026, arXiv:2603.13398.
Shapes: T patches of a tile, E hidden, C cells.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models import siglip
from candle_vllm.core.models.canvas_rules import RatioRule
from candle_vllm.core.models.internvl_tensors import WEIGHTS, prepared
from candle_vllm.core.models.llama4_tower import Rows, cell_of
from candle_vllm.core.models.siglip import check_tiles
from candle_vllm.core.models.tower_family import Placed, TileRows, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, Cut, over, stretch_rule

# ---- config ----------------------------------------------------------------------------------------------------------

_ORIGINAL = "InternVLChatModel"  # the class of the original repositories
_QIANFAN = "QianfanOCRForConditionalGeneration"
_QIANFAN_VIT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6,
}  # fmt: skip
"""Defaults of transformers' `QianfanOCRVisionConfig`."""
_CLIP_PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_TILES = MappingProxyType({"min": 1, "max": 12})
_ONLY = MappingProxyType(
    {
        "vision_feature_layer": -1, "select_layer": -1, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "use_thumbnail": True, "use_absolute_position_embeddings": True,
        "use_mean_pooling": True, "hidden_act": "gelu",
    }
)  # fmt: skip
"""Keys of both formats of which one value is implemented, which is also the default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVLTowerConfig(TowerConfig):
    """Config of this vision encoder.

    Attributes:
        rms: the norms of blocks are RMS norms; otherwise layer norms.
        head_norms: queries and keys are normalised, all heads together.
        qkv_bias: the projection to queries, keys and values has a bias.
    """

    rms: bool = False
    head_norms: bool = False
    qkv_bias: bool = True

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        return Rows.of(super().read(tile))

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds vectors within the projection, and with head norms copies of q, k and v."""
        more = 256 * 4 * 3 * self.text_size + (4 * self.patches * 6 * self.hidden_size if self.head_norms else 0)
        return super().step_bytes(threads) + more


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> InternVLTowerConfig:
    """Read `config.json` and `preprocessor_config.json`, in the format of transformers or in the original format."""
    vision, name = fields.section("vision_config"), fields.get("architectures", list)[0]
    original = name == _ORIGINAL
    images = {"resample": 3, **_CLIP_PIXELS, **processor.values, "crop_to_patches": True}
    if name == _QIANFAN:
        fields.choice("ps_version", "v2", "v2")
        vision = vision.with_defaults(**_QIANFAN_VIT, use_qk_norm=vision.get("qk_normalization", bool, False))
        vision = vision.with_defaults(attention_bias=vision.get("qkv_bias", bool, True))
        if isinstance(size := images.get("size"), int):  # as CLIP's processor has it, whose crops are not read
            images |= {"size": {"height": size, "width": size}, "do_center_crop": False}
    if original:
        fields.choice("ps_version", "v1", "v2")
        images = _images(fields, vision, processor)
    for part, (key, only) in itertools.product((fields, vision), _ONLY.items()):
        if (found := part.values.get(key, only)) != only:
            raise UnsupportedModelError(f"{fields.path}: {key} is {found!r:.40}; implemented: {only}")
    patch = _side(vision, "patch_size")
    return _config(
        over(Fields(images, processor.path), said),
        hidden_size=vision.count("hidden_size"),
        intermediate_size=vision.count("intermediate_size"),
        num_layers=vision.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=vision.count("num_attention_heads"),
        norm_eps=vision.get("layer_norm_eps", float),
        patch=patch,
        side=_side(vision, "image_size") // patch,
        cell=cell_of(fields, "downsample_ratio"),
        text_size=text_size,
        rms=vision.choice("norm_type", "layer_norm", "layer_norm", "rms_norm") == "rms_norm",
        head_norms=vision.get("qk_normalization" if original else "use_qk_norm", bool),
        qkv_bias=vision.get("qkv_bias" if original else "attention_bias", bool),
    )


def _images(fields: Fields, vision: Fields, processor: Fields) -> dict[str, Any]:
    """Settings of transformers' processor for the original format, where config.json has all but mean and std."""
    tile = fields.count("force_image_size", _side(vision, "image_size"))
    images: dict[str, Any] = {name: processor.get(name, list) for name in ("image_mean", "image_std")}
    images |= {f"{which}_patches": fields.count(f"{which}_dynamic_patch", usual) for which, usual in _TILES.items()}
    size = {"height": tile, "width": tile}
    return {"resample": 3, "size": size, "crop_to_patches": fields.get("dynamic_image_size", bool), **images}


def _side(fields: Fields, key: str) -> int:
    """The side of a square, which a config has as a number or as two equal numbers."""
    value = fields.values.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        fields = Fields({key: value[0]}, fields.path)
    return fields.count(key, most=MAX_TILE)


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> InternVLTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`. See `completed`."""
    if Fields(fields.values, fields.path).get("clip.use_silu", bool, False):
        raise UnsupportedModelError(f"{fields.path}: clip.use_silu is true; implemented: false")
    tile = fields.count("image_size", most=MAX_TILE)
    images: dict[str, Any] = {"resample": 3, "size": {"height": tile, "width": tile}, "crop_to_patches": True}
    images |= {f"{which}_patches": fields.count(f"preproc_{which}_tiles", usual) for which, usual in _TILES.items()}
    values = siglip.gguf_values(fields, tile)
    del values["activation"]
    return _config(over(siglip.processor_of_gguf(fields, images), said), **values, text_size=text_size)


def completed(config: InternVLTowerConfig, tensors: Mapping[str, StoredTensor]) -> InternVLTowerConfig:
    """Adds what only the tensors of a GGUF file show: the kinds of norms, and a bias."""
    rms, bias = "v.blk.0.ln1.bias" not in tensors, "v.blk.0.attn_q.bias" in tensors
    return dataclasses.replace(config, rms=rms, head_norms="v.blk.0.attn_q_norm.weight" in tensors, qkv_bias=bias)


def _config(processor: Fields, *, patch: int, side: int, cell: int, **own: Any) -> InternVLTowerConfig:
    shared = stretch_rule(processor)
    least, most = (processor.count(f"{which}_patches", usual, most=64) for which, usual in _TILES.items())
    if least > most:
        raise InvalidFileError(f"{processor.path}: min_patches is {least}, more than max_patches, {most}")
    if not processor.get("crop_to_patches", bool):
        least = most = 1
    rule = RatioRule(tile=shared.tile, least=least, most=most, **shared.pixels)
    check_tiles(processor, rule.tile, patch, side, cell)
    own |= {"patch": patch, "side": side, "cell": cell, "most_patches": side**2 + 1}
    return InternVLTowerConfig(activation="gelu", rule=rule, **own)


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T + 1, E] -> [T + 1, E] in fp32. `prepared` folds the scales into its matrices."""

    def __init__(self, config: InternVLTowerConfig, placement: Placement) -> None:
        size, eps, norm = config.hidden_size, config.norm_eps, RMSNorm if config.rms else LayerNorm
        self.heads, self.size = config.num_heads, size
        self.attention_norm, self.mlp_norm = norm(size, eps, placement), norm(size, eps, placement)
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (RMSNorm(size, eps, placement) if config.head_norms else None for _ in "qk")
        self.output = Linear(size, size, placement, bias=True)
        self.mlp = MLP(size, config.intermediate_size, placement, activation=config.activation)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        qkv = self.qkv(self.attention_norm(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([self.size] * 3, dim=-1)
            qkv = side_by_side(self.q_norm(q), self.k_norm(k), v)
        x = x + self.output(whole_attention(qkv, self.heads, step.lengths))
        return x + self.mlp(self.mlp_norm(x))


# ---- model -----------------------------------------------------------------------------------------------------------


class InternVLTower:
    """The vision encoder: patches of tiles to embeddings; see `Tower`.

    The table of positions begins with the class token's row, see `prepared`.
    """

    mergers = ()

    def __init__(self, config: InternVLTowerConfig, placement: Placement) -> None:
        size, text = config.hidden_size, config.text_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement)
        self.positions = Embedding(config.side**2 + 1, size, placement, wide=True)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.cell_norm = LayerNorm(config.cell_size, 1e-5, placement)
        self.first = Linear(config.cell_size, text, placement, bias=True)
        self.second = Linear(text, text, placement, bias=True)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the table, which lists a tile's positions row by row."""
        del first, grid
        return Placed(np.where(places[:, 0] < 0, 0, 1 + places @ (self.config.side, 1)))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return self.positions(step.places) + self.patches(patches)

    def norm(self, x: Value) -> Value:
        """See `Tower`; this encoder has no last norm."""
        return x

    def cells(self, hidden: Any) -> Any:
        """See `Tower`; without the class token, if its row is there."""
        return self.config.cells(hidden[: len(hidden) // self.config.cell**2 * self.config.cell**2])

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.second(activation(self.first(self.cell_norm(cells)), "gelu"))


# ---- words -----------------------------------------------------------------------------------------------------------

_MARK = "<IMG_CONTEXT>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each cell of each tile; templates may write `<image>` instead."""
    return f"<img>{_MARK * cut.tiles * math.prod(grid)}</img>"


FAMILY = TowerFamily(
    name="internvl_tower",
    hf={"InternVLForConditionalGeneration": "internvl", _ORIGINAL: "internvl_chat", _QIANFAN: "qianfan_ocr"},
    gguf=("internvl",),
    settings=("crop_to_patches", "min_patches", "max_patches"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed,
    prepared=prepared,
    build=InternVLTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"{_MARK}\n",
    spelled="<image>",
    words_around=words_around,
)
