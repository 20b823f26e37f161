# SPDX-License-Identifier: MIT
"""Where the tensors of an adapter belong: a family's table of names, read for products instead of weights.

A table says how a stored matrix W becomes those that the model multiplies: by rows of it, in some order, perhaps after
turning it. What an adapter adds to W, B A, has its rows in B and its columns in A, so the rows that a view takes of W
are those that it takes of B. A view is tried on numbered rows, once for each kind of matrix.
An adapter may bear the names of either format, whatever the model was loaded from; each name is looked at as a file of
its own format would be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.loading.views import ColumnOrder, View, constant
from candle_vllm.core.loading.weights import WeightName, expand
from candle_vllm.core.quantization.tensors import StoredTensor

Format: TypeAlias = Literal["safetensors", "gguf"]

_PAIRS_IN_GGUF = ("llama", "mistral", "ministral", "ministral3", "mistral3", "mixtral", "smollm3", "internlm3")
_PAIRS_IN_GGUF += ("internlm2", "granite", "granitemoe", "granite_swa", "muse_glimmer_text")
"""Models whose queries and keys stand in pairs of neighbours in GGUF files, and in halves in Hugging Face's."""

_TOWERS = ("model.language_model.", "language_model.model.", "language_model.")
"""What stands before a text model's names where it was trained as a part of a larger one."""
_TRUNKS = ("model.", "bert.", "roberta.")
"""What stands before them where it was trained with a head, and not where it was trained as a trunk."""


@dataclasses.dataclass(frozen=True, eq=False)
class Spot:
    """A matrix of the model, or its bias, that a stored tensor belongs to.

    Attributes:
        path: of the layer: "layers.0.attention.qkv".
        prefix: beginning of the part's name: "q."; "gate.3." of an expert.
        kind: the rest of it: "weight", "bias".
        shape: that the model wants.
        view: how the stored tensor is looked at.
        expert: its number, where the stored tensor is that of all experts.
    """

    path: str
    prefix: str
    kind: str
    shape: tuple[int, ...]
    view: View | None
    expert: int | None

    @property
    def is_matrix(self) -> bool:
        """It is one that a `Linear` multiplies, or a table."""
        return self.kind == "weight" and len(self.shape) == 2


