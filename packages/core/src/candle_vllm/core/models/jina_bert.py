# SPDX-License-Identifier: MIT
"""jina-embeddings-v2: BERT with ALiBi in both directions instead of a position table, and a GELU gate.

The head's slope times the distance of query and key is subtracted from each score. Sources: Günther et al., 2023,
arXiv:2310.19923; Press et al., 2021, arXiv:2108.12409 (ALiBi).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.attention import alibi_slopes
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.encoder_parts import (
    block_names,
    ignored,
    prefix_of,
    sizes_from_gguf,
    sizes_from_hf,
    table_names,
    types_from_gguf,
)
from candle_vllm.core.models.encoder_stack import PlainEncoder, StackConfig
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.quantization.tensors import StoredTensor

_FLAGS: dict[str, Any] = {"placed": False, "gate": "gelu", "mlp_bias": False}

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> StackConfig:
    """Read `config.json` of repositories with remote code."""
    del scores
    fields.choice("position_embedding_type", "alibi", "alibi")
    fields.choice("feed_forward_type", "geglu", "geglu")
    types = fields.get("type_vocab_size", int, 2)
    return StackConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=fields.count("max_position_embeddings"),
        norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        token_types=max(types, 1),
        typed=types > 0,
        **_FLAGS,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> StackConfig:
    """Read GGUF metadata of jina-bert-v2."""
    if any(name.startswith(("blk.0.attn_q_norm.", "blk.0.attn_norm_2.")) for name in checkpoint.tensors):
        raise UnsupportedModelError(f"{checkpoint.path}: norms of queries and keys (jina v2 code) are not implemented")
    return StackConfig(
        model_type="jina_bert",
        **sizes_from_gguf(fields, checkpoint),
        **types_from_gguf(checkpoint),
        **_FLAGS,
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Alibi:
    """The bias of each head's scores by distance: `table` [H, 2 P - 1], where P is `max_position`."""

    def __init__(self, config: StackConfig, placement: Placement) -> None:
        away = np.abs(np.arange(1 - config.max_position, config.max_position))
        table = np.zeros((1, 1)) if placement.shapes_only else -np.array(alibi_slopes(config.num_heads))[:, None] * away
        self.table = placement.constant(np.ascontiguousarray(table, np.float32))


# ---- model -----------------------------------------------------------------------------------------------------------


def build(config: StackConfig, placement: Placement) -> PlainEncoder:
    """Build the model without its weights."""
    return PlainEncoder(config, placement, Alibi(config, placement))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _up(stored: StoredTensor, config: StackConfig) -> StoredTensor:
    """The rows of "up": files store "up" alone, or in one matrix after the rows of the gate."""
    whole = stored.shape[:1] == (2 * config.intermediate_size,)
    return row_part(1, 2)(stored, config) if whole else stored


def weights(config: StackConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of weight names."""
    del config
    at = prefix_of(stored, "embeddings.word_embeddings.weight")
    layer, block = f"{at}encoder.layer.{{i}}.", "blk.{i}."
    halves = [Seen(f"{layer}mlp.gated_layers.weight", row_part(half, 2)) for half in range(2)]
    own = {"mlp.up:": (), "mlp.down:": ("mlp.wo",), "mlp_norm:": ("mlp.layernorm",)}
    return [
        *table_names(at, ("pooler.dense", "classifier")),
        *block_names(layer, own),
        WeightName(
            "layers.{i}.mlp.gate_up:gate.weight",
            halves[0],
            (f"{block}ffn_gate.weight", Seen(f"{block}ffn_up.weight", row_part(0, 2))),
        ),
        WeightName("layers.{i}.mlp.gate_up:up.weight", halves[1], Seen(f"{block}ffn_up.weight", _up)),
    ]


FAMILY = EncoderFamily(
    hf={"JinaBertModel": ("jina_bert", False), "JinaBertForMaskedLM": ("jina_bert", False)},
    gguf=("jina-bert-v2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=build,
    weights=weights,
    ignored=ignored,
)
