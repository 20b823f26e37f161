# SPDX-License-Identifier: MIT
"""Merge adapters into a model that is being written to a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.adapter_base import adapter_base, stored_parts, stored_target
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.lora import Delta, FittedAdapter
from candle_vllm.core.loading.adapters import AdapterLimits, read_adapter
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed_by
from candle_vllm.core.loading.weights import stored_lines
from candle_vllm.core.models.family import Family
from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.quantization.tensors import StoredTensor

AdapterFactors: TypeAlias = Sequence[tuple[Path, float]]
"""Adapters, each with its factor."""

ANY_SIZE = AdapterLimits(max_rank=1 << 16, max_bytes=1 << 40, copied=False)
"""Limits that no adapter reaches: conversion needs none, because only one tensor is in memory at a time."""
_Changes: TypeAlias = list[tuple[Delta, float]]


def merge(
    config: EngineConfig,
    files: ModelFiles,
    family: Family,
    model: ModelConfig,
    checkpoint: Checkpoint,
    adapters: AdapterFactors,
    opened: ExitStack,
) -> tuple[ModelConfig, Checkpoint]:
    """Return a model and its tensors with adapters merged into them; each matrix is computed when it is requested.

    The head is no longer tied to the embedding table if their changes differ. If `config` names a type, or the base's
    matrix is quantised, a merged matrix is float32 here, and is converted when it is written; otherwise it has the
    base's own type. `opened` holds the adapters' files open while the tensors are read.

    Raises:
        ModelNotFoundError, AdapterError: as `read_adapter` and `fit_adapter`, or an adapter cannot be merged.
    """
    base = adapter_base(files, dataclasses.replace(config, isq=None, imatrix=None))
    changes: dict[str, _Changes] = {}
    for path, scale in adapters:
        stored = opened.enter_context(read_adapter(path, ANY_SIZE))
        if stored.config.alora is not None:
            raise AdapterError(
                f"{path}: an adapter with alora_invocation_tokens acts only on a part of a text, so it cannot be merged"
            )
        for target, delta in _targets(fit_adapter(stored, base, merging=True)).items():
            if target not in base.shapes:
                raise AdapterError(
                    f"{path}: {target} of the adapter cannot be merged into {base.name}, which has no bias there"
                )
            changes.setdefault(target, []).append((delta, scale))
    weights, exact = stored_parts(family.weights, model, checkpoint), config.isq is not None or config.dtype != "auto"
    if model.tie_embeddings and changes.get("embed:weight", []) != changes.get("head:weight", []):
        model = dataclasses.replace(model, tie_embeddings=False)
        for target in ("embed:weight", "head:weight"):
            changes.setdefault(target, [])
    merged: dict[str, StoredTensor] = {}
    for target, deltas in changes.items():
        own = weights(target)
        assert own is not None
        name = "F32" if exact or own.dtype is None else own.dtype
        made = computed_by(own, own.shape, name, partial(_merged, own, deltas, name)) if deltas else own
        merged[stored_target(target, model)] = made
    return model, checkpoint.with_tensors(_unchanged(family, model, checkpoint, merged) | merged)


def _targets(fitted: FittedAdapter) -> dict[str, Delta]:
    """Return the change of each parameter of the model; a bias is a separate parameter."""
    found: dict[str, Delta] = {}
    for path, deltas in fitted.deltas.items():
        for prefix, delta in deltas.items():
            if delta.bias is not None:
                found[f"{path}:{prefix}bias"] = Delta(bias=delta.bias)
            if any(part is not None for part in (delta.a, delta.full, delta.rows)):
                found[f"{path}:{prefix}weight"] = delta
    return found


def _unchanged(
    family: Family, model: ModelConfig, checkpoint: Checkpoint, merged: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the stored tensors, except tensors of which adapters change all parameters."""
    kept, gone = set[str](), set[str]()
    for line, name in stored_lines(family.weights, model, checkpoint):
        (gone if line.target in merged else kept).add(name)
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in gone - kept}


def _merged(own: StoredTensor, changes: _Changes, type_name: str) -> NDArray[Any]:
    """Apply the changes of adapters, with a factor t each, to a parameter: W + the sum of t (W' - W), in float32."""
    values = own.load("F32")
    if len(changes) == 1 and changes[0][1] == 1:
        out = _changed(values, changes[0][0])
    else:
        out = values.copy()
        for delta, scale in changes:
            out += np.float32(scale) * (_changed(values, delta) - values)
    return out if type_name == "F32" else read_plain(out.view(np.uint8), "F32", out.shape, type_name)


def _changed(values: NDArray[np.float32], delta: Delta) -> NDArray[np.float32]:
    """Return W' in newly allocated memory."""
    if delta.bias is not None and values.ndim == 1:
        return values + delta.bias
    made = values.copy() if delta.full is None else delta.full.load("F32")
    if delta.rows is not None:
        ids, rows = delta.rows
        made[ids] = rows
    if delta.a is not None and delta.b is not None:
        made += np.float32(delta.scale) * (delta.b.load("F32") @ delta.a.load("F32"))
    if delta.column_scale is not None:
        made *= delta.column_scale[:, None]
    return made
