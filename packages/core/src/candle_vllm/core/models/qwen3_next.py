# SPDX-License-Identifier: MIT
"""Qwen3-Next and Qwen3.5 (3.6, 3.8), dense or with experts: gated delta nets in most layers, else gated attention.

A gated delta net is linear attention with a state of fixed size for each sequence. Attention has a sigmoid gate on
each element of its output, computed by the matrix of queries, and a norm on every head of q and k. safetensors store
norm weights as the difference from 1, except in delta nets. Blocks are x + mix(norm(x)), then x + mlp(norm(x)).
Source: Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464; Qiu et al., 2025, arXiv:2505.06708 (the gate).
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, Hk and Hv key and value heads of a delta net.
"""

from __future__ import annotations

from collections.abc import Mapping

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.delta_net import GatedDeltaNet
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import chain, flattened, plus_one
from candle_vllm.core.loading.weights import Parameter, Seen, WeightName
from candle_vllm.core.models import llama, qwen_moe
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.glm4_moe import later_layers
from candle_vllm.core.models.qwen3_next_config import (
    TILED_COLUMNS,
    Qwen3NextConfig,
    attention_rows,
    config_from_gguf,
    config_from_hf,
    decay_of_log,
    gguf_keys,
    joint_gates,
    joint_rows,
    qwen35_keys,
    tiled_rows,
)
from candle_vllm.core.models.stack import DecoderStack


class Attention:
    """Grouped-query attention with rotary positions and a gate on its output: x [T, E] -> [T, E]."""

    def __init__(self, config: Qwen3NextConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"q": heads, "gate": heads, "k": kv_heads, "v": kv_heads}
        self.shards = {name: count * self.head_dim for name, count in sizes.items()}
        self.qkv = Linear(config.hidden_size, self.shards, placement, bias=config.attention_bias)
        self.output = Linear(heads * self.head_dim, config.hidden_size, placement, bias=config.attention_bias)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps, placement) for _ in range(2))
        self.attend = PagedAttention(layer, self.head_dim, rotary, self.q_norm, self.k_norm)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, gate, k, v = self.qkv(x).split(tuple(self.shards.values()), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [T, H, D] and twice [T, K, D]
        return self.output(gated(self.attend(q, k, v, step).flatten(1), gate, "sigmoid"))

    def parameters(self) -> Mapping[str, Parameter]:
        """Return no parameters: the parts have them all."""
        return {}


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: Qwen3NextConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, delta = config.hidden_size, layer in config.delta_layers
        self.attention_norm, self.mlp_norm = (RMSNorm(size, config.norm_eps, placement) for _ in range(2))
        self.attention: GatedDeltaNet | Attention = (
            GatedDeltaNet(layer, size, config.delta, config.norm_eps, placement)
            if delta
            else Attention(config, layer, rotary, placement)
        )
        if config.mixture is not None and layer in config.sparse_layers:
            self.mlp = SparseMLP(size, config.mixture, placement)
        else:
            self.mlp = GatedMLP(size, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


class Qwen3Next(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: Qwen3NextConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, vocabulary = config, (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*vocabulary, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*vocabulary, placement)
        self.narrows = isinstance(layers[-1].mlp, GatedMLP) and isinstance(layers[-1].attention, Attention)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO, _MIX, _NET = "layers.{i}.", "layers.{i}.attention", HF + "linear_attn."
_SELF, _KINDS = HF + "self_attn.", ("weight", "bias")
_NORMS = {
    "norm": ("model.norm", "output_norm"),
    _TO + "attention_norm": (HF + "input_layernorm", GG + "attn_norm"),
    _TO + "mlp_norm": (HF + "post_attention_layernorm", GG + "post_attention_norm"),
    _MIX + ".q_norm": (_SELF + "q_norm", GG + "attn_q_norm"),
    _MIX + ".k_norm": (_SELF + "k_norm", GG + "attn_k_norm"),
}
_IN_GGUF = {"qkv": "attn_qkv", "z": "attn_gate", "b": "ssm_beta", "a": "ssm_alpha"}


def _of_attention(part: str, kind: str) -> WeightName:
    own = "q" if part == "gate" else part
    view = chain() if part in "kv" else attention_rows(part)
    fused = Seen(f"{GG}attn_qkv.{kind}", attention_rows(part, fused=True))
    gguf = (Seen(f"{GG}attn_{own}.{kind}", view), fused)
    return WeightName(f"{_MIX}.qkv:{part}.{kind}", Seen(f"{_SELF}{own}_proj.{kind}", view), gguf)


def _of_net(part: str) -> WeightName:
    name, view = ("qkvz", joint_rows(part)) if part in ("qkv", "z") else ("ba", joint_gates(part))
    hf = (f"{_NET}in_proj_{part}.weight", Seen(f"{_NET}in_proj_{name}.weight", view))
    gguf = Seen(f"{GG}{_IN_GGUF[part]}.weight", tiled_rows(part))
    old = Seen(f"{GG}{'ssm_in' if name == 'qkvz' else 'ssm_ba'}.weight", view)
    return WeightName(f"{_MIX}.inputs:{part}.weight", hf, (gguf, old))


WEIGHTS = [
    *(line for line in qwen_moe.WEIGHTS if line.target.startswith(("embed:", "head:", _TO + "mlp."))),
    *(WeightName(f"{to}:weight", f"{hf}.weight", f"{gguf}.weight", plus_one) for to, (hf, gguf) in _NORMS.items()),
    *(_of_attention(part, kind) for part in ("q", "gate", "k", "v") for kind in _KINDS),
    *(WeightName(f"{_MIX}.output:{kind}", f"{_SELF}o_proj.{kind}", f"{GG}attn_output.{kind}") for kind in _KINDS),
    *(_of_net(part) for part in ("qkv", "z", "b", "a")),
    WeightName(_MIX + ":taps", _NET + "conv1d.weight", GG + "ssm_conv1d.weight", flattened, tiled_rows("qkv")),
    WeightName(_MIX + ":decay", _NET + "A_log", GG + "ssm_a", decay_of_log, tiled_rows("a")),
    WeightName(_MIX + ":bias", _NET + "dt_bias", GG + "ssm_dt.bias", None, tiled_rows("a")),
    WeightName(_MIX + ".result:weight", _NET + "out_proj.weight", GG + "ssm_out.weight", None, TILED_COLUMNS),
    WeightName(_MIX + ".norm:weight", _NET + "norm.weight", GG + "ssm_norm.weight"),
]


def ignored(config: Qwen3NextConfig) -> list[str]:
    """Names that Llama ignores, and multi-token prediction layers; in GGUF files these follow the last layer."""
    return [*llama.ignored(config), r"model\.mtp\..*", *later_layers(config.num_layers)]


FAMILY = Family(
    hf={
        "Qwen3NextForCausalLM": "qwen3_next",
        "Qwen3_5ForCausalLM": "qwen3_5",
        "Qwen3_5MoeForCausalLM": "qwen3_5_moe",
    },
    gguf=("qwen3next", "qwen35", "qwen35moe"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Qwen3Next,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        "qwen3_next": Architecture(
            name="qwen3next", more=gguf_keys, names=lambda _: ("ssm_ba",), every=True, norm=True
        ),
        "qwen3_5": Architecture(name="qwen35", more=qwen35_keys),
        "qwen3_5_moe": Architecture(name="qwen35moe", more=qwen35_keys, every=True, norm=True),
    },
)
