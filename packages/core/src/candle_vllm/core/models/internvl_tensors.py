# SPDX-License-Identifier: MIT
"""The tensors of InternVL's vision encoder: their names in three formats, and what is folded while they are loaded.

The names are those of transformers, of the original repositories, and of llama.cpp's files. transformers' class of
Qianfan-OCR has `layers` where that of InternVL has `encoder.layer`.
Shapes: T patches of a tile, E hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.loading.views import View, computed, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import siglip
from candle_vllm.core.models.siglip import patch_kernel
from candle_vllm.core.models.tower_family import TowerConfig
from candle_vllm.core.quantization.tensors import StoredTensor

_AT = ("vision_tower.embeddings.", "vision_model.embeddings.", "v.")
_IN = ("vision_tower.encoder.layer.{i}.", "vision_model.encoder.layers.{i}.", "v.blk.{i}.")
_TO = ("multi_modal_projector.", "mlp1.", "mm.model.mlp.")
_NAMES = {
    "layers.{i}.attention_norm:": (_IN, "layernorm_before", "norm1", "ln1"),
    "layers.{i}.q_norm:": (_IN, "attention.q_norm", "attn.q_norm", "attn_q_norm"),
    "layers.{i}.k_norm:": (_IN, "attention.k_norm", "attn.k_norm", "attn_k_norm"),
    "layers.{i}.output:": (_IN, "attention.projection_layer", "attn.proj", "attn_out"),
    "layers.{i}.mlp_norm:": (_IN, "layernorm_after", "norm2", "ln2"),
    "layers.{i}.mlp.up:": (_IN, "mlp.fc1", "mlp.fc1", "ffn_up"),
    "layers.{i}.mlp.down:": (_IN, "mlp.fc2", "mlp.fc2", "ffn_down"),
    "cell_norm:": (_TO, "layer_norm", "0", "0"),
    "first:": (_TO, "linear_1", "1", "1"),
    "second:": (_TO, "linear_2", "3", "3"),
}
_SCALED = (  # names of a block's scales, and of the matrices whose rows they multiply
    (("lambda_1", "ls1", "ls1.weight"), ("attention.projection_layer", "attn.proj", "attn_out")),
    (("lambda_2", "ls2", "ls2.weight"), ("mlp.fc2", "mlp.fc2", "ffn_down")),
)
_LAYERS = ("vision_tower.layers.", "vision_tower.encoder.layer.")
_KERNEL = ("patch_embeddings.projection.weight", "patch_embedding.weight", "patch_embd.weight")
_PLACED = (  # names of the kernel's bias, of the class token, and of the table of positions
    ("patch_embeddings.projection.bias", "patch_embedding.bias", "patch_embd.bias"),
    ("cls_token", "class_embedding", "class_embd"),
    ("position_embeddings", "position_embedding", "position_embd.weight"),
)


def _line(target: str, places: Iterable[str], names: Iterable[str], view: View | None = None) -> WeightName:
    hf, original, gguf = (at + name for at, name in zip(places, names))
    return WeightName(target, (hf, original), gguf, hf_view=view, gguf_view=view)


WEIGHTS = (
    _line("patches:weight", _AT, _KERNEL, patch_kernel),
    _line("positions:weight", _AT, _PLACED[-1]),
    *(
        _line(target + kind, places, [f"{name}.{kind}" for name in names])
        for target, (places, *names) in _NAMES.items()
        for kind in ("weight", "bias")
    ),
    *(
        WeightName(
            f"layers.{{i}}.qkv:{part}.{kind}",
            (f"{_IN[0]}attention.{part}_proj.{kind}", Seen(f"{_IN[1]}attn.qkv.{kind}", row_part(number, 3))),
            f"{_IN[2]}attn_{part}.{kind}",
        )
        for number, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
)


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Fold scales into matrices and biases; fold the class token and the bias of patches into the position table."""
    found = {name.replace(*_LAYERS): stored for name, stored in siglip.prepared(tensors, config).items()}
    found = {name: dataclasses.replace(stored, name=name) for name, stored in found.items()}
    for layer, (scales, matrices) in itertools.product(range(config.num_layers), _SCALED):
        for at, scale, matrix in zip((at.format(i=layer) for at in _IN), scales, matrices):
            parts = [f"{at}{matrix}.{kind}" for kind in ("weight", "bias")]
            factors, stored = found.get(at + scale), [found[name] for name in parts if name in found]
            if factors is not None and all(each.shape[:1] == factors.shape for each in stored):
                del found[at + scale]  # a scale of another shape is reported as unexpected
                found |= {each.name: _scaled(each, factors) for each in stored}
    for bias, token, table in (tuple(at + name for name in names) for at, names in zip(_AT, zip(*_PLACED))):
        if absent := [name for name in (token, bias) if table in found and name not in found]:
            raise WeightsError(f"{found[table].path}: tensor {absent[0]} is missing")
        if table in found:
            found[table] = joined_positions(found[table], found.pop(token), found.pop(bias), config)
    return found


def _scaled(stored: StoredTensor, factors: StoredTensor) -> StoredTensor:
    """Rows times factors, rounded to the stored type; quantised rows become F16."""
    kind, shape = stored.dtype or "F16", (-1, *[1] * (len(stored.shape) - 1))
    wide = computed(stored, stored.shape, lambda values: values * factors.load("F32").reshape(shape), "F32")
    return computed(wide, stored.shape, lambda values: values, kind)


def joined_positions(
    table: StoredTensor, token: StoredTensor, bias: StoredTensor | None, config: TowerConfig
) -> StoredTensor:
    """Positions [T + 1, E]: the class token's embedding is added to row 0, the bias of patches to the other rows."""
    shape = (config.side**2 + 1, config.hidden_size)
    if (table.numel, token.numel, (bias or token).numel) != (math.prod(shape), shape[1], shape[1]):
        return table  # the loader reports the wrong shape

    def joined(values: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = values.reshape(shape).copy()
        rows[0] += token.load("F32").reshape(-1)
        if bias is not None:
            rows[1:] += bias.load("F32").reshape(-1)
        return rows

    return computed(table, shape, joined, "F32")
