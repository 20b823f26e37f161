# SPDX-License-Identifier: MIT
"""DeBERTa v2 and v3: BERT's blocks with disentangled attention, content to position and position to content.

Distant relative positions share buckets. It runs op by op in torch. Source: He et al., 2020, arXiv:2006.03654,
and 2021, arXiv:2111.09543 (v3). Shapes: P maximum number of tokens of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.whole_attention import disentangled_attention
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    Table,
    block_names,
    check_only,
    head_of,
    ignored,
    prefix_of,
    sizes_from_hf,
    table_names,
)
from candle_vllm.core.models.encoder_stack import Attend, Block, PlainEncoder, StackConfig
from candle_vllm.core.models.family import EncoderFamily

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(StackConfig):
    """Config of a DeBERTa model.

    Attributes:
        buckets: buckets of relative positions on each side, the farther half in logarithmic steps; 0 for no bucketing.
        farthest: distance from which on all positions share a bucket.
    """

    buckets: int
    farthest: int


# the defaults of these keys, and the implemented values
_DEFAULTS = {"relative_attention": False, "share_att_key": False, "position_biased_input": True, "norm_rel_ebd": "none"}
_ONLY: dict[str, object] = {"relative_attention": True, "share_att_key": True, "position_biased_input": False}
_ONLY |= {"norm_rel_ebd": "layer_norm", "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 0, "type_vocab_size": 0}
_ONLY |= {"attention_head_size": None}


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> DebertaConfig:
    """Read `config.json` of deberta-v2."""
    said = {key: value for key, value in fields.values.items() if value is not None}
    kinds = said.get("pos_att_type")
    kinds = kinds.split("|") if isinstance(kinds, str) else fields.get("pos_att_type", list, [])
    said["pos_att_type"] = sorted(map(str, kinds))
    only = _ONLY | {"embedding_size": fields.count("hidden_size")}
    check_only(Fields(_DEFAULTS | said, fields.path), model_type, only)
    buckets, most = fields.get("position_buckets", int, -1), fields.get("max_relative_positions", int, -1)
    if buckets == 1 or max(buckets, most) > MAX_COUNT:
        raise InvalidFileError(f"{fields.path}: {buckets} buckets of {most} relative positions are not possible")
    return DebertaConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=(position := fields.count("max_position_embeddings", 512)),
        norm_eps=fields.get("layer_norm_eps", float, 1e-7),
        typed=False,
        placed=False,
        activation=fields.choice("hidden_act", "gelu", *ACTIVATIONS),
        head_activation=ACTIVATIONS[fields.choice("pooler_hidden_act", "gelu", *ACTIVATIONS)],
        buckets=max(buckets, 0),
        farthest=most if most > 0 else position,
        **head_of(fields, scores=scores),
    )


# ---- attention and model ---------------------------------------------------------------------------------------------


def rows_of_distances(config: DebertaConfig) -> np.ndarray:
    """The row in the table of relative positions for each distance of query minus key, int64 [2 P - 1].

    Logarithms are computed in float32, as in training.
    """
    away, span = np.arange(1 - config.max_position, config.max_position), config.buckets or config.farthest
    if config.buckets:
        middle, wide = config.buckets // 2, np.maximum(abs(away), 1).astype(np.float32)
        most = np.log(np.float32((config.farthest - 1) / middle))
        far = np.ceil(np.log(wide / np.float32(middle)) / most * np.float32(middle - 1)).astype(np.int64) + middle
        away = np.where(abs(away) <= middle, away, np.sign(away) * far)
    return (away + span).clip(0, 2 * span - 1)


class Deberta(PlainEncoder):
    """The encoder; see `Encoder`."""

    def __init__(self, config: DebertaConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        self.relative = Table(placement, 2 * (config.buckets or config.farthest), config.hidden_size)
        self.rows = rows_of_distances(config)
        self.relative_norm = LayerNorm(config.hidden_size, config.norm_eps, placement)

    def attends(self, positions: Value, lengths: Sequence[int]) -> Iterator[Attend]:
        """See `EncoderStack`; relative positions are multiplied by each layer's own matrices."""
        del positions
        relative, heads = self.relative_norm(self.relative.weight), self.config.num_heads
        for layer in self.layers:
            assert isinstance(layer, Block)
            near = layer.attention.qkv(relative)
            yield lambda qkv, near=near: disentangled_attention(qkv, near, heads, lengths, self.rows)


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: DebertaConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of weight names."""
    del config
    at = prefix_of(stored, "embeddings.word_embeddings.weight")
    parts = {"q": "query", "k": "key", "v": "value"}
    own = {f"attention.qkv:{part}.": (f"attention.self.{name}_proj",) for part, name in parts.items()}
    return [
        *table_names(at, ("pooler.dense", "classifier")),
        WeightName("relative:weight", f"{at}encoder.rel_embeddings.weight", None),
        *pair("relative_norm:", f"{at}encoder.LayerNorm"),
        *block_names(f"{at}encoder.layer.{{i}}.", own),
    ]


FAMILY = EncoderFamily(
    hf={
        "DebertaV2Model": ("deberta-v2", False),
        "DebertaV2ForMaskedLM": ("deberta-v2", False),
        "DebertaV2ForSequenceClassification": ("deberta-v2", True),
    },
    config_from_hf=config_from_hf,
    build=Deberta,
    weights=weights,
    ignored=ignored,
    in_torch="the relative attention of DeBERTa has no compiled kernel",
)
