# SPDX-License-Identifier: MIT
"""Builds the `Family` of a model that runs transformers' module code: config, layers, and names of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import transposed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.any_architecture import gguf
from candle_vllm.core.models.any_architecture.config import AnyConfig, config_from_hf
from candle_vllm.core.models.any_architecture.decoder import AnyDecoder
from candle_vllm.core.models.any_architecture.experts import stored_part
from candle_vllm.core.models.any_architecture.weights import named_for
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.trunks import head_as_stored
from candle_vllm.core.quantization.tensors import StoredTensor


def family_of(
    values: Mapping[str, Any], path: Path, tensors: Mapping[str, StoredTensor] | None = None
) -> tuple[Family, AnyConfig]:
    """Return the family and the config of one model; errors as in `config_from_hf`.

    With `tensors`, these decide whether the head is tied to the embedding table, not config.json.
    """
    return _family(values, path, named_for, tensors=tensors)


def family_of_gguf(name: str, checkpoint: Checkpoint) -> tuple[Family, AnyConfig]:
    """Return the family and the config of a GGUF file with the architecture `name`.

    InvalidFileError if transformers cannot read its metadata; UnsupportedModelError if it does not read the
    architecture (the message lists those it reads), rope scaling or scoring of experts. Others as in `config_from_hf`.
    """
    values = gguf.config_values(name, checkpoint)
    return _family(values, checkpoint.path, partial(gguf.named_in_gguf, name), (name,))


def _family(
    values: Mapping[str, Any],
    path: Path,
    named: Callable[..., Checkpoint],
    names: tuple[str, ...] = (),
    tensors: Mapping[str, StoredTensor] | None = None,
) -> tuple[Family, AnyConfig]:
    config = config_from_hf(values, path)
    shapes = AnyDecoder(config, SHAPES)
    if tensors is not None and (tied := _is_tied(shapes, tensors, path)) != config.tie_embeddings:
        return _family({**values, "tie_word_embeddings": tied}, path, named, names)
    table = list(_table(shapes))
    return Family(
        hf={},
        gguf=names,
        config_from_hf=lambda *_: config,
        build=lambda config, placement, _: AnyDecoder(config, placement),
        weights=table,
        ignored=partial(_ignored, shapes.model),
        prepared=partial(named, shapes.model, shapes.stored_shapes, shapes.experts),
    ), config


def _is_tied(decoder: AnyDecoder, tensors: Mapping[str, StoredTensor], path: Path) -> bool:
    """Whether the head is tied to the embedding table by the stored tensors, see `head_as_stored`."""
    shapes, pairs = decoder.stored_shapes, decoder.model._tied_weights_keys or {}
    pair = next((pair for pair in pairs.items() if pair[0].endswith(".weight") and shapes.keys() >= {*pair}), None)
    if pair is None:
        return decoder.config.tie_embeddings
    alike = {name: tensor for name, tensor in tensors.items() if tensor.shape == shapes[pair[1]]}
    stored = named_for(decoder.model, shapes, decoder.experts, Checkpoint(path, "safetensors", (), alike, {}))
    rows = [WeightName(target, name, name) for target, name in zip(("head:weight", "embed:weight"), pair, strict=True)]
    return head_as_stored(decoder.config, stored.tensors, path, rows).tie_embeddings


def _table(decoder: AnyDecoder) -> Iterator[WeightName]:
    for name, layer in decoder.named.items():
        for part in layer.parameters():
            if name in decoder.experts:
                names: Any = stored_part(name, part)
            else:
                stored = name if part == "tensor" else f"{name}.{part}"
                # A tied head with a bias is a layer of its own here: its matrix has the name of the embedding table.
                tied = decoder.model.all_tied_weights_keys.get(stored)
                names = stored if tied is None else (tied, stored)
            view = _as_rows if part == "weight" and name in decoder.transposed else None
            yield WeightName(f"{decoder.targets[name]}:{part}", names, names, view)


def _as_rows(stored: StoredTensor, config: Any) -> StoredTensor:
    """Return a matrix [N, K] that transformers stores as [K, N]; quantised checkpoints store it as [N, K]."""
    return stored if stored.quantised else transposed(stored, config)


def _ignored(model: Any, config: Any) -> Sequence[str]:
    """Patterns of the names of tensors that are not loaded: what transformers ignores, tied copies, old buffers."""
    del config
    said = [*(model._keys_to_ignore_on_load_unexpected or ()), *map(re.escape, model.all_tied_weights_keys)]
    return [*(f".*(?:{each}).*" for each in said), r".*rotary_emb\.inv_freq", r".*\.attn\.(?:masked_)?bias"]
