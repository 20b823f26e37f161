# SPDX-License-Identifier: MIT
"""Mamba 2: a state-space mixer, in hybrid models instead of attention or beside it.

A projection computes z, x, B, C and dt. x, B and C pass a short convolution; each head then multiplies its state
by exp(A dt), adds B^T (dt x), and reads it with C. The result is gated by z and normalised in groups.
Source: Dao and Gu, 2024, arXiv:2405.21060.
Shapes: T tokens, E hidden, H heads, P head size, G groups of heads that share B and C, N state size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, kept_inputs
from candle_vllm.core.kernels.delta_rule.layout import state_shape as rule_shape
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rms_norm import rms_norm
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.short_conv import state_shape as conv_shape
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.cache_specs import StatePart, StateSpec
from candle_vllm.core.loading.views import View, computed, flattened
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.attention_names import GG, pair
from candle_vllm.core.models.llama import times
from candle_vllm.core.models.qwen3_next_config import convolution_taps, decay_of_log
from candle_vllm.core.quantization.tensors import StoredTensor

_INFINITE = (math.inf, {"__float__": "Infinity"})
"""Values in files for a dt without an upper limit."""

HYBRID_KEYS = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "groups": "mamba_n_groups",
    "state": "mamba_d_state",
    "taps": "mamba_d_conv",
    "bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
}
"""Argument `keys` of `sizes_from_hf` for hybrid models."""

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaSizes:
    """Shapes and flags of a Mamba 2 mixer.

    Attributes:
        heads, head_dim: H and P.
        groups: G, which divides H.
        state: N.
        taps: kernel size of the convolution.
        bias, conv_bias: whether the two projections have biases, and whether the convolution has one.
        normed: whether the gated result is normalised.
        gate_last: the result is normalised first and then gated.
        factors: factors of z, x, B, C and dt, and of the input of the output projection.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    bias: bool = False
    conv_bias: bool = True
    normed: bool = True
    gate_last: bool = False
    factors: tuple[float, ...] = (1.0,) * 6

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise InvalidFileError(f"{self.heads} heads of Mamba 2 cannot be divided into {self.groups} groups")

    @property
    def inner(self) -> int:
        """Elements of x: H * P."""
        return self.heads * self.head_dim

    @property
    def parts(self) -> tuple[int, int, int]:
        """Elements of a token's x, B and C."""
        return self.inner, self.groups * self.state, self.groups * self.state

    @property
    def spec(self) -> StateSpec:
        """The state that a layer stores for a sequence."""
        channels = sum(self.parts)
        inputs = kept_inputs(self.groups, self.heads, self.state, self.head_dim)
        tail = StatePart(conv_shape(channels, self.taps), channels, exact=False)
        return StateSpec((tail, StatePart(rule_shape(self.heads, self.state, self.head_dim), inputs)))


def sizes_from_hf(fields: Fields, keys: Mapping[str, str], *, inner: int, normed: bool = True) -> MambaSizes:
    """Read a mixer's shapes from `config.json`.

    Args:
        fields: the file's fields.
        keys: the file's keys for "heads", "head_dim", "groups", "state", "taps", "bias" and "conv_bias".
        inner: H * P, used if "head_dim" is missing or "auto".
        normed: see `MambaSizes`.
    """
    limit = fields.get("time_step_limit", list, None)
    if limit is not None and (len(limit) != 2 or limit[0] != 0 or limit[1] not in _INFINITE):
        raise UnsupportedModelError(f"{fields.path}: time_step_limit is {limit!r:.80}; implemented: 0 to infinity")
    heads, dim = fields.count(keys["heads"]), fields.values.get(keys["head_dim"])
    return MambaSizes(
        heads=heads,
        head_dim=inner // heads if dim in (None, "auto") else fields.count(keys["head_dim"]),
        groups=fields.count(keys["groups"], 1),
        state=fields.count(keys["state"]),
        taps=convolution_taps(fields, keys["taps"], 4),
        bias=fields.get(keys["bias"], bool, False),
        conv_bias=fields.get(keys["conv_bias"], bool, True),
        normed=normed,
    )


def sizes_from_gguf(fields: Fields, tensors: Mapping[str, StoredTensor], layers: Sequence[int]) -> MambaSizes:
    """Read a mixer's shapes from GGUF metadata, and its flags from the tensors of `layers`."""
    heads, inner = fields.count("ssm.time_step_rank"), fields.count("ssm.inner_size")
    if inner % heads:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}ssm.inner_size is {inner}, of {heads} heads")

    def has(name: str) -> bool:
        return any(f"blk.{layer}.{name}" in tensors for layer in layers)

    return MambaSizes(
        heads=heads,
        head_dim=inner // heads,
        groups=fields.count("ssm.group_count"),
        state=fields.count("ssm.state_size"),
        taps=convolution_taps(fields, "ssm.conv_kernel"),
        bias=has("ssm_in.bias"),
        conv_bias=has("ssm_conv1d.bias"),
        normed=has("ssm_norm.weight"),
    )


# ---- mixer -----------------------------------------------------------------------------------------------------------


