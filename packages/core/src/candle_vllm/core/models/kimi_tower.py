# SPDX-License-Identifier: MIT
"""The vision encoder of Kimi K2.5, MoonViT, for images, with its projection to the text model (`deepseek.py`).

The blocks are Qwen2-VL's (`qwen_vl.py`): x + attention(norm(x)), then x + mlp(norm(x)); queries and keys rotate by the
column and the row of their patch, which alternate from pair to pair. Learned positions of a grid are interpolated to
the image's grid. After the last norm and a norm of the projection, cells of 2 x 2 patches become one vector, which two
matrices project to an embedding. Videos, whose frames have learned times, are not implemented.
Sources: Kimi Team, 2025, arXiv:2504.07491 (MoonViT); transformers' `Kimi_K25VisionModel`.
Shapes: T patches, E hidden, D head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import chain, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.grid_positions import GridPositions, cubic
from candle_vllm.core.models.paddleocr_tower import LastNorms
from candle_vllm.core.models.pixtral import adjacent
from candle_vllm.core.models.qwen_vl import MOST_PATCHES, QwenTower, QwenTowerConfig, check_sizes
from candle_vllm.core.models.siglip import (
    LARGE,
    gguf_sizes,
    hf_values,
    patch_kernel,
    processor_of_gguf,
    require_true,
    with_grid,
)
from candle_vllm.core.models.siglip import prepared as swapped_back
from candle_vllm.core.models.tower_family import TowerConfig, TowerFamily, mark_of_cells
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.pictures import Picture
from candle_vllm.core.vision.preprocessing import NOTHING, FitRule, area_rule, over, resized

# ---- config ----------------------------------------------------------------------------------------------------------

_EPS = 1e-5
_MOST_SIDE = 4096  # patches
_KINDS = {
    "merge_type": "sd2_tpool", "pos_emb_type": "divided_fixed", "pos_emb_interpolation_mode": "bicubic",
    "mm_projector_type": "patchmerger", "projector_hidden_act": "gelu",
}  # fmt: skip
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class PatchesRule(FitRule, frozen=True, kw_only=True, tag=True):
    """Rule of Kimi K2.5: `FitRule` without stretching; black fills the cells at the right and at the bottom.

    Attributes:
        patches: the image is also shrunk to this number of patches, counted without parts of patches.
        patch: pixels of a patch's side.
    """

    patches: int
    patch: int

    def tiles(self, picture: Picture) -> NDArray[np.uint8]:
        """See `Rule`."""
        cut, (height, width) = self.cut(picture.height, picture.width), self._shrunk(picture.height, picture.width)
        tile = np.zeros((1, cut.height, cut.width, 3), np.uint8)
        tile[0, :height, :width] = resized(picture.pixels, height, width, self.resample)
        return tile

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        count = max(height // self.patch, 1) * max(width // self.patch, 1)
        scale = min(1.0, math.sqrt(self.patches / count), self.longest / height, self.longest / width)
        return min(max(int(height * scale), 1), self.longest), min(max(int(width * scale), 1), self.longest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiTowerConfig(QwenTowerConfig):
    """Config of this vision encoder.

    Attributes:
        projected_eps: epsilon of the projection's norm.
    """

    projected_eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.projected_eps < 1 or not 1 <= self.theta <= 1e30:
            raise InvalidFileError(
                f"vision encoder: the epsilon of the projection is {self.projected_eps}, and the rotary base "
                f"{self.theta}; the first must be between 0 and 1, the second 1 to 1e30"
            )


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> KimiTowerConfig:
    """Read `config.json` and `preprocessor_config.json`, with the keys of published files or those of transformers."""
    given = fields.section("vision_config").values
    named = {key.removeprefix("vt_").removeprefix("init_"): value for key, value in given.items()}
    vision = Fields({**named, **given}, fields.path).with_defaults(**LARGE | {"num_hidden_layers": 27})
    for key, known in _KINDS.items():
        vision.choice(key, known, known)
    patch, values = vision.count("patch_size", 14), hf_values(vision) | {"norm_eps": _EPS}
    high, wide = (vision.count(f"pos_emb_{side}", 64, most=_MOST_SIDE) for side in ("height", "width"))
    kernel = vision.get("merge_kernel_size", list, [2, 2])
    if high != wide or len(kernel) != 2 or kernel[0] != kernel[1]:
        raise UnsupportedModelError(
            f"{fields.path}: vision_config has {high} x {wide} positions, and merge_kernel_size {kernel!r:.40}; "
            "implemented: squares"
        )
    cell = Fields({"merge_kernel_size": kernel[0]}, fields.path).count("merge_kernel_size", most=64)
    check_sizes(
        vision, read := _usual(processor), patch, cell, frames=1, mm_hidden_size=values["hidden_size"],
        qkv_hidden_size=values["hidden_size"], text_hidden_size=text_size,
    )  # fmt: skip
    if fields.count("projection_hidden_size", values["hidden_size"]) != values["hidden_size"]:
        raise UnsupportedModelError(
            f"{fields.path}: projection_hidden_size is {fields.count('projection_hidden_size')}; implemented: "
            f"{values['hidden_size']}, the vision encoder's hidden_size"
        )
    rope = vision.section("rope_parameters")
    rope.choice("rope_type", "axial", "axial")
    return _config(
        read,
        said,
        **values,
        learned=high,
        patch=patch,
        cell=cell,
        text_size=text_size,
        theta=rope.get("rope_theta", float, 10000.0),
        projected_eps=fields.get("projection_layer_norm_eps", float, vision.get("projector_ln_eps", float, _EPS)),
    )


def _usual(processor: Fields) -> Fields:
    """The fields with transformers' names; published files have others, in a section."""
    media = processor.section("media_proc_cfg")
    if media.values.get("fixed_output_tokens") is not None:
        raise UnsupportedModelError(f"{processor.path}: fixed_output_tokens is not implemented")
    names = {"in_patch_limit": "max_patches", "merge_kernel_size": "merge_size"}
    found = {names.get(key, key): value for key, value in media.values.items()}
    side = media.count("patch_limit_on_one_side", 512)
    size = {"max_height": side, "max_width": side}
    return Fields({**_HALF, "size": size, **found, **processor.values}, processor.path)


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> KimiTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`. See `with_grid`."""
    patch = gguf_sizes(fields, _EPS)["patch"]
    most = fields.count("image_max_pixels", MOST_PATCHES * patch**2, most=1 << 40) // patch**2
    return config_of_file(fields, processor_of_gguf(fields, {"max_patches": most}), text_size, said)


def config_of_file(fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any]) -> KimiTowerConfig:
    """The same with these settings of images, by their names in `preprocessor_config.json`."""
    require_true(fields, "clip.use_gelu")
    values = gguf_sizes(fields, _EPS)
    return _config(
        _usual(processor),
        said,
        **values,
        activation="gelu_tanh",
        learned=1,
        cell=fields.count("projector.scale_factor", 2, most=64),
        text_size=text_size,
        projected_eps=values["norm_eps"],
    )


def _config(processor: Fields, said: Mapping[str, Any], *, patch: int, cell: int, **own: Any) -> KimiTowerConfig:
    sides = processor.section("size")
    side, other = (sides.count(f"max_{name}", 512, most=_MOST_SIDE) for name in ("height", "width"))
    if side != other:
        raise InvalidFileError(f"{processor.path}: size has a max_height of {side} and a max_width of {other}")
    most = MOST_PATCHES if "max_patches" in said else 1 << 24
    patches = min(over(processor, said).count("max_patches", MOST_PATCHES, most=most), MOST_PATCHES)
    plain = {key: value for key, value in processor.values.items() if key != "size"}
    given = area_rule(Fields(plain, processor.path), patch * cell, MOST_PATCHES * patch**2)
    rule = PatchesRule(longest=side * patch, cell=patch * cell, patches=patches, patch=patch, **given.pixels)
    side = -(-side // cell) * cell
    most = (patches + (cell + 1) * 2 * side + (cell + 1) ** 2) // cell**2 * cell**2  # sides may be rounded up
    return KimiTowerConfig(**own, side=side, most_patches=min(most, side**2), patch=patch, cell=cell, rule=rule)


# ---- model -----------------------------------------------------------------------------------------------------------


class KimiTower(QwenTower):
    """The vision encoder: patches of an image to embeddings; see `Tower`."""

    def __init__(self, config: KimiTowerConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        size = config.hidden_size
        self.positions = GridPositions(config.learned, size, placement, cubic)
        last, projection = (LayerNorm(size, eps, placement) for eps in (config.norm_eps, config.projected_eps))
        self.norm = LastNorms(last, projection)

    def angles(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rotary angles [n, D/2] of patches, by the column and by the row in turn."""
        found = super().angles(places[:, ::-1])
        return found.reshape(len(found), 2, -1).swapaxes(1, 2).reshape(found.shape)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _halves(stored: StoredTensor, config: Any) -> StoredTensor:
    """Half-split rows of queries or keys, which llama.cpp has in pairs of neighbours, all columns before all rows."""
    if stored.shape[:1] != (config.hidden_size,):
        return stored  # the loader reports the wrong shape
    heads = np.arange(config.hidden_size).reshape(config.num_heads, 2, -1, 2)
    return stored.select(heads.transpose(0, 3, 2, 1).reshape(-1))


def _table(stored: StoredTensor, config: Any) -> StoredTensor:
    """The positions of a grid [n, n, E] as a table [n * n, E]."""
    del config
    if len(stored.shape) != 3:
        return stored
    return dataclasses.replace(stored, shape=(stored.shape[0] * stored.shape[1], stored.shape[2]))


_AT, _LAYER, _BLOCK = "vision_tower.", "vision_tower.layers.{i}.", "v.blk.{i}."
_OLD, _TO, _VL_TO = "vision_tower.encoder.blocks.{i}.", "mm_projector.", "multi_modal_projector."  # published: `_OLD`


def qkv_names(rows: Callable[[StoredTensor, Any], StoredTensor]) -> list[WeightName]:
    """Names of queries, keys and values; `rows` orders the rows of GGUF files' queries and keys."""
    return [
        WeightName(
            f"layers.{{i}}.qkv:{part}.{kind}",
            (f"{_LAYER}attn.{part}_proj.{kind}",
             Seen(f"{_OLD}wqkv.{kind}", chain(row_part(number, 3), *([adjacent] if part != "v" else ())))),
            (Seen(f"{_BLOCK}attn_{part}.{kind}", chain(*([rows] if part != "v" else ()))),
             Seen(f"{_BLOCK}attn_qkv.{kind}", chain(row_part(number, 3), *([rows] if part != "v" else ())))),
        )
        for number, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ]  # fmt: skip


_PATCHES = pair("patches:", (_AT + "patch_embed.proj", _AT + "encoder.patch_embed.proj"), "v.patch_embd")
_GRID = "patch_embed.pos_emb."
SHARED = (  # names that Kimi-VL's files have, too
    dataclasses.replace(_PATCHES[0], hf_view=patch_kernel, gguf_view=patch_kernel),
    _PATCHES[1],
    WeightName(
        "positions:weight",
        (f"{_AT}{_GRID}position_embeddings", f"{_AT}{_GRID}weight"),
        "v.position_embd.weight",
        hf_view=_table,
        gguf_view=_table,
    ),
    *pair("layers.{i}.attention_norm:", (_LAYER + "norm1", _OLD + "norm0"), _BLOCK + "ln1"),
    *pair("layers.{i}.output:", (_LAYER + "attn.proj", _OLD + "wo"), _BLOCK + "attn_out"),
    *pair("layers.{i}.mlp_norm:", (_LAYER + "norm2", _OLD + "norm1"), _BLOCK + "ln2"),
    *pair("layers.{i}.mlp.up:", (_LAYER + "mlp.fc1", _OLD + "mlp.fc0"), _BLOCK + "ffn_up"),
    *pair("layers.{i}.mlp.down:", (_LAYER + "mlp.fc2", _OLD + "mlp.fc1"), _BLOCK + "ffn_down"),
    *pair("norm.last:", (_AT + "final_layernorm", _AT + "encoder.final_layernorm"), "v.post_ln"),
    *pair("norm.projection:", (_TO + "pre_norm", _VL_TO + "pre_norm"), "mm.input_norm"),
    *pair("joined:", (_TO + "in_proj", _TO + "proj.0", _VL_TO + "linear_1"), "mm.1"),
    *pair("projector:", (_TO + "out_proj", _TO + "proj.2", _VL_TO + "linear_2"), "mm.2"),
)
WEIGHTS = (*SHARED, *qkv_names(_halves))


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Drop the times of frames, and correct swapped names of up and down."""
    return {name: tensor for name, tensor in swapped_back(tensors, config).items() if "time_weight" not in name}


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<|media_pad|>"


FAMILY = TowerFamily(
    name="kimi_tower",
    hf={"KimiK25ForConditionalGeneration": "kimi_k25", "Kimi_K25ForConditionalGeneration": "kimi_k25"},
    gguf=("kimik25",),
    settings=("max_patches",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=with_grid,
    prepared=prepared,
    build=KimiTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"<|media_begin|>image<|media_content|>{_MARK}<|media_end|>",
    words_around=mark_of_cells(_MARK),
)
