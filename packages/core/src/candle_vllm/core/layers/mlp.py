# SPDX-License-Identifier: MIT
"""Feed-forward layers: with a gate, and without."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import GateKind, Recorded, Value
from candle_vllm.core.kernels.silu_mul import gate_mul
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement


class GatedMLP:
    """SwiGLU or GeGLU: down(act(gate(x)) * up(x)) for x [T, E], with gate and up as one product.

    Args:
        hidden_size, intermediate_size: E and F.
        bias: whether all three matrices have biases.
        down_bias: whether the last matrix has a bias; None for the value of `bias`.
        activation: activation of the gate.
        fused: whether checkpoints have gate and up as one matrix [2F, E], the gate's rows first: `WeightName` target
            `gate_up:weight`; otherwise the targets are `gate_up:gate.weight` and `gate_up:up.weight`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        placement: Placement,
        *,
        bias: bool = False,
        down_bias: bool | None = None,
        activation: GateKind = "silu",
        fused: bool = False,
    ) -> None:
        shards = 2 * intermediate_size if fused else {"gate": intermediate_size, "up": intermediate_size}
        self.gate_up = Linear(hidden_size, shards, placement, bias=bias, sections=2 if fused else 1)
        self.down = Linear(intermediate_size, hidden_size, placement, bias=bias if down_bias is None else down_bias)
        self._activation: GateKind = activation

    def __call__(self, x: Value) -> Value:
        return self.down(gate_mul(self.gate_up(x), self._activation))


class MLP:
    """down(act(up(x))) for x [T, E]. Arguments as in `GatedMLP`."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        placement: Placement,
        *,
        bias: bool = True,
        activation: Activation = "gelu_tanh",
    ) -> None:
        self.up = Linear(hidden_size, intermediate_size, placement, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, placement, bias=bias)
        self._activation: Activation = activation

    def __call__(self, x: Value) -> Value:
        return self.down(activation(self.up(x), self._activation))


class XieluMLP:
    """down(xielu(up(x))) for x [T, E]. Arguments as in `GatedMLP`, and the factors of `xielu` [3]."""

    def __init__(self, hidden_size: int, intermediate_size: int, factors: Any, placement: Placement) -> None:
        self.up = Linear(hidden_size, intermediate_size, placement)
        self.down = Linear(intermediate_size, hidden_size, placement)
        self._factors = placement.constant(factors)

    def __call__(self, x: Value) -> Value:
        return self.down(xielu(self.up(x), self._factors))


def xielu(x: Value, factors: Any) -> Value:
    """Return beta x + p max(x, 0)^2 + n (expm1(z) - z) with z = min(x, 0) and factors p, n, beta; in place if recorded.

    Source: Huang and Schlag, 2024, arXiv:2411.13010.
    """
    if isinstance(x, Recorded):
        return x.xielu(factors)
    wide, (p, n, beta) = x.float(), factors
    above, below = wide.clamp(min=0), wide.clamp(max=0)
    return (beta * wide + p * above * above + n * (below.expm1() - below)).to(x.dtype)
