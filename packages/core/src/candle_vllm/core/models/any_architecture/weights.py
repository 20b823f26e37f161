# SPDX-License-Identifier: MIT
"""Rename, merge and split the tensors of a checkpoint by transformers' own tables."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.kernels.torch_numbers import load_tensor
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import Made, rows_of_bytes
from candle_vllm.core.models.any_architecture.experts import Experts
from candle_vllm.core.quantization.tensors import StoredTensor

_ABSENT = torch.empty(0)


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """Conversion by transformers at loading: it makes one or more parameters from one or more stored tensors.

    Attributes:
        sources: the stored tensors, by the pattern of the converter that matches their names.
        converter: transformers' converter.
        first: the parameter that the converter is called for; the converter may return several.
        model: the model of transformers, which converters inspect.
        made: the converted tensors by name, from the first read until the last one is released.
        left: names of the tensors that are not released yet.
    """

    sources: Mapping[str, tuple[StoredTensor, ...]]
    converter: Any
    first: str
    model: Any
    made: dict[str, torch.Tensor]
    left: set[str]

    def tensor(self, name: str) -> torch.Tensor:
        """The converted tensor with this name, in fp32."""
        if name not in self.made:
            converter = copy.deepcopy(self.converter)
            for pattern, stored in self.sources.items():
                for each in stored:
                    converter.add_tensor(self.first, each.name, pattern, load_tensor(each))
            made = converter.convert(self.first, model=self.model, config=self.model.config)
            self.made.update({key: each[0] if isinstance(each, list) else each for key, each in made.items()})
        return self.made[name]

    def release(self, name: str) -> None:
        """Release the stored tensors; forget the converted ones after the last of them is released."""
        self.left.discard(name)
        if not self.left:
            self.made.clear()
        for stored in self.sources.values():
            for each in stored:
                each.release()


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedTensor(Made):
    """A parameter that a conversion makes from stored tensors when it is loaded."""

    conversion: Conversion

    def raw(self) -> np.ndarray:
        """See `StoredTensor`."""
        found = self.conversion.tensor(self.name)
        if tuple(found.shape) != self.shape:
            said = f"{self.name} has shape {list(found.shape)}; the config asks for {list(self.shape)}"
            raise WeightsError(f"{self.path}: {said}")
        return rows_of_bytes(found.numpy(), self.shape)

    def release(self) -> None:
        """See `StoredTensor`."""
        self.conversion.release(self.name)


def named_for(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    experts: Mapping[str, Experts],
    checkpoint: Checkpoint,
    mapping: Sequence[Any] | None = None,
) -> Checkpoint:
    """The tensors of a checkpoint under the names and in the shapes of a model's parameters.

    Args:
        model: the model of transformers; only its classes and names are used.
        shapes: shapes of its parameters, with experts' matrices in transformers' layout.
        experts: the experts' matrices among them, which are split and named by `stored_part`.
        checkpoint: the checkpoint as it is stored.
        mapping: renamings and converters; None for transformers' own mapping of the model.
    """
    mapping = get_model_conversion_mapping(model) if mapping is None else mapping
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    known = dict.fromkeys(shapes, _ABSENT)
    prefix, tensors = model.base_model_prefix, dict[str, StoredTensor]()
    collected: dict[str, dict[str, list[StoredTensor]]] = {}
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda item: _natural(item[0])):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in shapes and (name in shapes or pattern is None):
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None or target not in shapes:
            tensors[target if target in shapes else name] = stored
        else:
            collected.setdefault(target, {}).setdefault(pattern, []).append(stored)
    for target, sources in collected.items():
        converter = by_pattern[next(iter(sources))]
        given = {pattern: tuple(sources[pattern]) for pattern in converter.source_patterns if pattern in sources}
        whole = _of_experts(experts.get(target), target, converter, given)
        if whole is not None:
            tensors |= whole
            continue
        names = _targets(converter, target, shapes)
        conversion = Conversion(given, converter, target, model, {}, set(names))
        for name in names:
            size = 4 * int(np.prod(shapes[name]))
            tensors[name] = ConvertedTensor(name, shapes[name], "F32", size, checkpoint.path, conversion)
    return checkpoint.with_tensors(dict(apart(tensors, experts)))


def apart(tensors: Mapping[str, StoredTensor], experts: Mapping[str, Experts]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors, with each tensor of all experts split into the parts of each expert."""
    for name, stored in tensors.items():
        of = experts.get(name.removesuffix("_bias"))
        right = of is not None and len(stored.shape) > 1 and stored.shape[0] == of.count
        yield from of.split(name, stored) if of is not None and right else ((name, stored),)


def _of_experts(
    of: Experts | None, name: str, converter: Any, given: Mapping[str, Sequence[StoredTensor]]
) -> dict[str, StoredTensor] | None:
    """The parts of matrices stored for each expert, unchanged; None if the converter must compute them."""
    operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    if of is None or operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    found = of.whole(name, list(given.values()))
    return None if found is None else dict(found)


def _targets(converter: Any, first: str, shapes: Mapping[str, Any]) -> list[str]:
    """The parameters that a converter makes; its first target pattern matches `first`."""
    start = converter.target_patterns[0]
    names = [first.replace(start, pattern) for pattern in converter.target_patterns]
    return [first, *(name for name in names[1:] if name != first and name in shapes)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts expert 10 after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
