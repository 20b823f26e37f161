# SPDX-License-Identifier: MIT
"""The vision encoder of Aya Vision: SigLIP's without its last norm, with a norm and a gated projection.

The projection is that of Cohere 2 Vision (`cohere2_vision_tower.py`), and an image becomes tiles as by InternVL's rule.
Sources: Dash et al., 2025, arXiv:2505.08751; `AyaVisionForConditionalGeneration` and `AyaVisionProcessor` of
transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.models.canvas_rules import RatioRule
from candle_vllm.core.models.cohere2_vision_tower import MARK, PROCESSOR, WEIGHTS, GatedTower, GatedTowerConfig
from candle_vllm.core.models.cohere2_vision_tower import gated_config as config_of
from candle_vllm.core.models.tower_family import TowerConfig, TowerFamily
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, over

_TILES = MappingProxyType({"min": 1, "max": 12})
_ONLY = MappingProxyType({"vision_feature_layer": -1, "vision_feature_select_strategy": "full"})
"""Keys of which one value is implemented, which is also the default."""


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GatedTowerConfig:
    """Read `config.json` and `preprocessor_config.json`, whose `crop_to_patches` transformers does not read."""
    for key, only in _ONLY.items():
        if (found := fields.values.get(key)) not in (only, None):
            raise UnsupportedModelError(f"{fields.path}: {key} is {found!r:.40}; implemented: {only}")
    tiles = Fields({**processor.values, "crop_to_patches": True}, processor.path)
    images = over(tiles.with_absent(size={"height": 384, "width": 384}, **PROCESSOR), said)
    least, most = (images.count(f"{which}_patches", usual, most=64) for which, usual in _TILES.items())
    if least > most:
        raise InvalidFileError(f"{images.path}: min_patches is {least}, more than max_patches, {most}")
    if not images.get("crop_to_patches", bool):
        least = most = 1
    eps = fields.get("adapter_layer_norm_eps", float, 1e-6)
    if not 0 < eps < 1:
        raise InvalidFileError(f"{fields.path}: adapter_layer_norm_eps is {eps}, not between 0 and 1")
    tiles_of = {"least": least, "most": most}
    return config_of(fields, images, text_size, RatioRule, tiles_of, projected=text_size, cell_eps=eps)


class AyaVisionTower(GatedTower):
    """The vision encoder: patches of tiles to embeddings; see `Tower`. The last norm changes nothing."""

    def connect(self, placement: Placement) -> None:
        """See `Siglip`."""
        super().connect(placement)
        self.norm: Any = lambda x: x


_UNUSED = re.compile(r"vision_tower\.(?:vision_model\.)?(?:post_layernorm|head)\.")


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Drop the encoder's last norm and its pooling head, which are not used."""
    del config
    return {name: tensor for name, tensor in tensors.items() if not _UNUSED.match(name)}


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: tiles with their numbers, and the tile of the whole image."""
    tile = MARK * math.prod(grid)
    tiles = "".join(f"TILE_{number}{tile}" for number in range(1, cut.tiles))
    return f"<|START_OF_IMG|>{tiles}TILE_GLOBAL{tile}<|END_OF_IMG|>"


FAMILY = TowerFamily(
    name="aya_vision_tower",
    hf={"AyaVisionForConditionalGeneration": "aya_vision"},
    seen=("siglip_vision_model", None),
    settings=("crop_to_patches", "min_patches", "max_patches"),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=AyaVisionTower,
    weights=[line for line in WEIGHTS if not line.target.startswith("norm:")],
    mark=MARK,
    asks="<image>",
    words_around=words_around,
)
