# SPDX-License-Identifier: MIT
"""Map an adapter's tensors to the layers of a model, by the family's table of weight names.

A table's views define how a stored matrix W [N, K] becomes the matrices that the model multiplies. They select rows of
W in some order, perhaps after a transposition, or reorder its columns (`ColumnOrder`). An adapter adds B A to W, with
B [N, r] and A [r, K], so a view selects the same rows of B, which are found by applying the view to row numbers, or it
reorders the columns of A. Adapters may have the names of safetensors or GGUF files, whatever the model's format.
"""

from __future__ import annotations

import contextlib
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

_TOWERS = ("model.language_model.", "language_model.model.", "language_model.")
"""Prefixes of a text model's names, if it was trained as a part of a multimodal model."""
_TRUNKS = ("model.", "bert.", "roberta.")
"""Prefixes of names, if the model was trained with a head; a model that was trained without a head lacks them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Spot:
    """Parameter of the model to which a stored tensor belongs.

    Attributes:
        path: path of the layer, such as "layers.0.attention.qkv".
        prefix: prefix of the parameter's name in the layer: "", "q.", or "gate.3." for expert 3.
        kind: last part of that name, such as "weight", "bias" or "taps".
        expert: the expert's number, if the stored tensor holds all experts.
    """

    path: str
    prefix: str
    kind: str
    shape: tuple[int, ...]
    view: View | None
    expert: int | None


class AdapterPlaces:
    """Adapter sites of a model, by the names of tensors.

    Args:
        shapes: shapes of all parameters of the model, by target.
        pairs: query and key rows have interleaved rotary order in GGUF files, and half-split order in safetensors.
    """

    def __init__(
        self, table: Sequence[WeightName], config: Any, shapes: Mapping[str, tuple[int, ...]], *, pairs: bool = False
    ) -> None:
        self._table, self._shapes = table, shapes
        self._configs: Mapping[Format, Any] = {
            "safetensors": dataclasses.replace(config, interleaved_rotary=False) if pairs else config,
            "gguf": dataclasses.replace(config, interleaved_rotary=True) if pairs else config,
        }
        self._orders: dict[tuple[Any, Format, int, int], np.ndarray] = {}
        self._spots: dict[Format, dict[str, list[Spot]]] = {}

    def _by_name(self, format: Format) -> Mapping[str, list[Spot]]:
        if format in self._spots:
            return self._spots[format]
        found = self._spots[format] = dict[str, list[Spot]]()
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
        """By module name, the names of its tensors that hold all experts, in the table's order."""
        found: dict[str, list[str]] = {}
        for name, spots in self._by_name("safetensors").items():
            if spots[0].expert is not None and spots[0].kind == "weight":
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def find(self, name: str, format: Format) -> Sequence[Spot]:
        """Return the spots of a stored tensor; empty for a name that does not exist in this model."""
        return self._by_name(format).get(name, ())

    def module(self, name: str) -> tuple[str, Sequence[Spot]]:
        """Return the table's name of a Hugging Face module, and the spots of its matrix or parameter.

        A prefix that differs because the base model had no head, or was a part of a multimodal model, is corrected.
        """
        index = self._by_name("safetensors")
        for known in _spellings(name):
            for end in (".weight", ""):
                if known + end in index:
                    return known, index[known + end]
        return name, ()

    def parameters(self, module: str) -> tuple[str, Sequence[str]]:
        """Return the table's name of a module with tensors of all experts, and the names of these tensors."""
        for known in _spellings(module):
            if known in self._parameters:
                return known, self._parameters[known]
        return module, ()

    def look(self, stored: StoredTensor, spot: Spot, format: Format) -> StoredTensor:
        """Apply a spot's view to a stored tensor."""
        return stored if spot.view is None else spot.view(stored, self._configs[format])

    def rows(self, spot: Spot, total: int, format: Format) -> np.ndarray:
        """Return the numbers of the rows of B that a spot uses, in the spot's order, int64; B has `total` rows.

        Raises WeightsError if the spot's view does not select rows of a matrix with `total` rows.
        """
        key = (spot.view, format, total, spot.shape[0])  # layers with different heads share a view
        order = self._orders.get(key)
        if order is None:
            order = self._order(spot, total, self._configs[format])
            if order is None:
                raise WeightsError(f"a matrix B of {total} rows does not fit the layer {spot.path}")
            if len(order) == spot.shape[0]:  # orders of refused adapters are not kept
                self._orders[key] = order
        return order

    def columns(self, spot: Spot, a: StoredTensor, format: Format) -> StoredTensor:
        """Return A with its columns in the order of a spot's inputs; `format` as for `rows`."""
        return spot.view(a, self._configs[format]) if isinstance(spot.view, ColumnOrder) else a

    def _order(self, spot: Spot, total: int, config: Any) -> np.ndarray | None:
        """Return the row order of a view; None for a view that does not select rows."""
        if spot.view is None or isinstance(spot.view, ColumnOrder):  # A's columns are reordered instead
            return np.arange(total)
        for shape, step, each in (((total, 2), 1, 2), ((2, total), total, 1)):  # rows, or columns that are transposed
            numbers = constant(spot.path, np.arange(2 * total).reshape(shape), Path())  # a view may read the name
            with contextlib.suppress(WeightsError):
                seen = spot.view(numbers, config).load("F32").astype(np.int64)
                if seen.ndim == 2 and seen.shape[1] == 2 and (seen == seen[:, :1] + [0, step]).all():
                    return seen[:, 0] // each
        return None


def _spellings(name: str) -> list[str]:
    """Return a module's name, then its possible names in the table, with other prefixes."""
    found = [name]
    for tower in _TOWERS:
        if name.startswith(tower):
            rest = name.removeprefix(tower)
            found += [rest, f"model.{rest}"]
    found += [name.removeprefix(trunk) for trunk in _TRUNKS if name.startswith(trunk)]
    return [*found, *(f"{trunk}{name}" for trunk in _TRUNKS)]
