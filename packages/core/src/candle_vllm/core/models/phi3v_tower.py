# SPDX-License-Identifier: MIT
"""The vision encoder of Phi-3-vision and Phi-3.5-vision: CLIP's, with the projection to embeddings of Phi-3.

The encoder is that of `clip_tower.py`. Cells of 2 x 2 patches become one vector, which two matrices project to an
embedding. An image is a grid of tiles, and one tile of the whole grid: the rows of the grid's embeddings run through
its tiles, each row of either ends with a learned vector, and another learned vector stands between the two. These
vectors are projected like cells, which is done once, when they are loaded.
Sources: Abdin et al., 2024, arXiv:2404.14219; Dong et al., 2024, arXiv:2404.06512; `Phi3VForCausalLM` of vLLM, and
`Phi3VImageProcessor` of the published models.
Shapes: E hidden, C elements of a cell.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, on_host
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.clip_tower import CLIP_ACTIVATIONS, CLIP_LARGE, ClipTower, ClipTowerConfig
from candle_vllm.core.models.internvl_tensors import joined_positions
from candle_vllm.core.models.llama4_tower import Rows
from candle_vllm.core.models.llava_onevision_tower import Newline
from candle_vllm.core.models.phi3v_rule import PaddedRule, shrunk
from candle_vllm.core.models.siglip import check_tiles
from candle_vllm.core.models.tower_family import Joining, TileRows, TowerFamily
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, Cut, crop_rule, over, patch_places

# ---- config ----------------------------------------------------------------------------------------------------------

_CELL = 2
_MOST_TILES = 64
_MODEL = "openai/clip-vit-large-patch14-336"
_LAYOUT = (  # sections and keys of config.json of which one value is implemented, and what their absence means
    ("embd_layer", "embedding_cls", "image", "image"),
    ("embd_layer", "projection_cls", "linear", "mlp"),
    ("embd_layer", "hd_transform_order", "glb_sub", "sub_glb"),
    ("embd_layer", "use_hd_transform", False, True),
    ("embd_layer", "with_learnable_separator", False, True),
    ("img_processor", "name", "", "clip_vision_model"),
    ("img_processor", "model_name", _MODEL, _MODEL),
    ("img_processor", "type_feature", "patch", "patch"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3VTowerConfig(ClipTowerConfig):
    """Config of this vision encoder; `tiles` is the maximum number of tiles of an image."""

    tiles: int

    def count(self, tile: NDArray[np.uint8]) -> int:
        """See `TowerConfig`; a tile that is larger than the others is shrunk."""
        del tile
        return (self.side // self.cell) ** 2

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        if tile.shape[:2] == (self.side * self.patch,) * 2:
            return super().read(tile)
        return ShrunkRows.of(TileRows(tile, self, patch_places(self.side, self.side, self.cell), None, ()))

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds copies of all tiles' embeddings, and the whole image as floats."""
        cells = (self.side // self.cell) ** 2
        return super().step_bytes(threads) + 12 * self.tiles * (cells * self.text_size + (self.side * self.patch) ** 2)


class ShrunkRows(Rows):
    """The patches of a tile that consists of several, shrunk to one, followed by the row of the class token."""

    @property
    def grid(self) -> tuple[int, int]:
        """See `TileRows`."""
        return self.config.side, self.config.side

    def strips(self, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """See `TileRows`; all patches at once."""
        del most
        config, count = self.config, len(self.places) - 1
        normalisation, side, cell = config.rule.normalisation, config.side // config.cell, config.cell
        values = shrunk(self.tile, config.side * config.patch) * np.float32(normalisation.scale)
        values = (values - np.array(normalisation.mean, np.float32)) / np.array(normalisation.std, np.float32)
        grid = values.reshape(side, cell, config.patch, side, cell, config.patch, 3)
        yield np.arange(count), grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(count, config.patch_size)
        yield np.array([count]), np.zeros((1, config.patch_size), np.float32)


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> Phi3VTowerConfig:
    """Read `config.json`, and `preprocessor_config.json`, of Phi-3-vision.

    Published configs have no `vision_config`: the encoder is CLIP's ViT-L/14 for images of 336 pixels.
    """
    for section, key, usual, only in _LAYOUT:
        if (found := fields.section(section).values.get(key, usual)) != only:
            raise UnsupportedModelError(f"{fields.path}: {section}.{key} is {found!r:.60}; implemented: {only!r}")
    vision, images = fields.with_defaults(vision_config=CLIP_LARGE).section("vision_config"), over(processor, said)
    stored, given = vision.count("num_hidden_layers", most=MAX_LAYERS), fields.section("img_processor")
    if not -stored <= (layer := given.get("layer_idx", int, -2)) < 0:
        raise UnsupportedModelError(f"{fields.path}: img_processor.layer_idx is {layer}; it must be -{stored} to -1")
    size, patch = vision.count("hidden_size"), vision.count("patch_size")
    tile = vision.count("image_size", most=MAX_TILE)
    plain = {"resample": 2, **images.values, "do_center_crop": False, "do_pad": False}
    shared = crop_rule(Fields({**plain, "size": {"height": tile, "width": tile}}, images.path))
    check_tiles(images, tile, patch, tile // patch, _CELL)
    tokens = (tile // patch // _CELL) ** 2
    for where, key, wanted in (
        (given, "image_dim_out", size),
        (given, "num_img_tokens", tokens),
        (processor, "num_img_tokens", tokens),
    ):
        if (number := where.count(key, wanted)) != wanted:
            raise InvalidFileError(f"{where.path}: {where.prefix}{key} is {number}; the vision encoder has {wanted}")
    most = images.count("num_crops", 1, most=_MOST_TILES)
    return Phi3VTowerConfig(
        hidden_size=size,
        intermediate_size=vision.count("intermediate_size"),
        num_layers=stored + 1 + layer,
        num_heads=vision.count("num_attention_heads"),
        norm_eps=vision.get("layer_norm_eps", float, 1e-5),
        activation=CLIP_ACTIVATIONS[vision.choice("hidden_act", "quick_gelu", *CLIP_ACTIVATIONS)],
        projector_activation="gelu",
        projector_bias=True,
        patch=patch,
        side=tile // patch,
        cell=_CELL,
        most_patches=(tile // patch) ** 2 + 1,
        text_size=text_size,
        tiles=most + 1,
        rule=PaddedRule(tile=tile, cell=_CELL * patch, most=most, **shared.pixels),
    )


# ---- model -----------------------------------------------------------------------------------------------------------


class Phi3VTower(ClipTower):
    """The vision encoder: patches of tiles to embeddings; see `JoiningTower`."""

    def __init__(self, config: Phi3VTowerConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        self.first = Linear(config.cell_size, config.text_size, placement, bias=True)
        self.newline, self.separator = (Newline(config.text_size, placement) for _ in range(2))

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """See `JoiningTower`."""
        yield from ()
        cut, side, size = self.config.rule.cut(*whole), self.config.side // self.config.cell, made.shape[1]
        tiles = made[: -(side**2)].reshape(cut.rows, cut.columns, side, side, size).swapaxes(1, 2)
        newline, parts = on_host(self.newline.weight), list[NDArray[np.float32]]()
        for grid in (
            tiles.reshape(cut.rows * side, cut.columns * side, size),
            made[-(side**2) :].reshape(side, -1, size),
        ):
            ends = np.broadcast_to(newline, (len(grid), 1, size))
            parts.append(np.concatenate([grid, ends], 1).reshape(-1, size))
        return np.concatenate([parts[0], on_host(self.separator.weight)[None], parts[1]])


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT = "vision_embed_tokens"
_CLIP = f"{_AT}.img_processor.vision_model"
_UNUSED = re.compile(
    rf"{_AT}\.(?:wte\.weight$|img_processor\.vision_model\.(?:post_layernorm\.|embeddings\.position_ids$))"
)
_LAYER = re.compile(rf"{_AT}\.img_processor\.vision_model\.encoder\.layers\.(\d+)\.")
_VECTORS = (f"{_AT}.sub_GN", f"{_AT}.glb_GN")
WEIGHTS = (
    *(line for line in siglip.names(_CLIP) if line.target not in ("patches:bias", "norm:weight", "norm:bias")),
    *pair("first_norm:", f"{_CLIP}.pre_layrnorm"),
    *pair("first:", f"{_AT}.img_projection.0"),
    *pair("second:", f"{_AT}.img_projection.2"),
    *(WeightName(f"{target}:weight", name, ()) for target, name in zip(("newline", "separator"), _VECTORS)),
)


def prepared(tensors: Mapping[str, StoredTensor], config: Any) -> Mapping[str, StoredTensor]:
    """Drop what is not used, add the class token to the first row of positions, and project the learned vectors.

    `wte` is another name of the text model's embeddings, which some files have beside that.
    """
    found = {name: tensor for name, tensor in tensors.items() if not _UNUSED.match(name)}
    for name in tensors:
        if (layer := _LAYER.match(name)) is not None and int(layer[1]) >= config.num_layers:
            del found[name]
    table, token = f"{_CLIP}.embeddings.position_embedding.weight", f"{_CLIP}.embeddings.class_embedding"
    if table in found:
        if token not in found:
            raise WeightsError(f"{found[table].path}: tensor {token} is missing")
        found[table] = joined_positions(found[table], found.pop(token), None, config)
    matrices = [found.get(f"{_AT}.img_projection.{number}.{kind}") for number in (0, 2) for kind in ("weight", "bias")]
    text, shapes = config.text_size, [None if each is None else each.shape for each in matrices]
    for name in _VECTORS:
        vector = found.get(name)
        if vector is None or vector.numel != config.cell_size or shapes != [
            (text, config.cell_size), (text,), (text, text), (text,)
        ]:  # fmt: skip
            continue  # the loader reports what is missing or has the wrong shape
        found[name] = computed(vector, (text,), lambda values: _projected(values, matrices), "F32")
    return found


def _projected(vector: NDArray[np.float32], matrices: list[Any]) -> NDArray[np.float32]:
    """The embedding of a vector [C]; `matrices` are the weights and biases of the projection."""
    first, bias, second, last = (each.load("F32") for each in matrices)
    hidden = first @ vector.reshape(-1) + bias
    shares = np.array([math.erf(each) for each in hidden / math.sqrt(2)], np.float32)
    return second @ (hidden * (1 + shares) / 2) + last


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<|image|>"
_WRITTEN = f"{_MARK}<s>"  # the published processor tokenizes the texts between images alone, each with its first token
_PREFACE = (
    "{{ bos_token }}{% set said = namespace(messages=[]) %}{% for message in messages %}{% if message.content is "
    "iterable and message.content is not string %}{% set message = dict(message, content='"
    + _WRITTEN
    + "\n' * (message.content | selectattr('type', 'equalto', 'image') | list | length) + message.content | "
    "selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n')) %}{% endif %}"
    "{% set said.messages = said.messages + [message] %}{% endfor %}{% set messages = said.messages %}"
)
"""Images are written before the texts of their message, as vLLM does it: the published template takes texts alone."""


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each of its embeddings."""
    return _MARK * (cut.tiles * math.prod(grid) + cut.more)


FAMILY = TowerFamily(
    name="phi3v_tower",
    hf={"Phi3VForCausalLM": "phi3_v"},
    settings=("num_crops",),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=Phi3VTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=_WRITTEN,
    preface=_PREFACE,
    words_around=words_around,
)
