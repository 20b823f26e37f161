# SPDX-License-Identifier: MIT
"""MPNet and DistilBERT: BERT without token types; in MPNet all layers share a bias by relative position.

Sources: Song et al., 2020, arXiv:2004.09297 (MPNet); Sanh et al., 2019, arXiv:1910.01108 (DistilBERT); Raffel et al.,
2019, arXiv:1910.10683, section 2.1 (buckets of relative positions).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.parameters import Placement, on_host
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    Table,
    block_names,
    head_of,
    ignored,
    prefix_of,
    sizes_from_hf,
    table_names,
)
from candle_vllm.core.models.encoder_stack import PlainEncoder, StackConfig
from candle_vllm.core.models.family import EncoderFamily

BUCKETS, FARTHEST = 32, 128  # the scale of the buckets ends at FARTHEST: distances from 91 on share the last

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> StackConfig:
    """Read `config.json` of mpnet and distilbert."""
    if model_type == "distilbert":
        said = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        said |= {"intermediate_size": "hidden_dim", "hidden_act": "activation"}
        names, first = {name: key for name, key in said.items() if key in fields}, 0
    else:
        names, first = {}, 2  # whatever pad_token_id is, as in transformers
        if fields.count("relative_attention_num_buckets", BUCKETS) != BUCKETS:
            raise UnsupportedModelError(f"{fields.path}: relative_attention_num_buckets must be {BUCKETS}")
    fields = Fields({**fields.values, **{name: fields.values[key] for name, key in names.items()}}, fields.path)
    return StackConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=fields.count("max_position_embeddings", 512) - first,
        norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        first_position=first,
        typed=False,
        activation=fields.choice("hidden_act", "gelu", *ACTIVATIONS),
        head_activation="relu" if model_type == "distilbert" else "tanh",
        **head_of(fields, scores=scores),
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class BucketBias(Table):
    """A bias for each head and bucket of relative positions, [32, H]; `table` has one for each distance."""

    def __init__(self, config: StackConfig, placement: Placement) -> None:
        super().__init__(placement, BUCKETS, config.num_heads)
        self._placement, self._farthest, self.table = placement, config.max_position - 1, None

    def finish(self) -> None:
        """Expand the buckets to all distances of key and query."""
        spread = on_host(self.weight).T[:, buckets(np.arange(-self._farthest, self._farthest + 1))]
        self.table = self._placement.constant(np.ascontiguousarray(spread))


def buckets(distances: np.ndarray) -> np.ndarray:
    """The bucket of each distance (key minus query): exact up to 7, then logarithmic; those of later keys start at 16.

    The logarithm is float32, as in training.
    """
    half, exact = BUCKETS // 2, BUCKETS // 4
    away = abs(distances)
    with np.errstate(divide="ignore"):
        ratio = np.log(np.float32(away) / np.float32(exact)) / np.float32(np.log(FARTHEST / exact))
    wide = exact + (np.maximum(ratio, 0) * np.float32(half - exact)).astype(np.int64)
    return np.where(distances > 0, half, 0) + np.where(away < exact, away, np.minimum(wide, half - 1))


# ---- model -----------------------------------------------------------------------------------------------------------


def build(config: StackConfig, placement: Placement) -> PlainEncoder:
    """Build the model without its weights."""
    return PlainEncoder(config, placement, BucketBias(config, placement) if config.model_type == "mpnet" else None)


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: StackConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of weight names."""
    at = prefix_of(stored, "embeddings.word_embeddings.weight")
    mpnet = config.model_type == "mpnet"
    part = "attention.attn.{}" if mpnet else "attention.{}_lin"
    own = {f"attention.qkv:{name}.": (part.format(name),) for name in "qkv"}
    if mpnet:
        own |= {"attention.output:": ("attention.attn.o",), "attention_norm:": ("attention.LayerNorm",)}
    else:
        own |= {"attention.output:": ("attention.out_lin",), "attention_norm:": ("sa_layer_norm",)}
        own |= {"mlp.up:": ("ffn.lin1",), "mlp.down:": ("ffn.lin2",), "mlp_norm:": ("output_layer_norm",)}
    head = ("classifier.dense", "classifier.out_proj") if mpnet else ("pre_classifier", "classifier")
    return [
        *table_names(at, head),
        WeightName("near:weight", f"{at}encoder.relative_attention_bias.weight", None),
        *block_names(f"{at}{'encoder' if mpnet else 'transformer'}.layer.{{i}}.", own),
    ]


FAMILY = EncoderFamily(
    hf={
        "MPNetModel": ("mpnet", False),
        "MPNetForMaskedLM": ("mpnet", False),
        "MPNetForSequenceClassification": ("mpnet", True),
        "DistilBertModel": ("distilbert", False),
        "DistilBertForMaskedLM": ("distilbert", False),
        "DistilBertForSequenceClassification": ("distilbert", True),
    },
    config_from_hf=config_from_hf,
    build=build,
    weights=weights,
    ignored=ignored,
)
