# SPDX-License-Identifier: MIT
"""Ling 3.0 (Bailing MoE V3): Kimi delta attention in most layers, gated latent attention in the others, with experts.

Layers are those of Kimi Linear (`kimi_linear.py`), but one matrix computes the decays of all channels, one their gates;
decays have a lower bound. Latent attention rotates as in DeepSeek-V3 (`deepseek.py`), and the result of each head is
multiplied by a sigmoid. Source: inclusionAI, 2026, `BailingHybridForCausalLM` of transformers.
Shapes: T tokens, E hidden, H heads of D channels.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.kernels.delta_rule import delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import deepseek, kimi_linear
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.bailing_hybrid_config import (
    BailingHybridConfig,
    Decays,
    config_from_gguf,
    config_from_hf,
    gguf_keys,
)
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.kimi_linear_config import ChannelDecays, Taps

# ---- attention -------------------------------------------------------------------------------------------------------


class DeltaAttention(kimi_linear.KimiDeltaAttention):
    """Kimi delta attention with one matrix for decays and one for gates: x [T, E] -> [T, E]."""

    def __init__(self, layer: int, config: BailingHybridConfig, placement: Placement) -> None:
        self.layer, self.sizes = layer, config.delta
        heads, dim, size = self.sizes.heads, self.sizes.key_dim, config.hidden_size
        channels = heads * dim
        self.widths = (3 * channels, channels, channels, heads)
        self.inputs = Linear(size, {**dict.fromkeys("qkvfg", channels), "b": heads}, placement)
        self.norm, self.result = RMSNorm(dim, config.norm_eps, placement), Linear(channels, size, placement)
        self.taps = placement.empty(3 * channels, self.sizes.taps)
        self.gates = DeltaGates(placement.empty(channels), placement.empty(channels), least=config.decay_bound)

    def __call__(self, x: Value, step: StepInput) -> Value:
        tail, state = step.caches[self.layer]
        qkv, f, g, b = self.inputs(x).split(self.widths, dim=-1)
        parts = short_conv(qkv, self.taps, None, tail, step.states, silu=True).split(self.sizes.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.sizes.key_dim)) for part in parts)
        y = delta_rule(q, k, v, f, b, self.gates, state, step.states, scale=self.sizes.key_dim**-0.5)  # [T, H, D]
        return self.result(gated(self.norm(y).flatten(1), g, "sigmoid"))


class Attention(deepseek.Attention):
    """Latent attention with a gate on the result of each head: x [T, E] -> [T, E]."""

    def __init__(self, config: BailingHybridConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.gate = Linear(config.hidden_size, config.num_heads, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, kv = self.down(x).split(self.sizes, dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        return self.output(gated(self.attend(q, kv, step), self.gate(x), "sigmoid"))


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(deepseek.Block):
    """One decoder layer: DeepSeek's, with latent attention or with Kimi delta attention."""

    def __init__(self, config: BailingHybridConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size = config.hidden_size
        self.attention_norm, self.mlp_norm = (RMSNorm(size, config.norm_eps, placement) for _ in range(2))
        if layer in config.delta_layers:
            self.attention = DeltaAttention(layer, config, placement)
        else:
            self.attention = Attention(config, layer, rotary, placement)
        if config.mixture is None or layer < config.dense_layers:
            self.mlp = GatedMLP(size, config.intermediate_size, placement)
        else:
            self.mlp = SparseMLP(size, config.mixture, placement)


class BailingHybrid(deepseek.Deepseek):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, vocabulary]."""

    block = Block


# ---- weight names ----------------------------------------------------------------------------------------------------

_PUBLISHED = {  # of transformers' names
    "model.embed_tokens.": "model.word_embeddings.",
    ".self_attn.o_proj.": ".attention.dense.",
    ".self_attn.": ".attention.",
    ".mlp.gate.e_score_correction_bias": ".mlp.gate.expert_bias",
}


def _line(line: WeightName) -> WeightName:
    """A row of a table with the names in published files, where they differ."""
    names = list(line.hf_names)
    for usual, published in _PUBLISHED.items():
        names += [name.replace(usual, published) for name in names if usual in name]
    return dataclasses.replace(line, hf=tuple(names))


_TO, _SELF, _GATE = "layers.{i}.attention", HF + "self_attn.", HF + "self_attn.forget_gate."
_LOGS = ChannelDecays(logs=True)
_DELTA = {  # target, name in files and in transformers' forget gate, and in GGUF
    ".inputs:f.weight": ("f_proj.weight", "ssm_f_a.weight"), ":bias": ("dt_bias", "ssm_dt.bias"),
    ".inputs:g.weight": ("g_proj.weight", "ssm_g_a.weight"), ".inputs:b.weight": ("b_proj.weight", "ssm_beta.weight"),
    ".norm:weight": ("o_norm.weight", "ssm_norm.weight"), ".result:weight": ("o_proj.weight", "attn_output.weight"),
    **{f".inputs:{part}.weight": (f"{part}_proj.weight", f"attn_{part}.weight") for part in "qkv"},
}  # fmt: skip
WEIGHTS = [
    *(_line(line) for line in deepseek.WEIGHTS if ".attention.index." not in line.target),
    _line(WeightName(_TO + ".gate:weight", _SELF + "g_proj.weight", GG + "attn_gate.weight")),
    *(_line(WeightName(_TO + to, (_SELF + hf, _GATE + hf), GG + gguf)) for to, (hf, gguf) in _DELTA.items()),
    *(
        _line(WeightName(f"{_TO}:{p}.taps", f"{_SELF}{p}_conv1d.weight", f"{GG}ssm_conv1d_{p}.weight", Taps(), Taps()))
        for p in "qkv"
    ),
    _line(WeightName(_TO + ":decay", (_SELF + "A_log", _GATE + "A_log"), GG + "ssm_a", _LOGS, Decays())),
]

FAMILY = Family(
    hf=dict.fromkeys(("BailingHybridForCausalLM", "BailingMoeV3ForCausalLM"), "bailing_hybrid"),
    gguf=("bailingmoe3",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=lambda config, placement, _: BailingHybrid(config, placement),
    weights=WEIGHTS,
    ignored=lambda config: [*deepseek.ignored(config), r"model\.mtp.*"],
    as_gguf={"bailing_hybrid": dataclasses.replace(deepseek.GGUF, name="bailingmoe3", more=gguf_keys)},
)
