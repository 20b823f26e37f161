# SPDX-License-Identifier: MIT
"""Parts of Gemma 4's vision encoder: clamped matrices, the norm of queries, positions, and the shift of means.

Shapes: T patches, E hidden, D head size, C cells, N rows of the position table for columns, and as many for rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.scale_cap import clamp_
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models.tower_family import TowerConfig

BOUNDS = MappingProxyType({"input_min": -np.inf, "input_max": np.inf, "output_min": -np.inf, "output_max": np.inf})
"""Bounds of a matrix's inputs and outputs by name, with neutral values."""


class Bounds:
    """Lower and upper bounds of a matrix's inputs and outputs; the parameters have the names of `BOUNDS`."""

    def __init__(self, placement: Placement) -> None:
        self._stored = {name: placement.empty(1) for name in BOUNDS}
        self.inputs = self.results = (-math.inf, math.inf)

    def finish(self) -> None:
        """See `Finishes`."""
        low, high, least, most = (float(on_host(each)[0]) for each in self._stored.values())
        self.inputs, self.results = (low, high), (least, most)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {name: TensorParameter(each) for name, each in self._stored.items()}


class BoundedLinear:
    """x [T, size] times a matrix without a bias; if `clipped`, inputs and outputs are clamped to stored bounds."""

    def __init__(self, size: int, results: int, clipped: bool, placement: Placement) -> None:
        self.matrix = Linear(size, results, placement)
        self.bounds = Bounds(placement) if clipped else None

    def __call__(self, x: Value) -> Value:
        if self.bounds is None:
            return self.matrix(x)
        if any(map(math.isfinite, self.bounds.inputs)):
            x = clamp_(side_by_side(x), *self.bounds.inputs)
        x = self.matrix(x)
        return clamp_(x, *self.bounds.results) if any(map(math.isfinite, self.bounds.results)) else x


class QueryNorm(RMSNorm):
    """The norm of queries, times the root of D: Gemma does not divide scores by it, and `whole_attention` does."""

    def finish(self) -> None:
        """See `Finishes`."""
        self.weight *= len(self.weight) ** 0.5


class Standard:
    """(x - bias) * scale for means x [C, E] on the host or the device."""

    def __init__(self, config: TowerConfig, placement: Placement) -> None:
        self.bias, self.scale = (placement.empty(config.hidden_size) for _ in range(2))

    def __call__(self, means: Any) -> Any:
        return (means - self.bias) * self.scale

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"bias": TensorParameter(self.bias), "scale": TensorParameter(self.scale)}


class Positions:
    """Learned vectors of columns, followed by those of rows: a table [2 * N, E] that the host looks up."""

    def __init__(self, config: TowerConfig, placement: Placement) -> None:
        if config.learned < config.side:
            raise InvalidFileError(
                f"vision encoder: {config.learned} learned positions are too few for a side of {config.side} patches"
            )
        self.weight = placement.empty(2 * config.learned, config.hidden_size)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Position vectors [n, E] for the row and column of each patch [n, 2]."""
        table = on_host(self.weight)
        return table[places[:, 1]] + table[len(table) // 2 + places[:, 0]]

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)}
