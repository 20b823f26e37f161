# SPDX-License-Identifier: MIT
"""CLIP's vision encoder in LLaVA 1.5 and BakLLaVA, with the projection to embeddings of the text model.

Patches and a class token are normalised before the blocks, which are SigLIP's (`siglip.py`): x + attention(norm(x)),
then x + mlp(norm(x)). The output of the last block but one is used, without a norm and without the class token; two
matrices project each patch to an embedding. An image is one square tile, cut out of its middle.
Sources: Radford et al., 2021, arXiv:2103.00020; Liu et al., 2023, arXiv:2310.03744.
Shapes: T patches of a tile, E hidden.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models import siglip
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.internvl_tensors import joined_positions
from candle_vllm.core.models.llama4_tower import Rows
from candle_vllm.core.models.siglip import ACTIVATIONS, Block, check_tiles
from candle_vllm.core.models.tower_family import Placed, TileRows, TowerConfig, TowerFamily, TowerStep, mark_of_cells
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, crop_rule, over

# ---- config ----------------------------------------------------------------------------------------------------------

CLIP_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"quick_gelu": "quick_gelu", **ACTIVATIONS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTowerConfig(TowerConfig):
    """Config of this vision encoder.

    Attributes:
        projector_activation: activation between the matrices of the projection.
        projector_bias: both matrices of the projection have biases.
    """

    projector_activation: Activation
    projector_bias: bool

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """See `TowerConfig`."""
        return Rows.of(super().read(tile))

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the vectors within the projection."""
        return super().step_bytes(threads) + 256 * 4 * 2 * self.text_size


CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 336,
}  # fmt: skip
"""The `vision_config` of a config without one, as in transformers; CLIP's defaults complete one that is there."""


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> ClipTowerConfig:
    """Read `config.json` and `preprocessor_config.json` of LLaVA with CLIP's vision encoder."""
    vision = fields.with_defaults(vision_config=CLIP_LARGE).section("vision_config")
    fields.choice("vision_feature_select_strategy", "default", "default")
    stored = vision.count("num_hidden_layers", 12, most=MAX_LAYERS)
    last = fields.values.get("vision_feature_layer", -2)
    layers = last[0] if isinstance(last, list) and len(last) == 1 else last
    if not isinstance(layers, int) or not -stored <= layers <= stored or layers in (0, -stored - 1):
        raise UnsupportedModelError(f"{fields.path}: vision_feature_layer is {last!r:.40}, not one layer of {stored}")
    patch = vision.count("patch_size", 32)
    side = vision.count("image_size", 224) // patch
    rule = crop_rule(over(processor, said))
    check_tiles(processor, rule.tile, patch, side, 1)
    return ClipTowerConfig(
        hidden_size=vision.count("hidden_size", 768),
        intermediate_size=vision.count("intermediate_size", 3072),
        num_layers=layers if layers > 0 else stored + 1 + layers,
        num_heads=vision.count("num_attention_heads", 12),
        norm_eps=vision.get("layer_norm_eps", float, 1e-5),
        activation=CLIP_ACTIVATIONS[vision.choice("hidden_act", "quick_gelu", *CLIP_ACTIVATIONS)],
        projector_activation=ACTIVATIONS[fields.choice("projector_hidden_act", "gelu", *ACTIVATIONS)],
        projector_bias=fields.get("multimodal_projector_bias", bool, True),
        patch=patch,
        side=side,
        cell=1,
        most_patches=side**2 + 1,
        text_size=text_size,
        rule=rule,
    )


# ---- model -----------------------------------------------------------------------------------------------------------


class ClipTower:
    """The vision encoder: patches of tiles to embeddings; see `Tower`.

    The table of positions begins with the class token's row, see `prepared`.
    """

    mergers = ()

    def __init__(self, config: ClipTowerConfig, placement: Placement) -> None:
        size, text = config.hidden_size, config.text_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement)
        self.positions = Embedding(config.side**2 + 1, size, placement, wide=True)
        self.first_norm = LayerNorm(size, config.norm_eps, placement)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.first = Linear(size, text, placement, bias=config.projector_bias)
        self.second = Linear(text, text, placement, bias=config.projector_bias)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; returns rows of the table, which lists a tile's positions row by row."""
        del first, grid
        return Placed(np.where(places[:, 0] < 0, 0, 1 + places @ (self.config.side, 1)))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return side_by_side(self.first_norm(self.positions(step.places) + self.patches(patches)))

    def norm(self, x: Value) -> Value:
        """See `Tower`; this encoder has no last norm."""
        return x

    def cells(self, hidden: Any) -> Any:
        """See `Tower`; without the class token, the last row."""
        return self.config.cells(hidden[: self.config.side**2])

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.second(activation(self.first(cells), self.config.projector_activation))


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT = ("vision_tower.vision_model", "vision_tower")
_UNUSED = re.compile(r"vision_tower\.(?:vision_model\.)?(?:post_layernorm\.|embeddings\.position_ids$)")
_LAYER = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.")
WEIGHTS = (
    *(line for line in siglip.names(*_AT) if line.target not in ("patches:bias", "norm:weight", "norm:bias")),
    *pair("first_norm:", tuple(f"{at}.pre_layrnorm" for at in _AT)),
    *pair("first:", "multi_modal_projector.linear_1"),
    *pair("second:", "multi_modal_projector.linear_2"),
)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Drop what comes after the last block that is used, and add the class token to the first row of positions."""
    found = {name: tensor for name, tensor in tensors.items() if not _UNUSED.match(name)}
    for name in tensors:
        if (layer := _LAYER.match(name)) is not None and int(layer[1]) >= config.num_layers:
            del found[name]
    for at in _AT:
        table, token = f"{at}.embeddings.position_embedding.weight", f"{at}.embeddings.class_embedding"
        if table in found:
            if token not in found:
                raise WeightsError(f"{found[table].path}: tensor {token} is missing")
            found[table] = joined_positions(found[table], found.pop(token), None, config)
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<image>"


FAMILY = TowerFamily(
    name="clip_tower",
    hf={"LlavaForConditionalGeneration": "llava"},
    seen=("clip_vision_model", None),
    settings=(),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=ClipTower,
    weights=WEIGHTS,
    mark=_MARK,
    words_around=mark_of_cells(_MARK),
)
