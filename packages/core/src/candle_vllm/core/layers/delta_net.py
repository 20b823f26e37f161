# SPDX-License-Identifier: MIT
"""The gated delta net: linear attention with a state of fixed size instead of keys and values.

Source: Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464, as in Qwen3-Next and OLMo Hybrid.
Shapes: T tokens, E hidden, Hk and Hv key and value heads, Dk and Dv their sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, kept_inputs
from candle_vllm.core.kernels.delta_rule.layout import state_shape as delta_shape
from candle_vllm.core.kernels.recorded import GateKind, Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.short_conv import state_shape as conv_shape
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.cache_specs import StatePart, StateSpec
from candle_vllm.core.loading.weights import Parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaSizes:
    """Shapes of a gated delta net.

    Attributes:
        key_heads, heads: Hk and Hv; heads / key_heads value heads share a key head.
        key_dim, value_dim: Dk and Dv.
        taps: kernel size of the convolution.
        by_channel: each channel of a key has its own decay.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int
    by_channel: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise InvalidFileError(f"{self.heads} linear-attention value heads cannot share {self.key_heads} key heads")

    @property
    def parts(self) -> tuple[int, int, int]:
        """Elements of a token's queries, keys and values."""
        return self.key_heads * self.key_dim, self.key_heads * self.key_dim, self.heads * self.value_dim

    @property
    def channels(self) -> int:
        """Elements of a token's queries, keys and values together: the channels of the convolution."""
        return sum(self.parts)

    @property
    def state(self) -> StateSpec:
        """The state that a layer stores for a sequence."""
        tail = StatePart(conv_shape(self.channels, self.taps), self.channels, exact=False)
        gates = self.key_dim + 1 if self.by_channel else 2
        inputs = kept_inputs(self.key_heads, self.heads, self.key_dim, self.value_dim, gates=gates)
        return StateSpec((tail, StatePart(delta_shape(self.heads, self.key_dim, self.value_dim), inputs)))


class GatedDeltaNet:
    """Linear attention with a state: x [T, E] -> [T, E].

    Args:
        layer: index of the layer's cache.
        size: E.
        eps: epsilon of the result's norm.
        apart: checkpoints store q, k and v as three matrices, the parts "q", "k" and "v" of `inputs`, and the kernels
            of their convolutions as the parts "q.taps", "k.taps" and "v.taps"; otherwise "qkv" and "taps".
        strength: see `DeltaGates`.
        gate: activation of the gate of the result.
    """

    def __init__(
        self,
        layer: int,
        size: int,
        sizes: DeltaSizes,
        eps: float,
        placement: Placement,
        *,
        apart: bool = False,
        strength: float = 1.0,
        gate: GateKind = "silu",
    ) -> None:
        self.layer, self.sizes, self._gate = layer, sizes, gate
        heads, values, channels = self.sizes.heads, self.sizes.parts[2], self.sizes.channels
        mixed = dict(zip("qkv", self.sizes.parts, strict=True)) if apart else {"qkv": channels}
        self.apart, self.widths = apart, (channels, values, heads, heads)
        self.inputs = Linear(size, {**mixed, "z": values, "b": heads, "a": heads}, placement)
        self.norm = RMSNorm(sizes.value_dim, eps, placement)
        self.result = Linear(values, size, placement)
        self.taps = placement.empty(channels, self.sizes.taps)
        self.gates = DeltaGates(placement.empty(heads), placement.empty(heads), strength)

    def __call__(self, x: Value, step: StepInput) -> Value:
        tail, state = step.caches[self.layer]
        key, value = self.sizes.key_dim, self.sizes.value_dim
        qkv, z, b, a = self.inputs(x).split(self.widths, dim=-1)
        parts = short_conv(qkv, self.taps, None, tail, step.states, silu=True).split(self.sizes.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, (key, key, value), strict=True))
        mixed = delta_rule(q, k, v, a, b, self.gates, state, step.states, scale=key**-0.5)  # [T, Hv, Dv]
        return self.result(gated(self.norm(mixed).flatten(1), z, self._gate))

    def parameters(self) -> Mapping[str, Parameter]:
        plain: dict[str, Value] = {"decay": self.gates.decay, "bias": self.gates.bias}
        if self.apart:
            first, second, _ = np.cumsum(self.sizes.parts).tolist()
            plain |= {"q.taps": self.taps[:first], "k.taps": self.taps[first:second], "v.taps": self.taps[second:]}
        else:
            plain["taps"] = self.taps
        return {name: TensorParameter(value) for name, value in plain.items()}
