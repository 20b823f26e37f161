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

    A norm behind a matrix is added to a residual as any value is: `residual + norm(x)`, or
    `next_norm.add(norm(x), residual)`; in a recorded step either is one operation.

    Args:
        size, eps, placement: as usual.
        weighted: there is a weight; else it is 1.

    Attributes:
        shares: where x may be this rank's rows alone, and the residual is those of all; else None.
    """

    def __init__(self, size: int, eps: float, placement: Placement, *, weighted: bool = True) -> None:
        self.eps = eps
        self.weight = placement.empty(size) if weighted else placement.constant(np.ones(size, np.float32))
        self._weighted = weighted
        self.shares: TokenShares | None = None

    def __call__(self, x: Value) -> Value:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Value, residual: Value | None) -> tuple[Value, Value]:
        """(norm of residual + x, residual + x): a layer's input, and what its output is added to; None is nothing."""
        if residual is None:
            return self(x), x
        if self.shares is not None:
            residual = self.shares.of(residual)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)} if self._weighted else {}
