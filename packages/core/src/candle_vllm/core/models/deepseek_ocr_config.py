# SPDX-License-Identifier: MIT
"""Config of the vision encoders of DeepSeek-OCR 1 and Unlimited-OCR: SAM's (`sam_config.py`) and CLIP's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models.sam_config import (
    SamConfig,
    completed,
    sam_from_gguf,
    sam_from_hf,
    sam_from_original,
    shared,
)
from candle_vllm.core.models.siglip import processor_of_gguf
from candle_vllm.core.models.tower_family import TowerConfig
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING

_TILE, _MOST_TILES, _MOST_OF_UNLIMITED = 640, 9, 32
_EPS = 1e-5  # of the norms of CLIP's encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekOcrTowerConfig(SamConfig):
    """Config of these vision encoders.

    Attributes:
        clip: config of CLIP's encoder, whose patches are the rows of SAM's; `learned` is the side of its positions.
    """

    clip: TowerConfig

    def rows_behind(self, layer: int, count: int) -> int:
        """See `SamConfig`; the layers of CLIP have a class token, the last norm has a row for each patch."""
        if layer == 3 + self.clip.num_layers + 1:
            return count
        return count // 16 + 1 if layer > 2 else super().rows_behind(layer, count)

    @property
    def cell_size(self) -> int:
        """See `TowerConfig`."""
        return self.clip.hidden_size + self.channels[2]

    @property
    def sides(self) -> tuple[int, ...]:
        """Rows of embeddings of the tiles, the largest first."""
        return tuple(side // 4 for side in reversed(self.tiles))

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds what CLIP's layers and the projection need."""
        each = 16 * self.clip.hidden_size + 2 * self.clip.intermediate_size + 4 * self.cell_size
        return super().step_bytes(threads) + 4 * self.patches * each


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> DeepseekOcrTowerConfig:
    """Read `config.json` of the original repository, and the settings of images."""
    first, own = _original(fields.section("vision_config"))
    return _config(processor, said, first, text_size, **own)


def unlimited_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> DeepseekOcrTowerConfig:
    """Read `config.json` of Unlimited-OCR, in the original or transformers' format, and the settings of images."""
    vision = fields.section("vision_config")
    if "width" in vision:
        first, own = _original(vision)
    else:
        clip = vision.section("encoder_config")
        clip.choice("hidden_act", "quick_gelu", "quick_gelu")
        size = clip.count("hidden_size", 1024)
        first = sam_from_hf(vision.section("sam_config").with_absent(mlp_dim=3072, downsample_channels=[512, 1024]))
        own = {
            "size": size,
            "inner": clip.count("intermediate_size", 4096),
            "layers": clip.count("num_hidden_layers", 24, most=MAX_LAYERS),
            "heads": clip.count("num_attention_heads", 16),
            "side": clip.count("image_size", 224, most=MAX_TILE) // clip.count("patch_size", 14),
            "eps": clip.get("layer_norm_eps", float, _EPS),
        }
    return _config(processor, said, first, text_size, most=_MOST_OF_UNLIMITED, **own)


def _original(vision: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `SamConfig`, and the sizes of CLIP's encoder, in the original repositories."""
    clip = vision.section("width").section("clip-l-14-224")
    size = clip.count("width", 1024)
    return sam_from_original(vision, [512, size]), {
        "size": size,
        "inner": 4 * size,
        "layers": clip.count("layers", 24, most=MAX_LAYERS),
        "heads": clip.count("heads", 16),
        "side": clip.count("image_size", 224, most=MAX_TILE) // clip.count("patch_size", 14),
    }


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> DeepseekOcrTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`. See `completed_clip`."""
    size, whole = fields.count("embedding_length"), fields.count("image_size", 1024, most=MAX_TILE)
    images: dict[str, Any] = {"size": {"height": whole, "width": whole}, "tile_size": whole * 5 // 8}
    images |= {f"{which}_patches": fields.count(f"preproc_{which}_tiles", n) for which, n in (("min", 2), ("max", 9))}
    return _config(
        processor_of_gguf(fields, images),
        said,
        sam_from_gguf(fields, size),
        text_size,
        size=size,
        inner=4 * size,
        layers=fields.count("block_count", most=MAX_LAYERS),
        heads=fields.count("attention.head_count"),
        side=16,
    )


def completed_clip(config: DeepseekOcrTowerConfig, tensors: Mapping[str, StoredTensor]) -> DeepseekOcrTowerConfig:
    """See `completed`; adds the sizes of CLIP's MLP and of its positions."""
    inner, table = tensors.get("v.blk.0.ffn_up.weight"), tensors.get("v.position_embd.weight")
    sizes = inner.shape[0] if inner else 1, math.isqrt(table.shape[0]) if table else 1
    clip = dataclasses.replace(config.clip, intermediate_size=sizes[0], learned=sizes[1])
    return dataclasses.replace(completed(config, tensors), clip=clip)


def _config(
    processor: Fields,
    said: Mapping[str, Any],
    first: Mapping[str, Any],
    text_size: int,
    *,
    most: int = _MOST_TILES,
    **own: Any,
) -> DeepseekOcrTowerConfig:
    if not 0 < own["side"] <= 256:
        raise InvalidFileError(
            f"{processor.path}: CLIP's encoder has {own['side']} rows of positions; it must be 1 to 256"
        )
    if first["channels"][2] != own["size"]:
        raise InvalidFileError(
            f"{processor.path}: downsample_channels ends with {first['channels'][2]}; CLIP's encoder has {own['size']}"
        )
    values = shared(processor, said, _TILE, most, first, ends=True, fills=most == _MOST_OF_UNLIMITED)
    clip = TowerConfig(
        hidden_size=own["size"], intermediate_size=own["inner"], num_layers=own["layers"], num_heads=own["heads"],
        norm_eps=own.get("eps", _EPS), activation="quick_gelu", patch=1, side=own["side"], cell=1, text_size=text_size,
        rule=values["rule"], learned=own["side"],
    )  # fmt: skip
    layers = max(first["blocks"], clip.num_layers)
    return DeepseekOcrTowerConfig(**values, clip=clip, num_layers=layers, text_size=text_size)
