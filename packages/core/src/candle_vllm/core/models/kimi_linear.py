# SPDX-License-Identifier: MIT
"""Kimi Linear: DeepSeek's block (`deepseek.py`) with Kimi delta attention in most layers, and without positions.

Kimi delta attention is the gated delta rule with a decay for each channel, which two small matrices compute from x.
Source: Kimi Team, 2025, arXiv:2510.26692. Shapes: T tokens, E hidden, H heads of D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import deepseek
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.kimi_linear_config import (
    ChannelDecays,
    KimiLinearConfig,
    Taps,
    config_from_gguf,
    config_from_hf,
    gguf_keys,
)

# ---- attention -------------------------------------------------------------------------------------------------------


class KimiDeltaAttention:
    """Linear attention with a state: x [T, E] -> [T, E]."""

    def __init__(self, layer: int, config: KimiLinearConfig, placement: Placement) -> None:
        self.layer, self.sizes = layer, config.delta
        heads, dim, size = self.sizes.heads, self.sizes.key_dim, config.hidden_size
        channels = heads * dim
        self.widths = (3 * channels, dim, dim, heads)
        shards = {**dict.fromkeys("qkv", channels), "f": dim, "g": dim, "b": heads}
        self.inputs = Linear(size, shards, placement)
        self.decays, self.gate = Linear(dim, channels, placement), Linear(dim, channels, placement)
        self.norm, self.result = RMSNorm(dim, config.norm_eps, placement), Linear(channels, size, placement)
        self.taps = placement.empty(3 * channels, self.sizes.taps)
        self.gates = DeltaGates(placement.empty(channels), placement.empty(channels))

    def __call__(self, x: Value, step: StepInput) -> Value:
        tail, state = step.caches[self.layer]
        qkv, f, g, b = self.inputs(x).split(self.widths, dim=-1)
        parts = short_conv(qkv, self.taps, None, tail, step.states, silu=True).split(self.sizes.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.sizes.key_dim)) for part in parts)
        scale = self.sizes.key_dim**-0.5
        y = delta_rule(q, k, v, self.decays(f), b, self.gates, state, step.states, scale=scale)  # [T, H, D]
        return self.result(gated(self.norm(y).flatten(1), self.gate(g), "sigmoid"))

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        size = self.sizes.parts[0]
        taps = {f"{part}.taps": self.taps[n * size : (n + 1) * size] for n, part in enumerate("qkv")}
        plain = {"decay": self.gates.decay, "bias": self.gates.bias, **taps}
        return {name: TensorParameter(value) for name, value in plain.items()}


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(deepseek.Block):
    """One decoder layer: DeepSeek's, with latent attention or with Kimi delta attention."""

    def __init__(self, config: KimiLinearConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        if layer in config.delta_layers:
            self.attention = KimiDeltaAttention(layer, config, placement)


class KimiLinear(deepseek.Deepseek):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, vocabulary]."""

    block = Block


# ---- weight names ----------------------------------------------------------------------------------------------------


_TO, _SELF = "layers.{i}.attention", HF + "self_attn."
_MATRICES = {"inputs:f.": "f_a", "decays:": "f_b", "inputs:b.": "beta", "inputs:g.": "g_a", "gate:": "g_b"}


def _names(part: str) -> tuple[str, str]:
    """A tensor's name in published files, and its name in transformers' forget gate."""
    return _SELF + part, f"{_SELF}forget_gate.{part}"


def _line(line: WeightName) -> WeightName:
    """A row of DeepSeek's table; rows of MLPs also get the names in published files of Kimi Linear."""
    if line.hf is None or not line.target.startswith("layers.{i}.mlp."):
        return line
    names = line.hf if isinstance(line.hf, tuple) else (line.hf,)
    own = [name.replace("mlp.", "block_sparse_moe.") for name in names if isinstance(name, str)]
    for usual, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        own = [name.replace(f".{{e}}.{usual}_proj", f".{{e}}.{short}") for name in own]
    return dataclasses.replace(line, hf=(*own, *names))


WEIGHTS = [
    *map(_line, deepseek.WEIGHTS),
    *[
        WeightName(f"{_TO}.inputs:{part}.weight", f"{_SELF}{part}_proj.weight", f"{GG}attn_{part}.weight")
        for part in "qkv"
    ],
    *[
        WeightName(f"{_TO}.{to}weight", _names(f"{name.replace('beta', 'b')}_proj.weight"), f"{GG}ssm_{name}.weight")
        for to, name in _MATRICES.items()
    ],
    *[
        WeightName(
            f"{_TO}:{part}.taps", f"{_SELF}{part}_conv1d.weight", f"{GG}ssm_conv1d_{part}.weight", Taps(), Taps()
        )
        for part in "qkv"
    ],
    WeightName(_TO + ":decay", _names("A_log"), GG + "ssm_a", ChannelDecays(logs=True), ChannelDecays(logs=False)),
    WeightName(_TO + ":bias", _names("dt_bias"), GG + "ssm_dt.bias"),
    WeightName(_TO + ".norm:weight", _SELF + "o_norm.weight", GG + "ssm_norm.weight"),
    WeightName(_TO + ".result:weight", _SELF + "o_proj.weight", GG + "attn_output.weight"),
]


GGUF = dataclasses.replace(deepseek.GGUF, name="kimi-linear", more=gguf_keys, interleaved=False, head=True, norm=True)

FAMILY = Family(
    hf={"KimiLinearForCausalLM": "kimi_linear"},
    gguf=("kimi-linear",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=lambda config, placement, _: KimiLinear(config, placement),
    weights=WEIGHTS,
    ignored=deepseek.ignored,
    as_gguf={"kimi_linear": GGUF},
)
