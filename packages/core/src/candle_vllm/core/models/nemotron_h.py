# SPDX-License-Identifier: MIT
"""NVIDIA Nemotron-H, Nemotron Nano 2 and Nemotron 3, dense and with experts: each layer has one kind of sublayer.

A layer is Mamba 2, attention without positions, or a feed-forward layer or experts with a squared ReLU.
Source: NVIDIA, 2025, arXiv:2504.03624.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.moe import HostLayer, Router, SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, gguf_projection, pair
from candle_vllm.core.models.experts import ungrouped
from candle_vllm.core.models.family import MAMBA_BIASES, Architecture, Family
from candle_vllm.core.models.glm4_moe import later_layers
from candle_vllm.core.models.llama import Attention
from candle_vllm.core.models.mamba2 import Mamba2Mixer, mixer_names
from candle_vllm.core.models.nemotron_h_config import NemotronHConfig, config_from_gguf, config_from_hf, gguf_keys
from candle_vllm.core.models.stack import DecoderStack

# ---- model -----------------------------------------------------------------------------------------------------------


class LatentExperts(SparseMLP):
    """Routed experts on vectors [T, S] that are projected from and to E; router and shared expert read x [T, E]."""

    def __init__(self, hidden_size: int, size: int, config: NemotronHConfig, placement: Placement) -> None:
        assert config.mixture is not None
        super().__init__(size, dataclasses.replace(config.mixture, shared_size=0), placement)
        self.router = Router(hidden_size, config.mixture, placement)
        self.narrow, self.widen = Linear(hidden_size, size, placement), Linear(size, hidden_size, placement)
        if config.mixture.shared_size:
            self.shared = MLP(hidden_size, config.mixture.shared_size, placement, bias=False, activation="relu2")

    def _routed(self, x: Value, logits: Value) -> tuple[Value, Any]:
        x, pairs = super()._routed(x, logits)
        return self.narrow(x), pairs

    def _combined(self, x: Value, pairs: Any, shared: Value | None = None, gate: Value | None = None) -> Value:
        assert gate is None
        y = self.widen(super()._combined(x, pairs))
        return y if shared is None else y + shared

    def _with_host(self, elsewhere: HostLayer, x: Value, logits: Value) -> Value:
        y, shared = elsewhere(self.narrow(x), logits, None if self.shared is None else partial(self.shared, x))
        return self.widen(y) if self.shared is None else self.widen(y) + shared


class Block:
    """One layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: NemotronHConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps, kind = config.hidden_size, config.norm_eps, config.kinds[layer]
        self.norm = RMSNorm(size, eps, placement)
        self.mlp = self.attention = None
        if kind == "moe":
            assert config.mixture is not None
            self.mlp = SparseMLP(size, config.mixture, placement)
            if config.latent_size:
                self.mlp = LatentExperts(size, config.latent_size, config, placement)
        elif kind == "mlp":
            inner = config.intermediate_size
            self.mlp = MLP(size, inner, placement, bias=config.mlp_bias, activation="relu2")
        elif kind == "mamba":
            self.attention = Mamba2Mixer(layer, size, config.mamba, eps, placement)
        else:
            self.attention = Attention(config, layer, rotary, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.norm.add(x, residual)
        if self.mlp is not None:
            return self.mlp(normed), residual
        assert self.attention is not None
        return self.attention(normed, step), residual


class NemotronH(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]. `block` is the class of its layers."""

    block: ClassVar[Callable[..., Any]] = Block

    def __init__(self, config: NemotronHConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, size = config, (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [self.block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement)

    def prepare(self, positions: int) -> None:
        """Do nothing: without rotation there are no tables."""


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO = "layers.{i}."
_EMBEDDINGS = ("backbone.embeddings", "model.embeddings", "backbone.embedding")
_HF = tuple(f"{stem}.layers.{{i}}." for stem in ("backbone", "model"))


def _mixer(part: str) -> tuple[str, ...]:
    return tuple(f"{stem}mixer.{part}" for stem in _HF)


WEIGHTS = [
    WeightName("embed:weight", tuple(f"{stem}.weight" for stem in _EMBEDDINGS), "token_embd.weight"),
    WeightName(_TO + "norm:weight", tuple(stem + "norm.weight" for stem in _HF), GG + "attn_norm.weight"),
    *[
        WeightName(f"{_TO}attention.qkv:{part}.weight", _mixer(f"{part}_proj.weight"), gguf_projection(part, "weight"))
        for part in "qkv"
    ],
    *pair(_TO + "attention.output:", _mixer("o_proj"), GG + "attn_output"),
    *mixer_names("attention", *(f"{stem}.layers.{{i}}.mixer" for stem in ("backbone", "model"))),
    *pair(_TO + "mlp.up:", _mixer("up_proj"), GG + "ffn_up"),
    *pair(_TO + "mlp.down:", _mixer("down_proj"), GG + "ffn_down"),
    WeightName(_TO + "mlp.router:weight", _mixer("gate.weight"), GG + "ffn_gate_inp.weight"),
    WeightName(_TO + "mlp.router:correction", _mixer("gate.e_score_correction_bias"), GG + "exp_probs_b.bias"),
    *[
        WeightName(
            f"{_TO}mlp.experts:{part}.{{e}}.weight",
            (*_mixer(f"experts.{{e}}.{part}_proj.weight"), *_mixer(f"experts.{part}_proj")),
            f"{GG}ffn_{part}_exps.weight",
        )
        for part in ("up", "down")
    ],
    *[
        WeightName(
            f"{_TO}mlp.shared.{part}:weight",
            _mixer(f"shared_experts.{part}_proj.weight"),
            f"{GG}ffn_{part}_shexp.weight",
        )
        for part in ("up", "down")
    ],
    WeightName(_TO + "mlp.narrow:weight", _mixer("fc1_latent_proj.weight"), GG + "ffn_latent_down.weight"),
    WeightName(_TO + "mlp.widen:weight", _mixer("fc2_latent_proj.weight"), GG + "ffn_latent_up.weight"),
    WeightName("norm:weight", ("backbone.norm_f.weight", "model.norm_f.weight"), "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: NemotronHConfig) -> list[str]:
    """Names that Llama ignores, and GGUF's multi-token prediction layer, which follows the last layer."""
    return [*llama.ignored(config), *later_layers(config.num_layers)]


FAMILY = Family(
    hf={"NemotronHForCausalLM": "nemotron_h"},
    gguf=("nemotron_h", "nemotron_h_moe"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=NemotronH,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        name: Architecture(name=name, more=gguf_keys, otherwise=ungrouped, unread=MAMBA_BIASES)
        for name in ("nemotron_h", "nemotron_h_moe")
    },
)
