# SPDX-License-Identifier: MIT
"""Mamba 1: a state-space mixer in which every element of the state decays at its own rate.

A projection computes x and z. x passes a short convolution and gives dt (through a matrix of low rank), B and C; each
channel's state decays by exp(A dt), adds B (dt x), and is read with C. The result is gated by z.
Source: Gu and Dao, 2023, arXiv:2312.00752.
Shapes: T tokens, E hidden, I channels, N state size, R rank of dt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import COLUMNS, DeltaGates, kept_inputs
from candle_vllm.core.kernels.delta_rule.layout import state_shape as rule_shape
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.short_conv import state_shape as conv_shape
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.cache_specs import CacheSpec, StatePart, StateSpec
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed, flattened
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.attention_names import GG, pair
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.qwen3_next_config import convolution_taps, decay_of_log
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveSizes:
    """Shapes and flags of a Mamba 1 mixer.

    Attributes:
        inner, state, rank: I, N and R.
        taps: kernel size of the convolution.
        bias, conv_bias: whether the first and the last projection have biases, and whether the convolution has one.
        eps: epsilon of the norms of dt, B and C; None without these norms.
        weighted: whether these norms have weights.
    """

    inner: int
    state: int
    rank: int
    taps: int
    bias: bool = False
    conv_bias: bool = True
    eps: float | None = None
    weighted: bool = False

    @property
    def spec(self) -> StateSpec:
        """The state that a layer stores for a sequence."""
        tail = StatePart(conv_shape(self.inner, self.taps), self.inner, exact=False)
        inputs = kept_inputs(1, 1, self.state, self.inner, gates=self.inner)
        return StateSpec((tail, StatePart(rule_shape(1, self.state, self.inner), inputs)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveConfig(LlamaConfig):
    """Config of models with Mamba 1: `mamba` has its shapes, and `mamba_layers` are the layers with it."""

    mamba: SelectiveSizes
    mamba_layers: frozenset[int]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`."""
        specs = enumerate(super().cache_specs)
        return tuple(self.mamba.spec if layer in self.mamba_layers else spec for layer, spec in specs)


def sizes_from_hf(fields: Fields, keys: Mapping[str, str], **norms: Any) -> SelectiveSizes:
    """Read a mixer's shapes from `config.json`.

    Args:
        fields: the file's fields.
        keys: the file's keys for "expand", "state", "rank", "taps", "bias" and "conv_bias".
        norms: `eps` and `weighted` of `SelectiveSizes`.
    """
    size, rank = fields.count("hidden_size"), fields.values.get(keys["rank"])
    return SelectiveSizes(
        inner=fields.count(keys["expand"], 2) * size,
        state=fields.count(keys["state"], 16),
        rank=math.ceil(size / 16) if rank in (None, "auto") else fields.count(keys["rank"]),
        taps=convolution_taps(fields, keys["taps"], 4),
        bias=fields.get(keys["bias"], bool, False),
        conv_bias=fields.get(keys["conv_bias"], bool, True),
        **norms,
    )


def sizes_from_gguf(fields: Fields, checkpoint: Checkpoint, **norms: Any) -> SelectiveSizes:
    """Read a mixer's shapes from GGUF metadata, and its biases from the tensors; `norms` as in `sizes_from_hf`."""
    inner, state, rank = (fields.count(f"ssm.{key}") for key in ("inner_size", "state_size", "time_step_rank"))
    taps = convolution_taps(fields, "ssm.conv_kernel")
    ends = {name.partition("ssm_")[2] for name in checkpoint.tensors}
    biases = {"bias": "in.bias" in ends, "conv_bias": "conv1d.bias" in ends}
    return SelectiveSizes(inner=inner, state=state, rank=rank, taps=taps, **biases, **norms)