class AdapterPlaces:
    """The places of a model.

    Args:
        table: the family's names.
        config: the model's, as it was loaded.
        shapes: by target, of all parts that the model has.
    """

    def __init__(self, table: Sequence[WeightName], config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._table, self._shapes = table, shapes
        pairs = config.model_type in _PAIRS_IN_GGUF
        self._configs: Mapping[Format, Any] = {
            "safetensors": dataclasses.replace(config, interleaved_rotary=False) if pairs else config,
            "gguf": dataclasses.replace(config, interleaved_rotary=True) if pairs else config,
        }
        self._orders: dict[tuple[Any, Format, int], np.ndarray | None] = {}

    @functools.cached_property
    def _hf(self) -> Mapping[str, list[Spot]]:
        return self._read("safetensors")

    @functools.cached_property
    def _gguf(self) -> Mapping[str, list[Spot]]:
        return self._read("gguf")

    def _index(self, format: Format) -> Mapping[str, list[Spot]]:
        return self._hf if format == "safetensors" else self._gguf

    def _read(self, format: Format) -> Mapping[str, list[Spot]]:
        found: dict[str, list[Spot]] = {}
        for line in expand(self._table, self._configs[format], format):
            shape = self._shapes.get(line.target)
            if shape is None:
                continue
            path, part = line.target.split(":")
            prefix, _, kind = part.rpartition(".")
            for written, view in line.names:
                name = written if line.expert is None else written.replace("{e}", str(line.expert))
                of_all = line.expert if name == written else None
                spot = Spot(path, prefix and f"{prefix}.", kind, shape, view, of_all)
                found.setdefault(name, []).append(spot)
        return found

    @functools.cached_property
    def _parameters(self) -> Mapping[str, list[str]]:
        """Names of tensors of all experts by the module that has them, in the order in which it does."""
        found: dict[str, list[str]] = {}
        for name, spots in self._hf.items():
            if spots[0].expert is not None and spots[0].kind == "weight":
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def find(self, name: str, format: Format) -> Sequence[Spot]:
        """The places of a stored tensor; none for a name that no file of this model has."""
        return self._index(format).get(name, ())

    def module(self, name: str) -> tuple[str, Sequence[Spot]]:
        """A module of Hugging Face's, its name as the table has it, and the places of its matrix or parameter.

        A prefix that a trunk lacks or a larger model has more is put right.
        """
        index = self._hf
        for known in _spellings(name):
            for end in (".weight", ""):
                if known + end in index:
                    return known, index[known + end]
        return name, ()

    def parameters(self, module: str) -> tuple[str, Sequence[str]]:
        """A module that has tensors of all experts, its name as the table has it, and theirs."""
        for known in _spellings(module):
            if known in self._parameters:
                return known, self._parameters[known]
        return module, ()

    def modules(self, format: Format) -> list[str]:
        """Names of all matrices, for messages and for tests."""
        return [name for name, spots in self._index(format).items() if spots[0].is_matrix]

    def look(self, stored: StoredTensor, spot: Spot, format: Format) -> StoredTensor:
        """A tensor in the place of the stored one, as the model wants it."""
        return stored if spot.view is None else spot.view(stored, self._configs[format])

    def rows(self, spot: Spot, total: int, format: Format) -> np.ndarray:
        """Which rows of B a place takes, in its order, int64 [N].

        Args:
            spot: the place.
            total: rows of the whole B.
            format: whose name the tensor bears.

        Raises:
            WeightsError: the place is not made of rows of such a matrix.
        """
        key = (spot.view, format, total)
        if key not in self._orders:
            self._orders[key] = self._order(spot, total, self._configs[format])
        order = self._orders[key]
        if order is None:
            raise WeightsError(f"{total} rows are none of which {spot.path} is made")
        return order

    def columns(self, spot: Spot, a: StoredTensor, format: Format) -> StoredTensor:
        """A with its columns as the inputs of a place stand; `format` as of `rows`."""
        return spot.view(a, self._configs[format]) if isinstance(spot.view, ColumnOrder) else a

    def _order(self, spot: Spot, total: int, config: Any) -> np.ndarray | None:
        """The order of a view; None where what it gives are no rows of what it is given."""
        if spot.view is None or isinstance(spot.view, ColumnOrder):  # whose columns are A's
            return np.arange(total)
        upright, turned = np.arange(2 * total).reshape(total, 2), np.arange(2 * total).reshape(2, total)
        seen = _seen(spot.view, upright, config)
        if seen is not None and seen.ndim == 2 and seen.shape[1] == 2 and (seen == seen[:, :1] + [0, 1]).all():
            return seen[:, 0] // 2
        seen = _seen(spot.view, turned, config)
        if seen is not None and seen.ndim == 2 and seen.shape[1] == 2 and (seen == seen[:, :1] + [0, total]).all():
            return seen[:, 0]
        return None


def _seen(view: View, numbers: np.ndarray, config: Any) -> np.ndarray | None:
    try:
        return view(constant("rows", numbers, Path()), config).load("F32").astype(np.int64)
    except WeightsError:
        return None


def _spellings(name: str) -> list[str]:
    """A module's name, then as a text model of its own has it."""
    found = [name]
    for tower in _TOWERS:
        if name.startswith(tower):
            rest = name.removeprefix(tower)
            found += [rest, f"model.{rest}"]
    found += [name.removeprefix(trunk) for trunk in _TRUNKS if name.startswith(trunk)]
    return [*found, *(f"{trunk}{name}" for trunk in _TRUNKS)]
