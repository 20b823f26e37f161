# SPDX-License-Identifier: MIT
"""Output layer of a decoder: whether it exists, and whether it shares the embedding table.

Many embedding models are published without an output layer. Such a checkpoint was saved from the base model:
config.json may name the base model's class (`Qwen3Model`), the tensors lack the prefix `model.`, and `lm_head` is
missing. In other checkpoints, config.json may contradict the tensors about a tied output layer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.quantization.tensors import StoredTensor

logger = logging.getLogger(__name__)

_PREFIX = "model."
_COMPARED = 1 << 22  # number of elements that are compared at a time
_ENDS = ("TextModel", "Model", "ForSequenceClassification", "ForRewardModel")
SCORES = ("score", "v_head")  # names of heads for scores and classes


def decoder_class(name: str, known: Collection[str]) -> str:
    """Return the known class with an output layer for a class without it (see `_ENDS`); otherwise the name itself."""
    if name not in known:
        for end in _ENDS:
            whole = f"{name.removesuffix(end)}ForCausalLM"
            if name.endswith(end) and whole in known:
                return whole
    return name


def is_headed(names: object) -> bool:
    """Whether `architectures` of a config.json is one class with a head for scores or classification."""
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    return isinstance(name, str) and name.endswith(_ENDS[2:])


def prefixed(checkpoint: Checkpoint, *, tied: bool = False) -> Checkpoint:
    """Rename a base model's tensors as in the model with an output layer; other checkpoints are returned unchanged.

    If the head is `tied` to the embedding table and only the head is stored, it is renamed to the table.
    """
    if "embed_tokens.weight" not in checkpoint.tensors:
        table, head = f"{_PREFIX}embed_tokens.weight", "lm_head.weight"
        named = any(name.startswith(f"{_PREFIX}layers.") for name in checkpoint.tensors)  # as in Llama, not GPT-2
        known = {table, "fc.weight", f"{_PREFIX}fc.weight"}  # fc: an EAGLE-3 head, which shares its target's table
        if tied and named and head in checkpoint.tensors and known.isdisjoint(checkpoint.tensors):
            renamed = {table if name == head else name: tensor for name, tensor in checkpoint.tensors.items()}
            return checkpoint.with_tensors(renamed)
        return checkpoint
    kept = (_PREFIX, "lm_head.", *(f"{name}." for name in SCORES))
    return checkpoint.with_tensors(
        {name if name.startswith(kept) else _PREFIX + name: tensor for name, tensor in checkpoint.tensors.items()}
    )


def without_head(
    name: str, config: ModelConfig, known: Collection[str], tensors: Mapping[str, StoredTensor] | None
) -> ModelConfig:
    """Set `has_head` to False for a model of embeddings, scores or classes; return other configs unchanged.

    Args:
        name: the class that config.json names.
        config: the configuration that was read.
        known: classes with an output layer.
        tensors: tensors of the checkpoint, after `prefixed`; None if they are not known.

    Raises:
        WeightsError: the embeddings are not tied, and only the head is stored, which `prefixed` renamed.
    """
    tensors = tensors or {}
    headless = bool(tensors) and not any(stored.startswith("lm_head.") for stored in tensors)
    bare = any(tensor.name != stored for stored, tensor in tensors.items())
    if headless and not config.tie_embeddings and any(each.name == "lm_head.weight" for each in tensors.values()):
        raise WeightsError(f"tensor {_PREFIX}embed_tokens.weight is missing, and the embeddings are not tied")
    if decoder_class(name, known) != name or (bare and headless and not config.tie_embeddings):
        return dataclasses.replace(config, tie_embeddings=True, has_head=False)
    return config


def head_as_stored(
    config: ModelConfig, tensors: Mapping[str, StoredTensor] | None, path: Path, table: Sequence[WeightName]
) -> ModelConfig:
    """Correct `tie_embeddings` if config.json's `tie_word_embeddings` contradicts the stored tensors.

    Args:
        config: the configuration that was read from config.json.
        tensors: tensors of the checkpoint, after `prefixed`; None if they are not known.
        path: config.json, for the log.
        table: the family's table of names.
    """
    names = {row.target: row.hf_names for row in table if row.target in ("embed:weight", "head:weight")}
    if tensors is None or len(names) < 2 or not config.has_head:
        return config
    head, embed = (next((tensors[n] for n in names[t] if n in tensors), None) for t in ("head:weight", "embed:weight"))
    if embed is None or config.tie_embeddings == (head is None):
        return config
    if head is None:
        said = f"is not true, and no {names['head:weight'][0]} is stored: the embedding table is used as the head"
    elif _equal(head, embed):
        return config
    else:
        said = f"is true, and {head.name} differs from the embedding table: {head.name} is used as the head"
    logger.warning("%s: tie_word_embeddings %s", path, said)
    return dataclasses.replace(config, tie_embeddings=head is None)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two matrices have the same values; compared in parts, because each may have a gigabyte."""
    if one.shape != other.shape or one.quantised != other.quantised:
        return False
    step = max(1, _COMPARED // max(1, math.prod(one.shape[1:])))
    for first in range(0, one.shape[0], step):
        last = min(first + step, one.shape[0])
        left, right = one.rows(first, last), other.rows(first, last)
        if one.type_name == other.type_name:
            same = np.array_equal(left.raw(), right.raw())
        else:
            same = np.array_equal(left.load(), right.load(), equal_nan=True)
        if not same:
            return False
    return True
