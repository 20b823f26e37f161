# SPDX-License-Identifier: MIT
"""Names of a checkpoint as transformers reads them: renamed, merged and cut by its own tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.kernels.torch_numbers import load_tensor
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.quantization.tensors import StoredTensor

_ABSENT = torch.empty(0)


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedTensor(StoredTensor):
    """A tensor that transformers makes of several stored ones, or of a part of one, when it is loaded.

    Attributes:
        sources: the stored tensors that it is made of, by the pattern of the converter that their names match.
        converter: what makes it.
        first: the module parameter that the converter is asked for; it may give several.
        model: of transformers, which converters look at.
    """

    sources: Mapping[str, tuple[StoredTensor, ...]]
    converter: Any
    first: str
    model: Any

    @property
    def path(self) -> Path:
        """See `StoredTensor`."""
        return next(iter(self.sources.values()))[0].path

    def raw(self) -> np.ndarray:
        """See `StoredTensor`."""
        return self.load().view(np.uint8).reshape(-1, self.shape[-1] * 4)

    def load(self, dtype: str | None = "F32") -> np.ndarray:
        """See `StoredTensor`; the other tensors of a converter that gives several are made again."""
        assert dtype in (None, "F32"), "converted tensors are fp32"
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.sources.items():
            for each in stored:
                converter.add_tensor(self.first, each.name, pattern, load_tensor(each))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        found = made[self.name]
        found = found[0] if isinstance(found, list) else found
        if tuple(found.shape) != self.shape:
            raise WeightsError(
                f"{self.path}: {self.name} has shape {list(found.shape)}; the config asks for {list(self.shape)}"
            )
        return found.contiguous().numpy()

    def release(self) -> None:
        """See `StoredTensor`."""
        for stored in self.sources.values():
            for each in stored:
                each.release()


def named_for(model: Any, shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of a checkpoint under the names of a model's parameters, in the shapes that it has them.

    Args:
        model: of transformers; only its classes and names are looked at.
        shapes: of its parameters.
        checkpoint: as it is stored.
    """
    mapping = get_model_conversion_mapping(model)
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
        given = {pattern: tuple(stored) for pattern, stored in sources.items()}
        for name in _targets(converter, target, shapes):
            size = 4 * int(np.prod(shapes[name]))
            tensors[name] = ConvertedTensor(name, shapes[name], "F32", size, given, converter, target, model)
    return checkpoint.with_tensors(tensors)


def _targets(converter: Any, first: str, shapes: Mapping[str, Any]) -> list[str]:
    """The parameters that a converter gives, of which `first` is named by its first target pattern."""
    start = converter.target_patterns[0]
    names = [first.replace(start, pattern) for pattern in converter.target_patterns]
    return [first, *(name for name in names[1:] if name != first and name in shapes)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key by which expert 10 comes behind expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
