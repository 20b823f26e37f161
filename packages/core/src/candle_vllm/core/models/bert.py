# SPDX-License-Identifier: MIT
"""BERT, RoBERTa, CamemBERT and XLM-RoBERTa: embedding models, cross-encoders and classifiers.

RoBERTa's positions begin after the padding token's id, and it does not distinguish the two texts of a pair. Sources:
Devlin et al., 2018, arXiv:1810.04805; Liu et al., 2019, arXiv:1907.11692; Conneau et al., 2019, arXiv:1911.02116.
"""

from __future__ import annotations

from collections.abc import Iterable

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    UNUSED,
    block_names,
    head_of,
    sizes_from_gguf,
    sizes_from_hf,
    table_names,
    types_from_gguf,
)
from candle_vllm.core.models.encoder_stack import PlainEncoder, StackConfig
from candle_vllm.core.models.family import EncoderFamily

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> StackConfig:
    """Read `config.json` of bert, roberta and xlm-roberta."""
    fields.choice("position_embedding_type", "absolute", "absolute")
    if fields.get("is_decoder", bool, False):
        raise UnsupportedModelError(f"{fields.path}: is_decoder is true, which is not implemented for {model_type}")
    positions = fields.count("max_position_embeddings")
    first = 0 if model_type == "bert" else fields.get("pad_token_id", int, 1) + 1
    return StackConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=positions - first,
        norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        first_position=first,
        token_types=fields.count("type_vocab_size", 2),
        activation=fields.choice("hidden_act", "gelu", *ACTIVATIONS),
        **head_of(fields, scores=scores),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> StackConfig:
    """Read GGUF metadata of bert."""
    return StackConfig(
        model_type="bert",
        **sizes_from_gguf(fields, checkpoint),
        **types_from_gguf(checkpoint),  # DistilBERT has no token types
    )


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: StackConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of weight names; in a checkpoint `stored` with a head, the encoder's names have a prefix."""
    family = "bert" if config.model_type == "bert" else "roberta"
    prefix = f"{family}." if any(name.startswith(f"{family}.") for name in stored) else ""
    head = ("bert.pooler.dense", "classifier") if family == "bert" else ("classifier.dense", "classifier.out_proj")
    return [
        *table_names(prefix, head),
        *block_names(f"{prefix}encoder.layer.{{i}}."),
    ]


FAMILY = EncoderFamily(
    hf={
        "BertModel": ("bert", False),
        "BertForMaskedLM": ("bert", False),
        "BertForSequenceClassification": ("bert", True),
        "RobertaModel": ("roberta", False),
        "RobertaForMaskedLM": ("roberta", False),
        "RobertaForSequenceClassification": ("roberta", True),
        "CamembertModel": ("roberta", False),
        "CamembertForMaskedLM": ("roberta", False),
        "CamembertForSequenceClassification": ("roberta", True),
        "XLMRobertaModel": ("xlm-roberta", False),
        "XLMRobertaForMaskedLM": ("xlm-roberta", False),
        "XLMRobertaForSequenceClassification": ("xlm-roberta", True),
    },
    gguf=("bert",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=PlainEncoder,
    weights=weights,
    ignored=lambda _: UNUSED,
)
