# SPDX-License-Identifier: MIT
"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rms_norm import add_rms_norm, rms_norm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Parameter

if TYPE_CHECKING:
    from candle_vllm.core.kernels.collectives.token_shares import TokenShares


class RMSNorm:
    """RMSNorm over the last dimension of x [T, ..., size].

    The norm of a sublayer's result (post-norm) is added to the residual like any other value: `residual + norm(x)`, or
    `next_norm.add(norm(x), residual)`; in a recorded step each of these is one operation.

    Args:
        size, eps, placement: elements of the last dimension, epsilon, device and types of the weight.
        weighted: whether the norm has a weight; otherwise the weight is 1.

    Attributes:
        shares: divides rows among ranks, if x may have only this rank's rows and the residual has all; otherwise None.
    """

    def __init__(self, size: int, eps: float, placement: Placement, *, weighted: bool = True) -> None:
        self.eps = eps
        made = weighted or placement.shapes_only  # a config may claim any size until its shapes are checked
        self.weight = placement.empty(size) if made else placement.constant(np.ones(size, np.float32))
        self._weighted = weighted
        self.shares: TokenShares | None = None

    def __call__(self, x: Value) -> Value:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Value, residual: Value | None) -> tuple[Value, Value]:
        """Return (norm of residual + x, residual + x), a layer's input and its residual; residual may be None."""
        if residual is None:
            return self(x), x
        if self.shares is not None:
            residual = self.shares.of(residual)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def parameters(self) -> Mapping[str, Parameter]:
        return {"weight": TensorParameter(self.weight)} if self._weighted else {}
