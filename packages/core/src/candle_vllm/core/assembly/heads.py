# SPDX-License-Identifier: MIT
"""What stands behind the pooling of a model: the head of a classifier or reward model, or layers of its vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.loading.pooling import dense_layers, read_pooling
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.trunks import SCORES, is_headed
from candle_vllm.core.models.encoder_parts import head_of
from candle_vllm.core.pooling import Dense, ModelPooling, PooledHead, PoolingKind


def pooling_of(
    files: ModelFiles, checkpoint: Checkpoint, metadata: Mapping[str, Any], size: int, kind: PoolingKind
) -> tuple[ModelPooling, PooledHead | None]:
    """How vectors of `size` elements are made, by `kind` where the files do not say it, and what stands behind."""
    config = None if files.config is None else Fields(read_json(files.config), files.config)
    if config is not None and files.format != "gguf" and is_headed(config.values.get("architectures")):
        head = _score_head(config, checkpoint, size)
        return ModelPooling(len(head.labels), kind, normalize=False), head
    pooling = read_pooling(files, metadata, size, kind, config)
    layers = dense_layers(files, checkpoint)
    for layer in layers:
        _check_shape(checkpoint, "a Dense layer behind the pooling", layer.weight.shape, (len(layer.weight), size))
        size = len(layer.weight)
    return (dataclasses.replace(pooling, size=size), PooledHead(layers)) if layers else (pooling, None)


def _score_head(fields: Fields, checkpoint: Checkpoint, size: int) -> PooledHead:
    """The head of a decoder: one matrix, or two with ReLU between them as reward models of Qwen2 have it."""
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