def selective_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of Mamba 1."""
    sizes: SelectiveSizes = config.mamba
    if sizes.inner != 2 * config.hidden_size or not sizes.conv_bias:
        raise UnsupportedModelError("llama.cpp's Mamba 1 has 2 channels per hidden element, and a convolution's bias")
    keys = {"conv_kernel": sizes.taps, "state_size": sizes.state, "time_step_rank": sizes.rank}
    return {f"ssm.{key}": count for key, count in (keys | {"inner_size": sizes.inner}).items()}


# ---- mixer -----------------------------------------------------------------------------------------------------------


class MambaMixer:
    """Mamba 1: x [T, E] -> [T, E]. Arguments as in `GatedDeltaNet`."""

    def __init__(self, layer: int, size: int, sizes: SelectiveSizes, placement: Placement) -> None:
        self.layer, self.sizes, inner, state = layer, sizes, sizes.inner, sizes.state
        self.widths = (sizes.rank, state, state)
        self.inputs = Linear(size, 2 * inner, placement, bias=sizes.bias)
        self.selection = Linear(inner, sum(self.widths), placement)
        self.times = Linear(sizes.rank, inner, placement)
        self.result = Linear(inner, size, placement, bias=sizes.bias)
        self.taps = placement.empty(inner, sizes.taps)
        self.taps_bias = placement.empty(inner) if sizes.conv_bias else None
        bias, skip = placement.empty(inner), placement.empty(inner)
        self.gates = DeltaGates(placement.empty(*rule_shape(1, state, inner)), bias, skip=skip)
        eps, how = sizes.eps, {"weighted": sizes.weighted}
        self.norms = [] if eps is None else [RMSNorm(width, eps, placement, **how) for width in self.widths]

    def __call__(self, x: Value, step: StepInput) -> Value:
        (tail, state), inner = step.caches[self.layer], self.sizes.inner
        x, z = self.inputs(x).split((inner, inner), dim=-1)
        x = short_conv(x, self.taps, self.taps_bias, tail, step.states, silu=True)
        dt, *parts = self.selection(x).split(self.widths, dim=-1)
        b, c = (part.unflatten(-1, (-1, self.sizes.state)) for part in parts)  # [T, 1, N] each
        if self.norms:
            dt, b, c = (norm(part) for norm, part in zip(self.norms, (dt, b, c), strict=True))
        dt, v = self.times(dt), x.unflatten(-1, (-1, inner))
        y = delta_rule(c, b, v, dt, dt, self.gates, state, step.states, scale=1.0, normed=False)  # [T, 1, I]
        return self.result(gated(y.flatten(1), z, "silu"))

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        gates = {"decay": self.gates.decay, "bias": self.gates.bias, "skip": self.gates.skip}
        own = {"taps": self.taps, "taps_bias": self.taps_bias, **gates}
        return {name: TensorParameter(value) for name, value in own.items() if value is not None}


# ---- weight names ----------------------------------------------------------------------------------------------------


class _Decays:
    """View of decays [I, N], or of their logarithms, in the layout of a state, [1, tiles, N, columns]."""

    def __init__(self, *, logs: bool) -> None:
        self._logs = logs

    def __call__(self, stored: StoredTensor, config: SelectiveConfig) -> StoredTensor:
        shape = rule_shape(1, config.mamba.state, config.mamba.inner)
        if stored.shape != (config.mamba.inner, config.mamba.state):
            return stored  # the loader reports the wrong shape

        def in_tiles(values: np.ndarray) -> np.ndarray:
            filled = np.pad(values, ((0, -len(values) % COLUMNS), (0, 0)))
            return filled.reshape(*shape[:2], COLUMNS, -1).swapaxes(2, 3)

        return computed(decay_of_log(stored, config) if self._logs else stored, shape, in_tiles, "F32")

    def undone(self, stored: StoredTensor, config: SelectiveConfig) -> StoredTensor:
        """The decays [I, N], as in GGUF files."""
        shape = config.mamba.inner, config.mamba.state
        return computed(stored, shape, lambda values: values.swapaxes(2, 3).reshape(-1, shape[1])[: shape[0]], "F32")


def selective_names(target: str, *hf: str) -> list[WeightName]:
    """The table rows of a mixer; `target` and `hf` as in `mamba2.mixer_names`."""
    to = f"layers.{{i}}.{target}"

    def line(part: str, stored: str, gguf: str, *views: Any) -> WeightName:
        return WeightName(to + part, tuple(f"{name}.{stored}" for name in hf), GG + gguf, *views)

    return [
        *pair(f"{to}.inputs:", tuple(f"{name}.in_proj" for name in hf), GG + "ssm_in"),
        *pair(f"{to}.result:", tuple(f"{name}.out_proj" for name in hf), GG + "ssm_out"),
        line(".selection:weight", "x_proj.weight", "ssm_x.weight"),
        line(".times:weight", "dt_proj.weight", "ssm_dt.weight"),
        line(":bias", "dt_proj.bias", "ssm_dt.bias"),
        line(":taps", "conv1d.weight", "ssm_conv1d.weight", flattened),
        line(":taps_bias", "conv1d.bias", "ssm_conv1d.bias"),
        line(":decay", "A_log", "ssm_a", _Decays(logs=True), _Decays(logs=False)),
        line(":skip", "D", "ssm_d"),
        *[
            line(f".norms.{number}:weight", f"{part}_layernorm.weight", f"ssm_{part}_norm.weight")
            for number, part in enumerate(("dt", "b", "c"))
        ],
    ]
