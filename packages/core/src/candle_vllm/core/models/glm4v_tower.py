# SPDX-License-Identifier: MIT
"""The vision encoders of GLM-4.1V, 4.5V and 4.6V, and of GLM-OCR, with their projection to the text model.

Each block is x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms and gated MLPs; queries and keys rotate by
the row and the column of their patch. After the last norm a convolution makes one vector of a cell of 2 x 2 patches,
and a gated MLP projects it to an embedding. GLM-4V normalises the embedded patches and adds learned positions of a
grid, which are interpolated to the image's grid; GLM-OCR and GLM-5.3-Flash (`glm5_next_tower.py`) have neither, but
normalise queries and keys.
Source: GLM-V Team, 2025, arXiv:2507.01006.
Shapes: T patches, E hidden, C cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.recorded import GateKind, Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS
from candle_vllm.core.loading.views import computed, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.grid_positions import GridPositions, cubic
from candle_vllm.core.models.local_layers import refuse_others
from candle_vllm.core.models.qwen_vl import (
    FRAMES,
    MOST_PATCHES,
    QwenTower,
    QwenTowerConfig,
    check_sizes,
    kernel,
    prepared,
    rule_of,
)
from candle_vllm.core.models.siglip import gguf_sizes, require_true
from candle_vllm.core.models.tower_family import TowerFamily, TowerStep, mark_of_cells, turned_by_grid
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, AreaRule

# ---- config ----------------------------------------------------------------------------------------------------------

_EDGES = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmTowerConfig(QwenTowerConfig):
    """Config of these vision encoders.

    Attributes:
        projected: elements of the projection's gate.
        head_norms: queries and keys are normalised (GLM-OCR).
        qkv_bias: the projection to q, k and v has a bias, and with `head_norms` every matrix of a block.
        gate: activation of the gates of all MLPs.
    """

    projected: int
    head_norms: bool
    qkv_bias: bool
    gate: GateKind = "silu"

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the projection's gate, and the parts of queries, keys and values."""
        more = 256 * 4 * 4 * (3 * self.projected + 3 * self.text_size)
        return super().step_bytes(threads) + more + 4 * self.patches * 6 * self.hidden_size


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GlmTowerConfig:
    """Read `config.json` and `preprocessor_config.json` of GLM-4V and GLM-OCR."""
    vision, ocr = fields.section("vision_config"), fields.get("architectures", list)[0].startswith("GlmOcr")
    vision.choice("hidden_act", "silu", "silu", "swish")
    patch, cell = vision.count("patch_size", 14), vision.count("spatial_merge_size", 2, most=64)
    check_sizes(vision, processor, patch, cell, temporal_patch_size=FRAMES, out_hidden_size=text_size)
    inner = vision.count("intermediate_size", 4096 if ocr else 13696)
    return _config(
        ocr=ocr,
        hidden_size=vision.count("hidden_size", 1024 if ocr else 1536),
        intermediate_size=inner if ocr else text_size,
        projected=3 * text_size if ocr else inner,
        num_layers=vision.count("depth", 24, most=MAX_LAYERS),
        num_heads=vision.count("num_heads", 16 if ocr else 12),
        norm_eps=vision.get("rms_norm_eps", float, 1e-5),
        qkv_bias=vision.get("attention_bias", bool, ocr),
        learned=0 if ocr else vision.count("image_size", 336) // patch,
        patch=patch,
        cell=cell,
        text_size=text_size,
        rule=_rule(processor, patch, cell, said),
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> GlmTowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files; keys begin with `clip.vision.`. See `completed`."""
    require_true(fields, "clip.use_silu")
    refuse_others(fields, {"swiglu_limit": 0.0})
    values, cell = gguf_sizes(fields, 1e-5), fields.count("spatial_merge_size", 2, most=64)
    patch, inner = values["patch"], values.pop("intermediate_size")
    pixels = FRAMES * (patch * cell) ** 2
    edges = {
        "shortest_edge": FRAMES * fields.count("image_min_pixels", _EDGES["shortest_edge"] // FRAMES),
        "longest_edge": FRAMES * fields.count("image_max_pixels", 4096 * pixels // FRAMES),
    }
    means = {name: fields.values[fields.prefix + name] for name in ("image_mean", "image_std") if name in fields}
    return _config(
        ocr=False,
        **values,
        intermediate_size=text_size,
        projected=inner,
        qkv_bias=False,
        learned=fields.count("image_size") // patch,
        cell=cell,
        text_size=text_size,
        rule=_rule(Fields({"size": edges, **means}, fields.path), patch, cell, said),
    )


def completed(config: GlmTowerConfig, tensors: Mapping[str, StoredTensor]) -> GlmTowerConfig:
    """Add what only the tensors of a GGUF file show: whether the encoder is GLM-OCR's, and whether it has biases."""
    biased = any(f"v.blk.0.attn_{part}.bias" in tensors for part in ("q", "qkv"))
    if "v.blk.0.attn_q_norm.weight" not in tensors:
        return dataclasses.replace(config, qkv_bias=biased)
    sizes = {"intermediate_size": config.projected, "projected": 3 * config.text_size}
    return dataclasses.replace(config, **sizes, head_norms=True, learned=0, qkv_bias=biased)


def _rule(processor: Fields, patch: int, cell: int, said: Mapping[str, Any]) -> AreaRule:
    """How images are resized: as in `qwen_vl`, but the limits count both frames, and very small images grow first."""
    usual = Fields({"size": _EDGES, **processor.values}, processor.path)
    rule = rule_of(usual, patch, cell, said, FRAMES * MOST_PATCHES)
    return msgspec.structs.replace(rule, least=-(-rule.least // FRAMES), most=rule.most // FRAMES, grows="cut")


def _config(*, ocr: bool, rule: AreaRule, patch: int, cell: int, **own: Any) -> GlmTowerConfig:
    most: dict[str, Any] = {"side": rule.longest // patch, "most_patches": rule.most_cells * cell**2}
    kind: dict[str, Any] = {"gated": True, "activation": "gelu", "head_norms": ocr}
    return GlmTowerConfig(**own, **most, **kind, patch=patch, cell=cell, rule=rule)


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: GlmTowerConfig, tables: tuple[Value, Value], placement: Placement) -> None:
        size, eps, ocr = config.hidden_size, config.norm_eps, config.head_norms
        self.heads, self.head_dim, self.tables = config.num_heads, size // config.num_heads, tables
        self.attention_norm, self.mlp_norm = RMSNorm(size, eps, placement), RMSNorm(size, eps, placement)
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps, placement) if ocr else None for _ in "qk")
        self.output = Linear(size, size, placement, bias=ocr and config.qkv_bias)
        biased = ocr and config.qkv_bias
        self.mlp = GatedMLP(size, config.intermediate_size, placement, bias=biased, activation=config.gate)

    def __call__(self, x: Value, step: TowerStep) -> Value:
        qkv = self.qkv(self.attention_norm(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([self.heads * self.head_dim] * 3, dim=-1)
            heads = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
            qkv = side_by_side(*(norm(each).flatten(1) for norm, each in zip((self.q_norm, self.k_norm), heads)), v)
        turned = Turned(step.places, *self.tables)
        x = x + self.output(whole_attention(qkv, self.heads, step.lengths, turned))
        return x + self.mlp(self.mlp_norm(x))


# ---- model -----------------------------------------------------------------------------------------------------------


class GlmTower(QwenTower):
    """The vision encoder: patches of an image to embeddings; see `Tower`. Positions are placed as in `QwenTower`."""

    def __init__(self, config: GlmTowerConfig, placement: Placement) -> None:
        size, joined, text = config.hidden_size, config.cell_size, config.text_size
        self.config = config
        self.patches = Linear(config.patch_size, size, placement, bias=True)
        self.patch_norm = RMSNorm(size, config.norm_eps, placement) if config.learned else None
        self.positions = GridPositions(config.learned, size, placement, cubic) if config.learned else None
        empty = np.zeros((config.most_patches, size // config.num_heads // 2), np.float32)
        self._tables = placement.constant(empty), placement.constant(empty.copy())  # filled by `place`
        self.layers = [Block(config, self._tables, placement) for _ in range(config.num_layers)]
        self.norm = RMSNorm(size, config.norm_eps, placement)
        self.joined = Linear(joined, text, placement, bias=True)
        self.projector = Linear(text, text, placement)
        self.projected_norm = LayerNorm(text, 1e-5, placement)
        self.mlp = GatedMLP(text, config.projected, placement, activation=config.gate)
        self.mergers = []

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        x = self.patches(patches)
        return x if self.patch_norm is None else step.start + self.patch_norm(x)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        normed = side_by_side(self.projected_norm(self.projector(self.joined(cells))))  # `activation` reads stored rows
        return self.mlp(activation(normed, "gelu"))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _cell_kernel(stored: StoredTensor, config: Any) -> StoredTensor:
    """The kernel of the convolution over a cell [text size, E, s, s] as a matrix [text size, s * s * E]."""
    side, size = config.cell, config.hidden_size
    if stored.shape != (config.text_size, size, side, side):
        return stored  # the loader reports the wrong shape
    shape = (config.text_size, config.cell_size)
    return computed(stored, shape, lambda values: np.moveaxis(values, 1, -1).reshape(shape))


_AT, _LAYER, _BLOCK = "visual.", "visual.blocks.{i}.", "v.blk.{i}."
_QKV = [
    WeightName(
        f"layers.{{i}}.qkv:{part}.{kind}",
        Seen(f"{_LAYER}attn.qkv.{kind}", row_part(number, 3)),
        (f"{_BLOCK}attn_{part}.{kind}", Seen(f"{_BLOCK}attn_qkv.{kind}", row_part(number, 3))),
    )
    for number, part in enumerate("qkv")
    for kind in ("weight", "bias")
]
_NAMES = {
    "layers.{i}.attention_norm:": (_LAYER + "norm1", _BLOCK + "ln1"),
    "layers.{i}.q_norm:": (_LAYER + "attn.q_norm", _BLOCK + "attn_q_norm"),
    "layers.{i}.k_norm:": (_LAYER + "attn.k_norm", _BLOCK + "attn_k_norm"),
    "layers.{i}.output:": (_LAYER + "attn.proj", _BLOCK + "attn_out"),
    "layers.{i}.mlp_norm:": (_LAYER + "norm2", _BLOCK + "ln2"),
    "layers.{i}.mlp.gate_up:gate.": (_LAYER + "mlp.gate_proj", _BLOCK + "ffn_gate"),
    "layers.{i}.mlp.gate_up:up.": (_LAYER + "mlp.up_proj", _BLOCK + "ffn_up"),
    "layers.{i}.mlp.down:": (_LAYER + "mlp.down_proj", _BLOCK + "ffn_down"),
    "patch_norm:": (_AT + "post_conv_layernorm", "v.norm_embd"),
    "positions:": (_AT + "embeddings.position_embedding", "v.position_embd"),
    "norm:": (_AT + "post_layernorm", "v.post_ln"),
    "projector:": (_AT + "merger.proj", "mm.model.fc"),
    "projected_norm:": (_AT + "merger.post_projection_norm", "mm.post_norm"),
    "mlp.gate_up:gate.": (_AT + "merger.gate_proj", "mm.gate"),
    "mlp.gate_up:up.": (_AT + "merger.up_proj", "mm.up"),
    "mlp.down:": (_AT + "merger.down_proj", "mm.down"),
}
_PATCH, _CELL = "patch_embed.proj.", "downsample."
WEIGHTS = (
    WeightName("patches:weight", _AT + _PATCH + "weight", "v.patch_embd.weight", hf_view=kernel, gguf_view=kernel),
    WeightName("patches:bias", _AT + _PATCH + "bias", "v.patch_embd.bias"),
    *_QKV,
    *(line for target, (hf, gguf) in _NAMES.items() for line in pair(target, hf, gguf)),
    WeightName(
        "joined:weight", _AT + _CELL + "weight", "mm.patch_merger.weight", hf_view=_cell_kernel, gguf_view=_cell_kernel
    ),
    WeightName("joined:bias", _AT + _CELL + "bias", "mm.patch_merger.bias"),
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

MARK = "<|image|>"


FAMILY = TowerFamily(
    name="glm4v_tower",
    hf={
        "Glm4vForConditionalGeneration": "glm4v",
        "Glm4vMoeForConditionalGeneration": "glm4v_moe",
        "Glm46VForConditionalGeneration": "glm46v",
        "GlmOcrForConditionalGeneration": "glm_ocr",
    },
    gguf=("glm4v",),
    settings=("min_pixels", "max_pixels", "size.shortest_edge", "size.longest_edge"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    completed=completed,
    prepared=prepared,
    build=GlmTower,
    weights=WEIGHTS,
    mark=MARK,
    written=f"<|begin_of_image|>{MARK}<|end_of_image|>",
    words_around=mark_of_cells(MARK),
    turned=turned_by_grid,
)
