# SPDX-License-Identifier: MIT
"""The vision encoder of HunyuanOCR, with its projection to the text model (`hunyuan.py`).

The blocks are SigLIP's (`siglip.py`). Learned positions of a grid are interpolated to the image's grid. A cell of
2 x 2 patches becomes one vector by two convolutions, and an embedding by a matrix. Each row of an image's embeddings
ends with a learned vector, a learned vector stands at either end of the image, and all are normalised.
Sources: Tencent, 2025, arXiv:2511.19575; transformers' `HunYuanVLVisionTransformer`.
Shapes: T patches, E hidden, C cells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.grid_positions import GridPositions, centred
from candle_vllm.core.models.qwen_vl import check_sizes, rule_of
from candle_vllm.core.models.siglip import LARGE, Block, area_of_gguf, gguf_sizes, hf_values, patch_kernel, require_true
from candle_vllm.core.models.tower_family import Joining, Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, Cut

# ---- config ----------------------------------------------------------------------------------------------------------

_EDGES = {"shortest_edge": 512 * 512, "longest_edge": 2048 * 2048}
_FLAGS = {"cat_extra_token": 1, "remove_prenorm": 1, "anyres_vit_two_views": 0, "learnable_mlp_pooling_size": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanTowerConfig(TowerConfig):
    """Config of this vision encoder."""

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the vectors within the projection, and the joined embeddings."""
        cells = self.patches // self.cell**2
        return super().step_bytes(threads) + 256 * 4 * (8 * self.hidden_size) + 4 * self.text_size * (1024 + 2 * cells)


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> HunyuanTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config").with_defaults(**LARGE | {"num_hidden_layers": 27, "hidden_act": "gelu"})
    vision.choice("interpolate_mode", "bilinear", "bilinear")
    for key, known in _FLAGS.items():
        if (value := vision.values.get(key)) not in (known, None):
            raise UnsupportedModelError(f"{fields.path}: vision_config.{key} is {value!r:.40}; implemented: {known}")
    patch, cell = vision.count("patch_size", 16), vision.count("spatial_merge_size", 2, most=64)
    values = hf_values(vision) | {"norm_eps": vision.get("rms_norm_eps", float, 1e-5)}
    sizes = {"num_channels": 3, "temporal_patch_size": 1, "head_dim": values["hidden_size"] // values["num_heads"]}
    check_sizes(vision, processor, patch, cell, frames=1, **sizes)
    learned = vision.count("max_image_size", 2048) // patch
    return _config(processor, said, **values, learned=learned, patch=patch, cell=cell, text_size=text_size)


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> HunyuanTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`. See `with_grid`."""
    require_true(fields, "clip.use_gelu")
    return _config(
        area_of_gguf(fields),
        said,
        **gguf_sizes(fields, 1e-5),
        activation="gelu",
        learned=1,
        cell=fields.count("spatial_merge_size", 2, most=64),
        text_size=text_size,
    )


def _config(processor: Fields, said: Mapping[str, Any], *, patch: int, cell: int, **own: Any) -> HunyuanTowerConfig:
    usual = {"size": _EDGES, **processor.values, "resample": 3}  # bicubic: transformers ignores the file's
    rule = msgspec.structs.replace(rule_of(Fields(usual, processor.path), patch, cell, said), lined=True)
    most: dict[str, Any] = {"side": rule.longest // patch, "most_patches": rule.most_cells * cell**2}
    return HunyuanTowerConfig(**own, **most, patch=patch, cell=cell, rule=rule)


# ---- model -----------------------------------------------------------------------------------------------------------


class Ends:
    """The normalised embeddings [3, text size] at the end of each row, at the image's beginning and at its end."""

    def __init__(self, size: int, placement: Placement) -> None:
        self.weight = placement.empty(3, size)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)}


class HunyuanTower:
    """The vision encoder: patches of an image to embeddings; see `JoiningTower`."""

    mergers = ()

    def __init__(self, config: HunyuanTowerConfig, placement: Placement) -> None:
        size, text = config.hidden_size, config.text_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.positions = GridPositions(config.learned, size, placement, centred)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.norm = RMSNorm(size, config.norm_eps, placement)
        self.joined = Linear(config.cell_size, 2 * size, placement, bias=True)
        self.widened = Linear(2 * size, 4 * size, placement, bias=True)
        self.projector = Linear(4 * size, text, placement, bias=True)
        self.projected_norm = RMSNorm(text, config.norm_eps, placement)
        self.ends = Ends(text, placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`."""
        return Placed(np.arange(first, first + len(places)), self.positions(places, grid))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        assert step.start is not None
        return step.start + self.patches(patches)

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        projected = self.projector(self.widened(activation(self.joined(cells), self.config.activation)))
        return side_by_side(self.projected_norm(projected))

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`."""
        newline, begin, end = on_host(self.ends.weight)
        yield
        rows, columns = self.config.rule.cut(*whole).cells(self.config.cell_pixels)
        found = np.empty((rows * (columns + 1) + 2, made.shape[1]), np.float32)
        found[0], found[-1] = begin, end
        lines = found[1:-1].reshape(rows, columns + 1, -1)
        lines[:, :-1], lines[:, -1] = made.reshape(rows, columns, -1), newline
        return found


# ---- weight names ----------------------------------------------------------------------------------------------------


def _without_class(stored: StoredTensor, config: Any) -> StoredTensor:
    """The rows of the grid [n * n, E] in a table of positions, which begins with a row that is not used."""
    del config
    return stored.select(np.arange(1, stored.shape[0])) if len(stored.shape) == 2 else stored


def _cell_kernel(stored: StoredTensor, config: Any) -> StoredTensor:
    """The kernel of a convolution over a cell [2 E, E, s, s], or over one [4 E, 2 E, 1, 1], as a matrix."""
    del config
    if len(stored.shape) != 4:
        return stored  # the loader reports the wrong shape
    shape = (stored.shape[0], math.prod(stored.shape[1:]))
    return computed(stored, shape, lambda values: np.moveaxis(values, 1, -1).reshape(shape))


_AT = ("vision_tower.", "vit.")  # of transformers, and of published files
_MERGER = ("vision_tower.patch_merger.", "vit.perceive.")
_NAMES = {
    "layers.{i}.attention_norm:": (("layer_norm1", "input_layernorm"), "ln1"),
    **{f"layers.{{i}}.qkv:{part}.": ((f"self_attn.{part}_proj",), f"attn_{part}") for part in "qkv"},
    "layers.{i}.output:": (("self_attn.o_proj",), "attn_out"),
    "layers.{i}.mlp_norm:": (("layer_norm2", "post_attention_layernorm"), "ln2"),
    "layers.{i}.mlp.up:": (("mlp.fc1", "mlp.dense_h_to_4h"), "ffn_up"),
    "layers.{i}.mlp.down:": (("mlp.fc2", "mlp.dense_4h_to_h"), "ffn_down"),
}
_PROJECTION = {
    "norm:": (("before_rms",), "mm.pre_norm"),
    "joined:": (("proj_conv", "proj.0"), "mm.0"),
    "widened:": (("proj_out", "proj.2"), "mm.2"),
    "projector:": (("mlp",), "mm.model.fc"),
    "projected_norm:": (("after_rms",), "mm.post_norm"),
}
_ENDS = ("v.image_newline", "mm.image_begin", "mm.image_end")
_ENDS_HF = ("image_newline", "image_begin", "image_end")
_UNUSED = ("v.view_seperator", *(f"{at}image_sep" for at in _MERGER))


def _patches() -> list[WeightName]:
    kernel, bias = pair("patches:", tuple(f"{at}embeddings.patch_embedding" for at in _AT), "v.patch_embd")
    return [dataclasses.replace(kernel, hf_view=patch_kernel, gguf_view=patch_kernel), bias]


def _projection() -> list[WeightName]:
    made = list[WeightName]()
    for target, (names, gguf) in _PROJECTION.items():
        lines = pair(target, tuple(f"{at}{name}" for at in _MERGER for name in names), gguf)
        if target in ("joined:", "widened:"):
            lines[0] = dataclasses.replace(lines[0], hf_view=_cell_kernel, gguf_view=_cell_kernel)
        made += lines
    return made


WEIGHTS = (
    *_patches(),
    WeightName(
        "positions:weight",
        tuple(f"{at}embeddings.position_embedding.weight" for at in _AT),
        "v.position_embd.weight",
        hf_view=_without_class,
    ),
    *(
        line
        for target, (names, gguf) in _NAMES.items()
        for line in pair(
            target, tuple(f"{at}layers.{{i}}.{name}" for at in _AT for name in names), f"v.blk.{{i}}.{gguf}"
        )
    ),
    *_projection(),
    WeightName("ends:weight", tuple(f"{at}{_ENDS_HF[0]}" for at in _MERGER), _ENDS[0]),
)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Compute `Ends` from the vectors of a file: the first one is projected, all are normalised."""
    found = {name: tensor for name, tensor in siglip.prepared(tensors, config).items() if name not in _UNUSED}
    kinds = [(tuple(f"{at}{name}" for name in _ENDS_HF), f"{at}mlp", f"{at}after_rms") for at in _MERGER]
    wide, text = 4 * config.hidden_size, config.text_size
    for ends, matrix, norm in [*kinds, (_ENDS, "mm.model.fc", "mm.post_norm")]:
        names = (*ends, f"{matrix}.weight", f"{matrix}.bias", f"{norm}.weight")
        if ends[0] not in found:
            continue
        for name, shape in zip(names, [(wide,), (text,), (text,), (text, wide), (text,), (text,)]):
            if name not in found or found[name].shape != shape:
                said = "is missing" if name not in found else f"has the shape {list(found[name].shape)}"
                raise WeightsError(f"{found[ends[0]].path}: tensor {name} {said}; expected: {list(shape)}")
        found[ends[0]] = _ends([found[name] for name in names], config)
        del found[ends[1]], found[ends[2]]
    return found


def _ends(parts: list[StoredTensor], config: TowerConfig) -> StoredTensor:
    def rows(newline: NDArray[np.float32]) -> NDArray[np.float32]:
        begin, end, matrix, bias, weight = (part.load("F32") for part in parts[1:])
        made = np.stack([matrix @ newline + bias, begin, end])
        scale = np.sqrt(np.square(made.astype(np.float64)).mean(1, keepdims=True) + config.norm_eps)
        return (made / scale * weight).astype(np.float32)

    return computed(parts[0], (3, config.text_size), rows, "F32")


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<｜hy_place▁holder▁no▁102｜>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each of its embeddings."""
    del cut
    return _MARK * (grid[0] * (grid[1] + 1) + 2)


def turned(cut: Cut, grid: tuple[int, int]) -> tuple[int, int, NDArray[np.int64]]:
    """See `Turned`: the time is the position in the sequence; the embeddings at both ends are rotated as text."""
    number = np.arange(grid[0] * (grid[1] + 1))
    return 1, 1, np.stack([number, *np.divmod(number, grid[1] + 1), np.full_like(number, cut.number)], 1)


FAMILY = TowerFamily(
    name="hunyuan_tower",
    hf={"HunYuanVLForConditionalGeneration": "hunyuan_vl"},
    gguf=("hunyuanvl",),
    settings=("min_pixels", "max_pixels", "size.shortest_edge", "size.longest_edge"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=siglip.with_grid,
    prepared=prepared,
    build=HunyuanTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"<｜hy_place▁holder▁no▁100｜>{_MARK}<｜hy_place▁holder▁no▁101｜>",
    words_around=words_around,
    turned=turned,
)
