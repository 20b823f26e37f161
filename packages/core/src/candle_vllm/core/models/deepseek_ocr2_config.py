# SPDX-License-Identifier: MIT
"""Config of the vision encoders of DeepSeek-OCR 2: SAM's (`sam_config.py`) and that with the layers of Qwen2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.models.sam_config import SamConfig, sam_from_gguf, sam_from_hf, sam_from_original, shared
from candle_vllm.core.models.siglip import processor_of_gguf
from candle_vllm.core.vision.preprocessing import MAX_TILE, NOTHING

SIDES = (16, 12)  # rows and columns of the learned queries
_TILE, _MOST_TILES = 768, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekOcr2TowerConfig(SamConfig):
    """Config of these vision encoders; the fields are those of Qwen2's layers.

    Attributes:
        size, inner, depth, heads, kv_heads: E, inner size of the MLP, number of layers, H and K.
        eps, theta: epsilon of the norms, and base of the rotary embedding.
    """

    size: int
    inner: int
    depth: int
    heads: int
    kv_heads: int
    eps: float
    theta: float

    def rows_behind(self, layer: int, count: int) -> int:
        """See `SamConfig`; the layers of Qwen2 have rows and queries, the last norm has a row for each patch."""
        if layer == 3 + self.depth + 1:
            return count
        return count // 8 if layer > 2 else super().rows_behind(layer, count)

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds what the layers of Qwen2 need."""
        wide = (2 * self.heads + 4 * self.kv_heads) * (self.size // self.heads + SIDES[0] ** 2)
        return super().step_bytes(threads) + 4 * self.patches * (wide + 8 * self.size + 3 * self.inner)

    @property
    def cell_size(self) -> int:
        """See `TowerConfig`."""
        return self.size

    def cells(self, hidden: Any) -> Any:
        """See `TowerConfig`; the rows of a cell's patches are the same."""
        return hidden[:: self.cell**2]


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> DeepseekOcr2TowerConfig:
    """Read `config.json` and `preprocessor_config.json`, in transformers' or the original format."""
    vision = fields.section("vision_config")
    if "width" in vision:
        size = vision.section("width").section("qwen2-0-5b").count("dim", 896)
        published = {"inner": 4864, "depth": 24, "heads": 14, "kv_heads": 2, "eps": 1e-6, "theta": 1e6}
        first = sam_from_original(vision, [512, size])
        return _config(processor, said, first, text_size=text_size, size=size, **published)
    qwen = vision.section("encoder_config")
    qwen.choice("hidden_act", "silu", "silu", "swish")
    if qwen.get("use_sliding_window", bool, False):
        raise UnsupportedModelError(f"{fields.path}: use_sliding_window of encoder_config is true; implemented: false")
    rotation = qwen.section("rope_parameters")
    rotation.choice("rope_type", "default", "default")
    return _config(
        processor,
        said,
        sam_from_hf(vision.section("sam_config").with_defaults(downsample_channels=[512, 896])),
        text_size=text_size,
        size=qwen.count("hidden_size", 4096),
        inner=qwen.count("intermediate_size", 22016),
        depth=qwen.count("num_hidden_layers", 32, most=MAX_LAYERS),
        heads=(heads := qwen.count("num_attention_heads", 32)),
        kv_heads=qwen.count("num_key_value_heads", heads),
        eps=qwen.get("rms_norm_eps", float, 1e-6),
        theta=rotation.get("rope_theta", float, qwen.get("rope_theta", float, 10000.0)),
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> DeepseekOcr2TowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`."""
    size, whole = fields.count("embedding_length"), fields.count("image_size", 1024, most=MAX_TILE)
    images: dict[str, Any] = {"size": {"height": whole, "width": whole}, "tile_size": whole * SIDES[1] // SIDES[0]}
    images |= {f"{which}_patches": fields.count(f"preproc_{which}_tiles", n) for which, n in (("min", 2), ("max", 6))}
    return _config(
        processor_of_gguf(fields, images),
        said,
        sam_from_gguf(fields, size),
        text_size=text_size,
        size=size,
        inner=fields.count("feed_forward_length"),
        depth=fields.count("block_count", most=MAX_LAYERS),
        heads=fields.count("attention.head_count"),
        kv_heads=fields.count("attention.head_count_kv"),
        eps=fields.get("attention.layer_norm_epsilon", float, 1e-6),
        theta=1e6,
    )


def _config(
    processor: Fields, said: Mapping[str, Any], first: Mapping[str, Any], **own: Any
) -> DeepseekOcr2TowerConfig:
    size, heads, kv_heads = own["size"], own["heads"], own["kv_heads"]
    if size % (2 * heads) or heads % kv_heads or size // heads > 1024:
        raise InvalidFileError(f"{processor.path}: the encoder has {size} elements, {heads} and {kv_heads} heads")
    if size % 16 or size // heads * kv_heads % 16:
        raise UnsupportedModelError(
            f"{processor.path}: queries and keys of the encoder have {size} and {size // heads * kv_heads} elements; "
            "implemented: multiples of 16"
        )
    if first["channels"][2] != size:
        raise InvalidFileError(
            f"{processor.path}: downsample_channels ends with {first['channels'][2]}; hidden_size is {size}"
        )
    if not 0 < own["eps"] < 1 or not 1 <= own["theta"] <= 1e12:
        raise InvalidFileError(f"{processor.path}: rms_norm_eps is {own['eps']}, and rope_theta {own['theta']}")
    values = shared(processor, said, _TILE, _MOST_TILES, first)
    if any(side // 4 not in SIDES for side in values["tiles"]):
        raise InvalidFileError(
            f"{processor.path}: tiles of {values['tiles']} patches; the model has queries for tiles of "
            f"{4 * SIDES[1]} and {4 * SIDES[0]} patches"
        )
    return DeepseekOcr2TowerConfig(**values, **own, num_layers=max(first["blocks"], own["depth"]))
