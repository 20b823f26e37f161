"""Feed-forward layers."""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.silu_mul import silu_mul
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement


class GatedMLP:
    """SwiGLU: down(silu(gate(x)) * up(x)) for x [T, E], with gate and up as one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, placement: Placement, *, bias: bool = False) -> None:
        shards = {"gate": intermediate_size, "up": intermediate_size}
        self.gate_up = Linear(hidden_size, shards, placement, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, placement, bias=bias)

    def __call__(self, x: Value) -> Value:
        return self.down(silu_mul(self.gate_up(x)))