class Mamba2Mixer:
    """Mamba 2: x [T, E] -> [T, E]. Arguments as in `GatedDeltaNet`."""

    def __init__(self, layer: int, size: int, sizes: MambaSizes, eps: float, placement: Placement) -> None:
        self.layer, self.sizes, self.eps = layer, sizes, eps
        channels = sum(sizes.parts)
        self.widths = (sizes.inner, channels, sizes.heads)
        self.inputs = Linear(size, sum(self.widths), placement, bias=sizes.bias)
        self.result = Linear(sizes.inner, size, placement, bias=sizes.bias)
        self.taps = placement.empty(channels, sizes.taps)
        self.taps_bias = placement.empty(channels) if sizes.conv_bias else None
        self.norm = placement.empty(sizes.groups, sizes.inner // sizes.groups) if sizes.normed else None
        decay, bias, skip = (placement.empty(sizes.heads) for _ in range(3))
        self.gates = DeltaGates(decay, bias, skip=skip)

    def __call__(self, x: Value, step: StepInput) -> Value:
        tail, state = step.caches[self.layer]
        z, mixed, dt = self._given(x).split(self.widths, dim=-1)
        mixed = short_conv(mixed, self.taps, self.taps_bias, tail, step.states, silu=True)
        dims = (self.sizes.head_dim, self.sizes.state, self.sizes.state)
        parts = mixed.split(self.sizes.parts, dim=-1)
        v, b, c = (part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, dims, strict=True))
        y = delta_rule(c, b, v, dt, dt, self.gates, state, step.states, scale=1.0, normed=False)  # [T, H, P]
        y = y.flatten(1)
        y = gated(self._normed(y), z, "silu") if self.sizes.gate_last else self._normed(gated(y, z, "silu"))
        return self.result(times(y, self.sizes.factors[5]))

    def _given(self, x: Value) -> Value:
        """Project x to z, x, B, C and dt, side by side and times their factors."""
        given, factors = self.inputs(x), self.sizes.factors[:5]
        if set(factors) == {1.0}:
            return given
        parts = given.split((self.sizes.inner, *self.sizes.parts, self.sizes.heads), dim=-1)
        scaled = [times(part, factor) for part, factor in zip(parts, factors, strict=True)]
        return given if isinstance(given, Recorded) else side_by_side(*scaled)  # recorded parts are scaled in place

    def _normed(self, y: Value) -> Value:
        if self.norm is None:
            return y
        width = self.sizes.inner // self.sizes.groups
        return rms_norm(y.unflatten(-1, (-1, width)), self.norm, self.eps).flatten(1)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        gates = {"decay": self.gates.decay, "bias": self.gates.bias, "skip": self.gates.skip}
        own = {"taps": self.taps, "taps_bias": self.taps_bias, "norm": self.norm, **gates}
        return {name: TensorParameter(value) for name, value in own.items() if value is not None}


# ---- weight names ----------------------------------------------------------------------------------------------------


def in_groups(stored: StoredTensor, config: object) -> StoredTensor:
    """A norm's weight [H * P] as [G, H * P / G]; `config.mamba` has the sizes."""
    groups = config.mamba.groups  # type: ignore[attr-defined]
    if len(stored.shape) != 1 or stored.shape[0] % groups:
        return stored  # the loader reports the wrong shape
    return dataclasses.replace(stored, shape=(groups, stored.shape[0] // groups))


class _Column:
    """View of one value for each head, [H], which GGUF files store as [H, 1]."""

    def __call__(self, stored: StoredTensor, config: object) -> StoredTensor:
        del config
        return dataclasses.replace(stored, shape=stored.shape[:1]) if stored.shape[1:] == (1,) else stored

    def undone(self, stored: StoredTensor, config: object) -> StoredTensor:
        """The tensor in the shape of GGUF files."""
        del config
        return computed(stored, (*stored.shape, 1), lambda values: values[:, None], "F32")


_COLUMN = _Column()


def mixer_names(target: str, *hf: str) -> list[WeightName]:
    """The table rows of a mixer.

    Args:
        target: path of the mixer in a layer, such as "attention".
        hf: its possible names in Hugging Face's files, such as "model.layers.{i}.mamba".
    """
    to = f"layers.{{i}}.{target}"

    def names(part: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for name in hf)

    def line(part: str, stored: str, gguf: str, view: View | None = None, own: View | None = None) -> WeightName:
        return WeightName(f"{to}:{part}", names(stored), GG + gguf, view, own)

    return [
        *pair(f"{to}.inputs:", names("in_proj"), GG + "ssm_in"),
        *pair(f"{to}.result:", names("out_proj"), GG + "ssm_out"),
        line("taps", "conv1d.weight", "ssm_conv1d.weight", flattened),
        line("taps_bias", "conv1d.bias", "ssm_conv1d.bias"),
        line("decay", "A_log", "ssm_a", decay_of_log, _COLUMN),
        line("skip", "D", "ssm_d", None, _COLUMN),
        line("bias", "dt_bias", "ssm_dt.bias"),
        line("norm", "norm.weight", "ssm_norm.weight", in_groups, in_groups),
    ]


def mamba_keys(sizes: MambaSizes) -> dict[str, Any]:
    """The GGUF metadata of Mamba 2."""
    return {
        "ssm.conv_kernel": sizes.taps,
        "ssm.state_size": sizes.state,
        "ssm.group_count": sizes.groups,
        "ssm.time_step_rank": sizes.heads,
        "ssm.inner_size": sizes.inner,
    }
