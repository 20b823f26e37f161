# SPDX-License-Identifier: MIT
"""Config of the vision encoder in `granite4_vision_tower.py`, from config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.granite import projectors_of
from candle_vllm.core.models.llava_next_config import GRIDS, SIGLIP, square_rule
from candle_vllm.core.models.siglip import check_tiles, hf_values
from candle_vllm.core.models.tower_family import TowerConfig
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING, over

STEPS = 4  # layers of a projector, see `Projector`
_HEAD = 64  # elements of a projector's head
_QFORMER = {"num_hidden_layers": 1, "intermediate_size": 3072}
"""The `qformer_config` of a config without one, as in transformers; other defaults complete one that is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Granite4VisionTowerConfig(TowerConfig):
    """Config of this vision encoder. A cell is 2 x 2 patches, and `window` cells are the side of a projector's window.

    Attributes:
        projectors: for each projector its number, see `projectors_of`, and the number of blocks before what it reads.
        inner_size: elements within the feed-forward layers of projectors.
        projector_eps: epsilon of norms within projectors.
        tiles: maximum number of tiles of an image.
        factor: factor of embeddings, 1 / Granite's `residual_multiplier`; see `LlamaConfig.stream_eps`.
    """

    projectors: tuple[tuple[int, int], ...]
    inner_size: int
    projector_eps: float
    tiles: int
    factor: float

    @property
    def vectors(self) -> int:
        """See `TowerConfig`: one of each projector."""
        return len(self.projectors)

    @property
    def cell_rows(self) -> int:
        """See `TowerConfig`."""
        return 1

    @property
    def cell_size(self) -> int:
        """See `TowerConfig`: the results of all projectors."""
        return self.hidden_size * self.vectors

    def patches_of_row(self, layer: int) -> int:
        """See `TowerConfig`: in every second layer of the projectors, and after the last, a row is a cell."""
        after = layer - self.num_layers
        return 4 if after >= STEPS * self.vectors or (after >= 0 and after % 2) else 1

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds what blocks and projectors keep, and copies of all tiles' embeddings."""
        each = (2 * self.vectors + 32) * self.hidden_size + self.inner_size
        joined = 3 * (self.tiles * self.side**2 // 4 + 256) * self.vectors * self.text_size
        return super().step_bytes(threads) + 4 * (self.patches * each + joined)


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> Granite4VisionTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config")
    vision.choice("model_type", "clip_vision_model", "siglip_vision_model")
    fields.choice("vision_feature_select_strategy", "default", "full")  # SigLIP has no class token to leave out
    vision = vision.with_defaults(**SIGLIP)
    values, patch = hf_values(vision), vision.count("patch_size", most=MAX_TILE)
    side = vision.count("image_size", most=MAX_TILE) // patch
    rate = fields.get("downsample_rate", str)
    parts = re.fullmatch(r"([1-9]\d?)/([1-9]\d?)", rate)
    if parts is None or 2 * int(parts[1]) != int(parts[2]) or side % int(parts[2]):
        raise UnsupportedModelError(
            f"{fields.path}: downsample_rate is {rate!r:.40}; implemented: n/2n, where 2n divides {side}, the patches "
            "of a tile's side"
        )
    grids = fields.values.get("image_grid_pinpoints") or GRIDS
    if (own := processor.values.get("image_grid_pinpoints", GRIDS)) != grids:
        raise InvalidFileError(f"{processor.path}: image_grid_pinpoints is {own!r:.80}; config.json has {grids!r:.80}")
    rule = square_rule(over(processor, said), 2 * patch)
    check_tiles(processor, rule.tile, patch, side, 2)
    count, size, found = values["num_layers"], values["hidden_size"], projectors_of(fields)
    if not found:
        raise InvalidFileError(f"{fields.path}: deepstack_layer_map is missing")
    layers = [layer if layer >= 0 else count + 1 + layer for _, layer, _ in found]
    if not all(0 < layer <= count for layer in layers):
        raise UnsupportedModelError(
            f"{fields.path}: deepstack_layer_map and spatial_vision_layer name layers that {count} blocks do not have"
        )
    if size % _HEAD:
        raise UnsupportedModelError(f"{fields.path}: hidden_size is {size}; projectors have heads of {_HEAD} elements")
    projector = fields.with_defaults(qformer_config=_QFORMER).section("qformer_config")
    projector.choice("hidden_act", "gelu", "gelu")
    for key, usual, only in (("num_hidden_layers", 12, 1), ("use_qformer_text_input", False, False)):
        if (told := projector.values.get(key, usual)) != only:
            raise UnsupportedModelError(f"{fields.path}: qformer_config.{key} is {told!r:.40}; implemented: {only}")
    factor = fields.section("text_config").get("residual_multiplier", float, 1.0)
    if not 0 < factor <= 1e6:
        raise InvalidFileError(f"{fields.path}: residual_multiplier is {factor}; it must be above 0 and at most 1e6")
    first = values["num_layers"] = max(layers)
    return Granite4VisionTowerConfig(
        **values,
        projectors=tuple((number, layer) for (number, _, _), layer in zip(found, layers)),
        num_experts=len(found),
        inner_size=projector.count("intermediate_size", 3072),
        projector_eps=projector.get("layer_norm_eps", float, 1e-12),
        window=int(parts[1]),
        windowed=frozenset(first + STEPS * number + step for number in range(len(found)) for step in (1, 2)),
        tiles=1 + max(rows * columns for rows, columns in rule.grids),
        factor=1 / factor,
        patch=patch,
        side=side,
        cell=2,
        text_size=text_size,
        rule=rule,
    )
