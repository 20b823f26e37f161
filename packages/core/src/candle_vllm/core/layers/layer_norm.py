# SPDX-License-Identifier: MIT
"""LayerNorm of hidden states, and of heads with separate weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from candle_vllm.core.kernels.layer_norm import layer_norm
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Parameter


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x [T, size]; the arithmetic is fp32.

    Without `weighted` the weight is 1. Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450.
    """

    def __init__(
        self, size: int, eps: float, placement: Placement, *, weighted: bool = True, bias: bool = True
    ) -> None:
        self.eps = eps
        self.weight = placement.empty(size) if weighted else placement.constant(np.ones(size, np.float32))
        self._weighted = weighted
        self.bias = placement.empty(size) if bias else None

    def __call__(self, x: Value) -> Value:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Value, residual: Value | None) -> tuple[Value, Value]:
        """Return (norm of residual + x, residual + x), a layer's input and its residual; residual may be None."""
        total = x if residual is None else residual + x
        return self(total), total

    def parameters(self) -> Mapping[str, Parameter]:
        found: dict[str, Parameter] = {"weight": TensorParameter(self.weight)} if self._weighted else {}
        return found if self.bias is None else {**found, "bias": TensorParameter(self.bias)}


class HeadLayerNorm:
    """LayerNorm over each head of x [T, heads, size], with a row of the weight [heads, size] for each; no bias.

    Checkpoints have the weight as one tensor, "weight", or, with `rows`, one per head, "0.weight", "1.weight", ...; the
    first head of this rank has the index `first`.
    """

    def __init__(
        self, heads: int, size: int, eps: float, placement: Placement, *, rows: bool = False, first: int = 0
    ) -> None:
        self.eps = eps
        self.weight = placement.empty(heads, size)
        self._rows, self._first = rows, first

    def __call__(self, x: Value) -> Value:
        return layer_norm(x, self.weight, None, self.eps)

    def parameters(self) -> Mapping[str, Parameter]:
        if not self._rows:
            return {"weight": TensorParameter(self.weight)}
        return {f"{head}.weight": TensorParameter(row) for head, row in enumerate(self.weight, self._first)}
