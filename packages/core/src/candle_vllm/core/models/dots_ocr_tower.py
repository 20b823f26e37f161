# SPDX-License-Identifier: MIT
"""The vision encoder of dots.ocr, with its projection to the text model, which is Qwen2.

The blocks are GLM-4V's (`glm4v_tower.py`): x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms and gated
MLPs; queries and keys rotate by the row and the column of their patch. The embedded patches are normalised. After the
last norm and a layer norm of the projection, cells of 2 x 2 patches become one vector, which two matrices project to an
embedding. The text model's positions are those of text.
Source: Li et al., 2025, arXiv:2512.02498.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.glm4v_tower import Block, GlmTowerConfig
from candle_vllm.core.models.paddleocr_tower import LastNorms
from candle_vllm.core.models.qwen_vl import QwenTower, check_sizes, kernel, prepared, rule_of
from candle_vllm.core.models.siglip import area_of_gguf, gguf_sizes, require_true
from candle_vllm.core.models.tower_family import TowerFamily, TowerStep, mark_of_cells
from candle_vllm.core.vision.preprocessing import NOTHING

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GlmTowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config")
    for key, known in (("use_bias", False), ("post_norm", True), ("is_causal", False)):
        if vision.get(key, bool, known) != known:
            raise UnsupportedModelError(f"{fields.path}: vision_config.{key} is {not known}; implemented: {known}")
    patch, cell = vision.count("patch_size", 14), vision.count("spatial_merge_size", 2, most=64)
    sizes = {"num_channels": 3, "temporal_patch_size": 1, "hidden_size": text_size}
    check_sizes(vision, processor, patch, cell, frames=1, **sizes)
    return _config(
        processor,
        said,
        hidden_size=vision.count("embed_dim", 1536),
        intermediate_size=vision.count("intermediate_size", 4224),
        num_layers=vision.count("num_hidden_layers", 42, most=MAX_LAYERS),
        num_heads=vision.count("num_attention_heads", 12),
        norm_eps=vision.get("rms_norm_eps", float, 1e-5),
        patch=patch,
        cell=cell,
        text_size=text_size,
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> GlmTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`."""
    require_true(fields, "clip.use_silu")
    return _config(
        area_of_gguf(fields),
        said,
        **gguf_sizes(fields, 1e-5),
        cell=fields.count("projector.scale_factor", 2, most=64),
        text_size=text_size,
    )


def _config(processor: Fields, said: Mapping[str, Any], *, patch: int, cell: int, **own: Any) -> GlmTowerConfig:
    rule = rule_of(processor, patch, cell, said)
    most: dict[str, Any] = {"side": rule.longest // patch, "most_patches": rule.most_cells * cell**2}
    kind: dict[str, Any] = {"gated": True, "activation": "gelu", "head_norms": False, "qkv_bias": False}
    return GlmTowerConfig(**own, **most, **kind, projected=0, patch=patch, cell=cell, rule=rule)


# ---- model -----------------------------------------------------------------------------------------------------------


class DotsOcrTower(QwenTower):
    """The vision encoder: patches of an image to embeddings; see `Tower`."""

    def __init__(self, config: GlmTowerConfig, placement: Placement) -> None:
        size, joined = config.hidden_size, config.cell_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.patch_norm = RMSNorm(size, config.norm_eps, placement)
        self.positions = None
        empty = np.zeros((config.most_patches, size // config.num_heads // 2), np.float32)
        self._tables = placement.constant(empty), placement.constant(empty.copy())  # filled by `place`
        self.layers = [Block(config, self._tables, placement) for _ in range(config.num_layers)]
        self.norm = LastNorms(RMSNorm(size, config.norm_eps, placement), LayerNorm(size, 1e-6, placement))
        self.joined = Linear(joined, joined, placement, bias=True)
        self.projector = Linear(joined, config.text_size, placement, bias=True)
        self.mergers = []

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        del step
        return side_by_side(self.patch_norm(self.patches(patches)))


# ---- weight names ----------------------------------------------------------------------------------------------------

_AT, _LAYER, _BLOCK = "vision_tower.", "vision_tower.blocks.{i}.", "v.blk.{i}."
_PATCH = _AT + "patch_embed.patchifier."
_NAMES = {
    "layers.{i}.attention_norm:": (_LAYER + "norm1", _BLOCK + "ln1"),
    "layers.{i}.output:": (_LAYER + "attn.proj", _BLOCK + "attn_out"),
    "layers.{i}.mlp_norm:": (_LAYER + "norm2", _BLOCK + "ln2"),
    "layers.{i}.mlp.gate_up:gate.": (_LAYER + "mlp.fc1", _BLOCK + "ffn_gate"),
    "layers.{i}.mlp.gate_up:up.": (_LAYER + "mlp.fc3", _BLOCK + "ffn_up"),
    "layers.{i}.mlp.down:": (_LAYER + "mlp.fc2", _BLOCK + "ffn_down"),
    "patch_norm:": (_PATCH + "norm", ("v.pre_ln", "v.norm_embd")),
    "norm.last:": (_AT + "post_trunk_norm", ("mm.post_norm", "v.post_ln")),
    "norm.projection:": (_AT + "merger.ln_q", "mm.input_norm"),
    "joined:": (_AT + "merger.mlp.0", "mm.0"),
    "projector:": (_AT + "merger.mlp.2", "mm.2"),
}
WEIGHTS = (
    WeightName("patches:weight", _PATCH + "proj.weight", "v.patch_embd.weight", hf_view=kernel, gguf_view=kernel),
    WeightName("patches:bias", _PATCH + "proj.bias", "v.patch_embd.bias"),
    *(
        WeightName(
            f"layers.{{i}}.qkv:{part}.weight",
            Seen(f"{_LAYER}attn.qkv.weight", row_part(number, 3)),
            (f"{_BLOCK}attn_{part}.weight", Seen(f"{_BLOCK}attn_qkv.weight", row_part(number, 3))),
        )
        for number, part in enumerate("qkv")
    ),
    *(line for target, (hf, gguf) in _NAMES.items() for line in pair(target, hf, gguf)),
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<|imgpad|>"


FAMILY = TowerFamily(
    name="dots_ocr_tower",
    hf={"DotsOCRForCausalLM": "dots_ocr"},
    gguf=("dots_ocr",),
    settings=("min_pixels", "max_pixels", "size.shortest_edge", "size.longest_edge"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=DotsOcrTower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"<|img|>{_MARK}<|endofimg|>",
    words_around=mark_of_cells(_MARK),
)
