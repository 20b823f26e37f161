# SPDX-License-Identifier: MIT
"""The MLP of Apertus (`apertus.py`), with the activation xIELU (arXiv:2411.13010)."""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement


def xielu(x: Value, numbers: Any) -> Value:
    """beta x + p max(x, 0)^2 + n (expm1(z) - z), z = min(x, 0); `numbers` are p, n, beta. In place if recorded."""
    if isinstance(x, Recorded):
        return x.xielu(numbers)
    wide, (p, n, beta) = x.float(), numbers
    above, below = wide.clamp(min=0), wide.clamp(max=0)
    return (beta * wide + p * above * above + n * (below.expm1() - below)).to(x.dtype)


class XieluMLP:
    """down(xielu(up(x))) for x [T, E]."""

    def __init__(self, config: Any, layer: int, placement: Placement) -> None:
        self.up = Linear(config.hidden_size, config.intermediate_size, placement)
        self.down = Linear(config.intermediate_size, config.hidden_size, placement)
        self._numbers = placement.constant(config.numbers(layer))

    def __call__(self, x: Value) -> Value:
        return self.down(xielu(self.up(x), self._numbers))
