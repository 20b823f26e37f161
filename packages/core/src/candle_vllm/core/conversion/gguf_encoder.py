# SPDX-License-Identifier: MIT
"""Write an encoder as a GGUF file: BERT, and RoBERTa in the form of a BERT, with their pooling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from candle_vllm.core.conversion.gguf_metadata import alike, pooling_keys
from candle_vllm.core.conversion.gguf_tensors import gguf_tensors
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import check_weights, places
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.models.registry import encoder_from_gguf
from candle_vllm.core.quantization.tensors import StoredTensor

_NAME = "bert"
_POSITIONS = "position_embd.weight"


def encoder_tensors(
    family: EncoderFamily, model: EncoderConfig, checkpoint: Checkpoint, path: Path
) -> list[tuple[str, str, StoredTensor]]:
    """Return name in the file, target in the model, and tensor, for all tensors of the file.

    RoBERTa's table of positions begins with rows that no text uses; a BERT's begins with the first position.

    Raises:
        UnsupportedModelError: the model has a head for scores or classes, which GGUF files represent differently.
        WeightsError: tensors are missing, unexpected or misshapen.
    """
    if model.labels or _NAME not in family.gguf:
        raise UnsupportedModelError(
            f"{path}: GGUF files are not written for cross-encoders and classifiers, but for encoders of BERT's "
            "family that give vectors; use the folder as it is"
        )
    table, ignored = family.weights(model, checkpoint.tensors), family.ignored(model)
    check_weights(lambda: family.build(model, SHAPES), table, checkpoint, model, ignored=ignored)
    has_place = places(family.build(model, SHAPES))
    found = gguf_tensors(table, checkpoint, model, _stored(model), has_place)
    first, last = model.first_position, model.first_position + model.max_position
    return [
        (name, target, stored.rows(first, last) if name == _POSITIONS else stored) for name, target, stored in found
    ]


def _stored(model: EncoderConfig) -> EncoderConfig:
    """Return the config that the GGUF file describes: that of a BERT, whose first position is 0."""
    return dataclasses.replace(model, model_type=_NAME, first_position=0)


def describe_encoder(model: EncoderConfig, files: ModelFiles) -> dict[str, Any]:
    """Return the metadata of the model and of its pooling."""
    keys = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_position,
        "embedding_length": model.hidden_size,
        "block_count": model.num_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_heads,
        "attention.layer_norm_epsilon": float(model.norm_eps),
        "attention.causal": False,
        **pooling_keys(files, model.hidden_size, "mean"),
    }
    described: dict[str, Any] = {f"{_NAME}.{key}": value for key, value in keys.items()}
    return {"general.architecture": _NAME, "tokenizer.ggml.token_type_count": model.token_types} | described


def check_encoder(model: EncoderConfig, written: Checkpoint) -> None:
    """Read the planned metadata and tensors: they must describe the same model.

    Raises:
        UnsupportedModelError: they describe another model; the message names the settings.
    """
    again = encoder_from_gguf(written.metadata, written)
    assert again is not None
    ours, names = _stored(model), [field.name for field in dataclasses.fields(model)]
    different = [name for name in names if not alike(getattr(ours, name), getattr(again[1], name), 1e-6)]
    if different:
        raise UnsupportedModelError(f"GGUF's {_NAME} cannot express this model's {', '.join(different)}")
