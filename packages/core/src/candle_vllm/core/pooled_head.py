# SPDX-License-Identifier: MIT
"""Layers after the pooling, which compute a vector, or the scores or classes of a head.

They are a few products with one vector per text, or one vector per token. numpy computes the products in float32, and
biases, activations and norms in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DenseActivation = Literal["none", "tanh", "relu", "gelu", "gelu_tanh", "silu"]
Likelihood = Literal["none", "sigmoid", "softmax"]
"""Activation of logits: none, or one that maps them to 0..1: a sigmoid of each, or a softmax over all."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dense:
    """norm(act(W x + b)): vectors x [..., K] become [..., N].

    Attributes:
        weight, bias: float32 [N, K] and [N]; bias is None for a layer without a bias.
        norm, eps: float32 weight [N] and epsilon of a LayerNorm; None without a norm.
        norm_bias: bias of the LayerNorm, if it has one.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    activation: DenseActivation = "none"
    norm: NDArray[np.float32] | None = None
    eps: float = 1e-5
    norm_bias: NDArray[np.float32] | None = None

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        y = (x.astype(np.float32) @ self.weight.T).astype(np.float64)
        y = _activated(y if self.bias is None else y + self.bias, self.activation)
        if self.norm is None:
            return y
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + self.eps) * self.norm
        return y if self.norm_bias is None else y + self.norm_bias


def _activated(y: NDArray[np.float64], kind: DenseActivation) -> NDArray[np.float64]:
    if kind == "gelu":
        halves = [math.erf(value) for value in (y / math.sqrt(2)).ravel()]
        return y * 0.5 * (1 + np.array(halves).reshape(y.shape))
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
    """Layers after the pooling.

    Attributes:
        layers: the layers in order; empty if the model has computed all of them.
        labels: names of the outputs of the last layer, for a head for scores and classes.
        likelihood: activation of these outputs.
    """

    layers: tuple[Dense, ...] = ()
    labels: tuple[str, ...] = ()
    likelihood: Likelihood = "none"

    def of(self, kind: str) -> PooledHead:  # noqa: ARG002
        """See `pooling.Behind`."""
        return self

    def by_token(
        self, rows: NDArray[np.float64], token_ids: Sequence[int], *, activate: bool, sparse: bool
    ) -> NDArray[np.float64]:
        """See `pooling.Behind`; each position passes the same layers."""
        del token_ids
        assert not sparse
        return self(rows, activate=activate)

    def __call__(self, pooled: NDArray[np.float64], *, activate: bool) -> NDArray[np.float64]:
        for layer in self.layers:
            pooled = layer(pooled)
        if not activate or self.likelihood == "none":
            return pooled
        if self.likelihood == "sigmoid":
            return _sigmoid(pooled)
        powers = np.exp(pooled - pooled.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
