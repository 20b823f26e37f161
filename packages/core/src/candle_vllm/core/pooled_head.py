# SPDX-License-Identifier: MIT
"""Layers behind the pooling, of a vector or of a head for scores and classes.

They are a few products with one vector a text, and computed by numpy, in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DenseActivation = Literal["none", "tanh", "relu", "gelu", "gelu_tanh", "silu"]
Likelihood = Literal["none", "sigmoid", "softmax"]
"""How logits are brought to 0..1: not at all, each by a sigmoid, or all by a softmax."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dense:
    """norm(act(W x + b)) of a vector x [K], [N].

    Attributes:
        weight, bias: float32 [N, K] and [N]; no bias is None.
        activation: act.
        norm, eps: float32 weight [N] and epsilon of a LayerNorm without a bias; None where there is none.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    activation: DenseActivation = "none"
    norm: NDArray[np.float32] | None = None
    eps: float = 1e-5

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        y = (self.weight @ x.astype(np.float32)).astype(np.float64)
        y = _activated(y if self.bias is None else y + self.bias, self.activation)
        if self.norm is None:
            return y
        return (y - y.mean()) / np.sqrt(y.var() + self.eps) * self.norm


def _activated(y: NDArray[np.float64], kind: DenseActivation) -> NDArray[np.float64]:
    if kind == "gelu":
        return y * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in y]))
    if kind == "gelu_tanh":
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if kind == "silu":
        return y * _sigmoid(y)
    return {"none": lambda: y, "tanh": lambda: np.tanh(y), "relu": lambda: np.maximum(y, 0)}[kind]()


def _sigmoid(y: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-y))


@dataclasses.dataclass(frozen=True, eq=False)
class PooledHead:
    """What stands behind the pooling.

    Attributes:
        layers: in order; none where the model has computed all of them.
        labels: names of the numbers that the last one gives, of a head for scores and classes.
        likelihood: how these are brought to 0..1.
    """

    layers: tuple[Dense, ...] = ()
    labels: tuple[str, ...] = ()
    likelihood: Likelihood = "none"

    def __call__(self, pooled: NDArray[np.float64], *, activate: bool) -> NDArray[np.float64]:
        for layer in self.layers:
            pooled = layer(pooled)
        if not activate or self.likelihood == "none":
            return pooled
        if self.likelihood == "sigmoid":
            return _sigmoid(pooled)
        powers = np.exp(pooled - pooled.max())
        return powers / powers.sum()
