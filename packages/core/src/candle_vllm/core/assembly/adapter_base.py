# SPDX-License-Identifier: MIT
"""The base model of adapters: the sites that adapters can change, and the model's weights, decoded on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.encoder import describe_encoder
from candle_vllm.core.assembly.model import as_loaded, describe_family
from candle_vllm.core.assembly.opening import open_model
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import CPU
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.adapter_places import AdapterPlaces
from candle_vllm.core.loading.config import EncoderConfig, ModelConfig
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName, expand, parameters_of
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.quantization.tensors import StoredTensor

_PIECE = 1 << 22  # number of elements that are decoded at a time

Weights: TypeAlias = Callable[[str], StoredTensor | None]
"""Finds the stored tensor of a target such as "head:weight", in the model's layout; None without a stored tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdapterBase:
    """A base model that adapters are fitted to.

    Attributes:
        places: maps tensors of adapters to sites of the model.
        shapes: shapes of all parameters by target, including the head even if it is tied to the embedding table.
        architectures: values of `general.architecture` that a GGUF adapter may have.
        weights: opens the weights as they are served: quantised if `isq` is set.
        unused: patterns of names of stored tensors that an encoder does not use; empty for a decoder.
    """

    name: str
    config: ModelConfig | EncoderConfig
    places: AdapterPlaces
    shapes: Mapping[str, tuple[int, ...]]
    architectures: tuple[str, ...]
    weights: Callable[[], AbstractContextManager[Weights]]
    unused: Sequence[str] = ()


def adapter_base(files: ModelFiles, config: EngineConfig) -> AdapterBase:
    """Describe a base model, decoder or encoder, by the headers of its files; errors as `load_model`."""
    opened = open_model(files, CPU)
    model: ModelConfig | EncoderConfig
    with opened.checkpoint as checkpoint:
        if (encoder := describe_encoder(files, opened)) is not None:
            encoder_family, model = encoder
            table, architectures = encoder_family.weights(model, checkpoint.tensors), encoder_family.gguf
            built, unused, pairs = encoder_family.build(model, SHAPES), encoder_family.ignored(model), False
            served: Callable[[Checkpoint], Checkpoint] = lambda stored: stored  # noqa: E731
        else:
            family, model = describe_family(files, checkpoint, opened.metadata, config.model_impl)
            table, built, unused = family.weights, family.build(model, SHAPES, checkpoint), ()
            known = (model.model_type,) if model.model_type in family.gguf else family.gguf
            architectures = known or ("llama",)  # Mixtral's files have Llama's name
            rows = family.as_gguf.items()  # a config from GGUF has the architecture's name
            pairs = any(row.reordered for name, row in rows if model.model_type in (name, row.name))
            prepared = family.prepared or (lambda stored: stored)
            served = lambda stored: as_loaded(config, family, model, prepared(stored))  # noqa: E731
        parts = parameters_of(built, table, model, checkpoint.format)
    shapes = {target: tuple(each.shape) for target, each in parts.items()}
    aliases = {target: stored_target(target, model) for target in ("head:weight", "head:bias") if model.has_head}
    shapes |= {target: shapes[other] for target, other in aliases.items() if other in shapes}

    @contextmanager
    def weights() -> Iterator[Weights]:
        with open_model(files, CPU).checkpoint as checkpoint:
            yield stored_parts(table, model, served(checkpoint))

    return AdapterBase(
        name=files.name,
        config=model,
        places=AdapterPlaces(table, model, shapes, pairs=pairs),
        shapes=shapes,
        architectures=architectures,
        weights=weights,
        unused=unused,
    )


def stored_target(target: str, model: ModelConfig | EncoderConfig) -> str:
    """Return the target that a parameter has in a family's table: another one for a tied head and a head's bias."""
    if target == "head:weight" and model.tie_embeddings:
        return "embed:weight"
    return "scorer:bias" if target == "head:bias" else target


def stored_parts(table: Sequence[WeightName], model: ModelConfig | EncoderConfig, stored: Checkpoint) -> Weights:
    """Return a function that finds the stored tensor of a parameter, by the table of names of the model's family."""
    lines = {line.target: line for line in expand(table, model, stored.format)}

    def part(target: str) -> StoredTensor | None:
        line = lines.get(target)
        name = None if line is None else line.find(stored.tensors)
        if line is None or name is None:
            other = stored_target(target, model)
            return part(other) if other != target else None
        return line.look(stored.tensors[name], name, model)

    return part


def decoded(stored: StoredTensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Decode a matrix [N, K] to float32 in chunks of rows; yield the index of each chunk's first row, and the rows."""
    block, dtype = stored.block_type, stored.dtype
    if dtype is None and block is None:  # a format such as GPTQ, whose codes and scales are separate tensors
        yield 0, stored.load("F32")
        return
    raw, columns = stored.raw(), stored.shape[-1]
    step = max(1, _PIECE // columns)
    for first in range(0, stored.shape[0], step):
        part = raw[first : first + step]
        shape = (len(part), columns)
        if dtype is not None:
            yield first, read_plain(part, dtype, shape, "F32")
        elif block is not None:
            yield first, ggml.dequantize(part, block, shape)
