# SPDX-License-Identifier: MIT
"""Decoders without a head, as many embedding models are published: their class, their names, and what they can do.

Stands before step 1 of a request's life. Such a checkpoint was saved from the base model: it may name that class
(`Qwen3Model`), its tensors lack the prefix `model.`, and there is no `lm_head`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.quantization.tensors import StoredTensor

_PREFIX = "model."
_ENDS = ("TextModel", "Model")


def decoder_class(name: str, known: Collection[str]) -> str:
    """The class with a head that a base model's class belongs to, where it is known; else the name itself."""
    if name not in known:
        for end in _ENDS:
            whole = f"{name.removesuffix(end)}ForCausalLM"
            if name.endswith(end) and whole in known:
                return whole
    return name


def prefixed(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of a base model under the names that the whole model gives them; of any other checkpoint as is."""
    if "embed_tokens.weight" not in checkpoint.tensors:
        return checkpoint
    kept = (_PREFIX, "lm_head.")
    return checkpoint.with_tensors(
        {name if name.startswith(kept) else _PREFIX + name: tensor for name, tensor in checkpoint.tensors.items()}
    )


def without_head(
    name: str, config: ModelConfig, known: Collection[str], tensors: Mapping[str, StoredTensor] | None
) -> ModelConfig:
    """The config of a model that has no head and gives vectors alone; of any other model as is.

    Args:
        name: the class that config.json names.
        config: what was read by it.
        known: classes with a head.
        tensors: what the checkpoint holds, `prefixed`; None where there is nothing to look at.
    """
    headless = tensors is not None and not any(stored.startswith("lm_head.") for stored in tensors)
    bare = tensors is not None and any(tensor.name != stored for stored, tensor in tensors.items())
    if decoder_class(name, known) != name or (bare and headless and not config.tie_embeddings):
        return dataclasses.replace(config, tie_embeddings=True, has_head=False)
    return config
