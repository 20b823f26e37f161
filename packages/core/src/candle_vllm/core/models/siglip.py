# SPDX-License-Identifier: MIT
"""SigLIP's vision encoder in Idefics3 and SmolVLM, with their projection to embeddings of the text model.

Each block is x + attention(norm(x)), then x + mlp(norm(x)); attention is over the whole tile. After the
last norm, cells of s x s patches become one vector, which a matrix projects to an embedding.
Source: Zhai et al., 2023, arXiv:2303.15343; Laurençon et al., 2024, arXiv:2408.12637 (pixel shuffle).
Shapes: T patches, E hidden, P elements of a patch, C cells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.tower_family import Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, Cut, StretchRule, TileRule, over, tile_rule

# ---- config ----------------------------------------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"})
MOST_PATCHES = 1 << 14  # maximum number of patches of a tile
_DEFAULTS = MappingProxyType({"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12})
"""Values of transformers' config classes for keys that published configs leave out of `vision_config`."""
SMALL = MappingProxyType(
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
)
"""Defaults of transformers for SigLIP and SigLIP 2."""
LARGE = MappingProxyType(
    {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
)
"""Defaults of transformers for the vision encoder of LLaVA-OneVision."""


def config_from_hf(fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read `config.json` and `preprocessor_config.json` of Idefics3 and SmolVLM."""
    processor = over(processor, said)
    vision = fields.section("vision_config")
    patch = vision.count("patch_size", 32)
    return config_of_tiles(
        processor,
        tile_rule(processor),
        **hf_values(vision.with_absent(**_DEFAULTS).with_defaults(num_attention_heads=16)),
        patch=patch,
        side=vision.count("image_size", 224) // patch,
        cell=fields.count("scale_factor", 2, most=64),
        text_size=text_size,
    )


def hf_values(vision: Fields) -> dict[str, Any]:
    """The fields of a `TowerConfig` in SigLIP's `vision_config`, which must have the sizes."""
    return {
        "hidden_size": vision.count("hidden_size"),
        "intermediate_size": vision.count("intermediate_size"),
        "num_layers": vision.count("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": vision.count("num_attention_heads"),
        "norm_eps": vision.get("layer_norm_eps", float, 1e-6),
        "activation": ACTIVATIONS[vision.choice("hidden_act", "gelu_pytorch_tanh", *ACTIVATIONS)],
    }


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files of Idefics3 and SmolVLM; keys begin with `clip.vision.`."""
    tile = fields.count("image_size", most=MAX_TILE)
    size = {
        "size": {"longest_edge": fields.count("preproc_image_size", 4 * tile)},
        "max_image_size": {"longest_edge": tile},
    }
    processor = over(processor_of_gguf(fields, size), said)
    return config_of_tiles(processor, tile_rule(processor), **gguf_values(fields, tile), text_size=text_size)


def processor_of_gguf(fields: Fields, size: Mapping[str, Any]) -> Fields:
    """The fields of a `preprocessor_config.json` from the metadata of a `mmproj` file; `size`: the size fields."""
    numbers = {f"image_{key}": fields.get(f"image_{key}", list, [0.5] * 3) for key in ("mean", "std")}
    return Fields({**size, **numbers}, fields.path)


def area_of_gguf(fields: Fields) -> Fields:
    """`processor_of_gguf` for the rule of Qwen2-VL; the file must have the bounds of an image's pixels."""
    edges = {f"{which}_pixels": fields.count(f"image_{which}_pixels") for which in ("min", "max")}
    return processor_of_gguf(fields, edges)


def require_true(fields: Fields, key: str) -> None:
    """Raise an UnsupportedModelError if a flag of a `mmproj` file, such as "clip.use_gelu", is false."""
    if not Fields(fields.values, fields.path).get(key, bool, True):
        raise UnsupportedModelError(f"{fields.path}: {key} is false; implemented: true")


def gguf_sizes(fields: Fields, eps: float = 1e-6) -> dict[str, Any]:
    """The fields of a `TowerConfig` that every `mmproj` file has; `eps` is the epsilon of norms without its key."""
    return {
        "patch": fields.count("patch_size"),
        "hidden_size": fields.count("embedding_length"),
        "intermediate_size": fields.count("feed_forward_length"),
        "num_layers": fields.count("block_count", most=MAX_LAYERS),
        "num_heads": fields.count("attention.head_count"),
        "norm_eps": fields.get("attention.layer_norm_epsilon", float, eps),
    }


def gguf_values(fields: Fields, tile: int) -> dict[str, Any]:
    """`gguf_sizes`, and the fields of square tiles with sides of `tile` pixels."""
    values = gguf_sizes(fields)
    cell = fields.count("projector.scale_factor", 4, most=64)
    return {**values, "activation": "gelu_tanh", "side": tile // values["patch"], "cell": cell}


def with_grid(config: Any, tensors: Mapping[str, StoredTensor]) -> Any:
    """Add the side of the grid of learned positions, which a GGUF file shows only by the shape of their table."""
    table = tensors.get("v.position_embd.weight")
    return config if table is None else dataclasses.replace(config, learned=math.isqrt(math.prod(table.shape[:-1])))


def config_of_tiles(
    processor: Fields, rule: TileRule | StretchRule, *, patch: int, side: int, cell: int, **values: Any
) -> TowerConfig:
    """Config for square tiles; see `check_tiles`."""
    check_tiles(processor, rule.tile, patch, side, cell)
    return TowerConfig(patch=patch, side=side, cell=cell, rule=rule, **values)


def check_tiles(processor: Fields, tile: int, patch: int, side: int, cell: int) -> None:
    """Raise an InvalidFileError unless `tile` pixels are `side` patches in whole cells, at most `MOST_PATCHES`."""
    if not 0 < side * side <= MOST_PATCHES or tile != side * patch or side % cell:
        raise InvalidFileError(
            f"{processor.path}: tiles of {tile} pixels; the model has {side} x {side} patches of {patch} pixels, "
            f"{cell} x {cell} of which are one embedding, and at most {MOST_PATCHES} are supported"
        )


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Correct the names of older files, in which up and down are swapped; the shapes show it."""
    down = tensors.get("v.blk.0.ffn_down.weight")
    if down is None or down.shape != (config.intermediate_size, config.hidden_size) or len(set(down.shape)) == 1:
        return tensors
    swapped = {".ffn_down.": ".ffn_up.", ".ffn_up.": ".ffn_down."}

    def name(given: str) -> str:
        return next((given.replace(one, other) for one, other in swapped.items() if one in given), given)

    return {name(given): dataclasses.replace(tensor, name=name(given)) for given, tensor in tensors.items()}


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: TowerConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.heads = config.num_heads
        self.attention_norm = LayerNorm(size, config.norm_eps, placement)
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=True)
        self.output = Linear(size, size, placement, bias=True)
        self.mlp_norm = LayerNorm(size, config.norm_eps, placement)
        self.mlp = MLP(size, config.intermediate_size, placement, activation=config.activation)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        x = x + self.output(whole_attention(self.qkv(self.attention_norm(x)), self.heads, step.lengths))
        return x + self.mlp(self.mlp_norm(x))


# ---- model -----------------------------------------------------------------------------------------------------------


class Siglip:
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: TowerConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.positions = Embedding(config.side**2, size, placement, wide=True)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.norm = LayerNorm(size, config.norm_eps, placement)
        self.connect(placement)

    def connect(self, placement: Placement) -> None:
        """Make the layers of `project`."""
        self.projector = Linear(self.config.cell_size, self.config.text_size, placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the position table, which lists a tile's positions row by row."""
        del first, grid
        return Placed(places @ (self.config.side, 1))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return self.positions(step.places) + self.patches(patches)

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(cells)


# ---- weight names ----------------------------------------------------------------------------------------------------


def patch_kernel(stored: StoredTensor, config: Any) -> StoredTensor:
    """The kernel of a convolution [E, 3, h, w] as a matrix [E, 3 * h * w]."""
    if len(stored.shape) != 4 or stored.shape[1:] != (3, config.patch, config.patch):
        return stored  # the loader reports the wrong shape
    shape = (stored.shape[0], config.patch_size)
    return computed(stored, shape, lambda values: values.reshape(shape))


def names(*folders: str) -> list[WeightName]:
    """The table of weight names without the projector; `folders` are the possible prefixes of safetensors' names."""

    def pair(target: str, hf: str, gguf: str) -> list[WeightName]:
        made = {kind: tuple(f"{at}.{hf}.{kind}" for at in folders) for kind in ("weight", "bias")}
        return [
            WeightName(f"{target}{kind}", several if several[1:] else several[0], f"{gguf}.{kind}")
            for kind, several in made.items()
        ]

    kernel, bias = pair("patches:", "embeddings.patch_embedding", "v.patch_embd")
    layer, block = "encoder.layers.{i}.", "v.blk.{i}."
    return [
        dataclasses.replace(kernel, hf_view=patch_kernel, gguf_view=patch_kernel),
        bias,
        pair("positions:", "embeddings.position_embedding", "v.position_embd")[0],
        *pair("layers.{i}.attention_norm:", layer + "layer_norm1", block + "ln1"),
        *pair("layers.{i}.qkv:q.", layer + "self_attn.q_proj", block + "attn_q"),
        *pair("layers.{i}.qkv:k.", layer + "self_attn.k_proj", block + "attn_k"),
        *pair("layers.{i}.qkv:v.", layer + "self_attn.v_proj", block + "attn_v"),
        *pair("layers.{i}.output:", layer + "self_attn.out_proj", block + "attn_out"),
        *pair("layers.{i}.mlp_norm:", layer + "layer_norm2", block + "ln2"),
        *pair("layers.{i}.mlp.up:", layer + "mlp.fc1", block + "ffn_up"),
        *pair("layers.{i}.mlp.down:", layer + "mlp.fc2", block + "ffn_down"),
        *pair("norm:", "post_layernorm", "v.post_ln"),
    ]


WEIGHTS: Sequence[WeightName] = (
    *names("vision_model"),
    WeightName("projector:weight", "connector.modality_projection.proj.weight", "mm.model.fc.weight"),
)


# ---- words -----------------------------------------------------------------------------------------------------------


_MARK = "<image>"


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image that was split by `cut`; `grid` is a tile's number of rows and columns of cells."""
    image = _MARK * math.prod(grid)
    fake, tile = "<fake_token_around_image>", "<fake_token_around_image><row_{}_col_{}>{}"
    if not cut.rows:
        return f"{fake}<global-img>{image}{fake}"
    rows = (
        "".join(tile.format(row + 1, column + 1, image) for column in range(cut.columns)) for row in range(cut.rows)
    )
    return "".join(f"{row}\n" for row in rows) + f"\n{fake}<global-img>{image}{fake}"


FAMILY = TowerFamily(
    name="siglip",
    hf={"Idefics3ForConditionalGeneration": "idefics3", "SmolVLMForConditionalGeneration": "smolvlm"},
    gguf=("idefics3",),
    settings=("size.longest_edge", "do_image_splitting"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=Siglip,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=words_around,
)
