# SPDX-License-Identifier: MIT
"""LFM2 and LFM2.5, dense and with experts: a Llama with a gated short convolution instead of attention in most layers.

Each block is x + mix(norm(x)), then x + mlp(norm(x)). The state of a convolution layer is only the convolution's last
inputs. Source: Liquid AI, 2025, arXiv:2511.23404.
Shapes: T tokens, E hidden, C channels of a convolution, which is E, or a rank's share of it.
"""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.short_conv import short_conv
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import flattened, row_part
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.attention_names import GG, HF, projections
from candle_vllm.core.models.experts import expert_names
from candle_vllm.core.models.family import DIVISORS, Architecture, Family
from candle_vllm.core.models.lfm2_config import Lfm2Config, config_from_gguf, config_from_hf, gguf_keys
from candle_vllm.core.models.llama import Attention
from candle_vllm.core.models.stack import DecoderStack

# ---- convolution -----------------------------------------------------------------------------------------------------


class ShortConvolution:
    """Short convolution with two gates: x [T, E] -> [T, E]; for projected b, c and x, output(c * conv(b * x))."""

    def __init__(self, config: Lfm2Config, layer: int, placement: Placement) -> None:
        self.layer, self.channels, bias = layer, config.channels, config.conv_bias
        self.inputs = Linear(config.hidden_size, dict.fromkeys("bcx", self.channels), placement, bias=bias)
        self.output = Linear(self.channels, config.hidden_size, placement, bias=bias)
        self.taps = placement.empty(self.channels, config.taps)
        self.bias = placement.empty(self.channels) if bias else None

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter that must be loaded."""
        found: dict[str, Parameter] = {"taps": TensorParameter(self.taps)}
        return found if self.bias is None else {**found, "bias": TensorParameter(self.bias)}

    def __call__(self, x: Value, step: StepInput) -> Value:
        (tail,) = step.caches[self.layer]
        b, c, x = self.inputs(x).split((self.channels,) * 3, dim=-1)  # [T, C] each
        return self.output(short_conv(x, self.taps, self.bias, tail, step.states, gates=(b, c)))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: Lfm2Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        convolves = layer in config.conv_layers
        self.mix_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.conv = ShortConvolution(config, layer, placement) if convolves else None
        self.attention = None if convolves else Attention(config, layer, rotary, placement)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        if config.mixture is not None and layer in config.sparse_layers:
            self.mlp: GatedMLP | SparseMLP = SparseMLP(config.hidden_size, config.mixture, placement)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        mix = self.conv or self.attention
        assert mix is not None
        normed, residual = self.mix_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(mix(normed, step), residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Lfm2(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: Lfm2Config, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        tied, last = config.tie_embeddings, layers[-1]
        self.head = None if tied else Embedding(config.vocab_size, config.hidden_size, placement)
        self.narrows = last.conv is None and isinstance(last.mlp, GatedMLP)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _line(target: str, hf: str, gguf: str) -> WeightName:
    return WeightName(f"layers.{{i}}.{target}", HF + hf, GG + gguf)


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    _line("mix_norm:weight", "operator_norm.weight", "attn_norm.weight"),
    *projections(),
    _line("attention.q_norm:weight", "self_attn.q_layernorm.weight", "attn_q_norm.weight"),
    _line("attention.k_norm:weight", "self_attn.k_layernorm.weight", "attn_k_norm.weight"),
    _line("attention.output:weight", "self_attn.out_proj.weight", "attn_output.weight"),
    *[
        WeightName(
            f"layers.{{i}}.conv.inputs:{part}.{kind}",
            f"{HF}conv.in_proj.{kind}",
            f"{GG}shortconv.in_proj.{kind}",
            row_part(index, 3),
            row_part(index, 3),
        )
        for kind in ("weight", "bias")
        for index, part in enumerate("bcx")
    ],
    WeightName("layers.{i}.conv:taps", HF + "conv.conv.weight", GG + "shortconv.conv.weight", flattened),
    _line("conv:bias", "conv.conv.bias", "shortconv.conv.bias"),
    _line("conv.output:weight", "conv.out_proj.weight", "shortconv.out_proj.weight"),
    _line("conv.output:bias", "conv.out_proj.bias", "shortconv.out_proj.bias"),
    _line("mlp_norm:weight", "ffn_norm.weight", "ffn_norm.weight"),
    _line("mlp.gate_up:gate.weight", "feed_forward.w1.weight", "ffn_gate.weight"),
    _line("mlp.gate_up:up.weight", "feed_forward.w3.weight", "ffn_up.weight"),
    _line("mlp.down:weight", "feed_forward.w2.weight", "ffn_down.weight"),
    _line("mlp.router:weight", "feed_forward.gate.weight", "ffn_gate_inp.weight"),
    _line("mlp.router:correction", "feed_forward.expert_bias", "exp_probs_b.bias"),
    *expert_names("feed_forward.experts", "w1", "w3", "w2"),
    WeightName("norm:weight", "model.embedding_norm.weight", "token_embd_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]
_CONVOLVED = (DIVISORS, *(f".shortconv.{part}.bias" for part in ("in_proj", "conv", "out_proj")))

FAMILY = Family(
    hf={"Lfm2ForCausalLM": "lfm2", "Lfm2MoeForCausalLM": "lfm2_moe"},
    gguf=("lfm2", "lfm2moe"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Lfm2,
    weights=WEIGHTS,
    ignored=lambda config: [r"lm_head\.weight"] if config.tie_embeddings else [],
    as_gguf={
        "lfm2": Architecture(name="lfm2", more=gguf_keys, unread=_CONVOLVED, square=True),
        "lfm2_moe": Architecture(name="lfm2moe", more=gguf_keys, unread=_CONVOLVED, square=True),
    },
)
