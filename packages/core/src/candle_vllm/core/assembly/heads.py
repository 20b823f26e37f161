# SPDX-License-Identifier: MIT
"""Layers after a model's pooling: the head of a classifier or reward model, or Dense layers of an embedding model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import ConfigError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.loading.pooling import dense_layers, read_pooling
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.encoder_parts import head_of
from candle_vllm.core.models.trunks import SCORES, is_headed
from candle_vllm.core.pooled_head import Dense, PooledHead
from candle_vllm.core.pooling import ModelPooling, PoolingKind
from candle_vllm.core.text.tokenizer import Tokenizer

_TABLES = ("lm_head.weight", "model.embed_tokens.weight")  # output matrices; the tied one is last


def pooling_of(
    files: ModelFiles,
    checkpoint: Checkpoint,
    metadata: Mapping[str, Any],
    size: int,
    kind: PoolingKind,
    tokenizer: Tokenizer,
    chosen: PoolingKind | None = None,
) -> tuple[ModelPooling, PooledHead | None]:
    """Return the pooling of hidden states of `size` elements, by default of `kind`, and the layers after it.

    `chosen` replaces the files' kind in an embedding model.

    Raises:
        ConfigError: the model is a classifier or reward model, and its pooling is not `chosen`.
        ModelLoadError: a head or Dense layer is missing, has a wrong shape, or is not implemented.
    """
    config = None if files.config is None else Fields(read_json(files.config), files.config)
    if config is not None and files.format != "gguf" and is_headed(config.values.get("architectures")):
        words = config.get("classifier_from_token", list, [])
        head = _token_head(config, words, checkpoint, tokenizer) if words else _score_head(config, checkpoint, size)
        check_pooling(pooling := ModelPooling(len(head.labels), kind, normalize=False), chosen)
        return pooling, head
    pooling = read_pooling(files, metadata, size, kind, config)
    pooling = dataclasses.replace(pooling, pooling=chosen or pooling.pooling)
    layers = dense_layers(files, checkpoint)
    for layer in layers:
        _check_shape(checkpoint, "a Dense layer after the pooling", layer.weight.shape, (len(layer.weight), size))
        size = len(layer.weight)
    return (dataclasses.replace(pooling, size=size), PooledHead(layers)) if layers else (pooling, None)


def check_pooling(pooling: ModelPooling | None, chosen: PoolingKind | None) -> None:
    """Raise ConfigError if the setting `pooling` is set and differs from the model's pooling."""
    if chosen is not None and (pooling is None or pooling.pooling != chosen):
        raise ConfigError("pooling is for embedding models, and this model has its own head: leave it out", "pooling")


def _token_head(fields: Fields, words: list[Any], checkpoint: Checkpoint, tokenizer: Tokenizer) -> PooledHead:
    """Return the head of a reranker that scores by logits of tokens, which vLLM's `classifier_from_token` lists.

    The score is the sigmoid of one token's logit, or of the second one's minus the first one's, as for "no" and "yes".
    """
    ids = [tokenizer.backend.token_to_id(word) if isinstance(word, str) else None for word in words]
    table = next((checkpoint.tensors[name] for name in _TABLES if name in checkpoint.tensors), None)
    known = [number for number in ids if number is not None and table is not None and number < table.shape[0]]
    if table is None or len(known) != len(ids) or len(known) > 2:
        raise WeightsError(
            f"{fields.path}: classifier_from_token is {words!r:.80}; it must be one or two tokens of the vocabulary"
        )
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"):
        if fields.values.get(key) not in (None, 1):
            raise UnsupportedModelError(f"{fields.path}: {key} with classifier_from_token is not implemented")
    rows = [table.rows(number, number + 1).load("F32") for number in known]
    head = head_of(Fields({**fields.values, "num_labels": 1}, fields.path), scores=True)
    return PooledHead((Dense(weight=rows[0] if len(rows) == 1 else rows[1] - rows[0]),), **head)


def _score_head(fields: Fields, checkpoint: Checkpoint, size: int) -> PooledHead:
    """Return the head of a decoder: one linear layer, or two with ReLU between them, as in Qwen2 reward models."""
    tensors = checkpoint.tensors
    stem = next((stem for stem in SCORES if any(name.startswith(f"{stem}.") for name in tensors)), None)
    if stem is None:
        raise WeightsError(f"{checkpoint.path}: {SCORES[0]}.weight is missing, the head that config.json names")
    names = [stem] if f"{stem}.weight" in tensors else [f"{stem}.0", f"{stem}.2"]
    layers = []
    for number, name in enumerate(names):
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        if weight is None:
            raise WeightsError(f"{checkpoint.path}: {name}.weight is missing, a part of the head")
        _check_shape(checkpoint, f"{name}.weight", weight.shape, (*weight.shape[:1], size))
        if bias is not None:
            _check_shape(checkpoint, f"{name}.bias", bias.shape, weight.shape[:1])
        last, size = number == len(names) - 1, weight.shape[0]
        own = None if bias is None else bias.load("F32")
        layers.append(Dense(weight=weight.load("F32"), bias=own, activation="none" if last else "relu"))
    said = dict(fields.values)
    if "id2label" not in said and "num_labels" not in said:
        said["id2label"] = {str(number): f"LABEL_{number}" for number in range(min(size, 2))}
    head = head_of(Fields(said, fields.path), scores=True)
    _check_shape(checkpoint, "the head", (size,), (len(head["labels"]),))
    return PooledHead(tuple(layers), **head)


def _check_shape(checkpoint: Checkpoint, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != wanted:
        raise WeightsError(f"{checkpoint.path}: {name} has shape {list(found)}; the model asks for {list(wanted)}")
