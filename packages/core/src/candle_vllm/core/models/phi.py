# SPDX-License-Identifier: MIT
"""Phi-2's layers (Phi-1, Phi-1.5, Phi-2): LayerNorm, biases everywhere, and attention and MLP that share a norm.

Each block is x + attention(norm(x)) + mlp(norm(x)); a part of each head rotates.
Source: Gunasekar et al., 2023, arXiv:2306.11644.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, pair, projections
from candle_vllm.core.models.family import DIVISORS, LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> ModelConfig:
    """Read `config.json` of phi, where by default half of each head rotates."""
    fields.choice("hidden_act", "gelu_new", "gelu_new", "gelu_pytorch_tanh")  # both are the tanh form
    if fields.get("qk_layernorm", bool, False):
        raise UnsupportedModelError(
            f"{fields.path}: qk_layernorm is true, which is not implemented; no published Phi has norms of q and k"
        )
    fields = fields.with_absent(partial_rotary_factor=0.5)
    return ModelConfig(**shared_from_hf(fields, model_type, eps="layer_norm_eps"))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> ModelConfig:
    """Read GGUF metadata of phi2."""
    return ModelConfig(**shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon"))


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E]."""

    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.head_dim = dim
        self.qkv = Linear(config.hidden_size, dict(zip("qkv", self.sizes, strict=True)), placement, bias=True)
        self.output = Linear(heads * dim, config.hidden_size, placement, bias=True)
        self.attend = PagedAttention(layer, dim, rotary, window=config.sliding_windows[layer])

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in its norm; residual is None in layer 0."""

    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, placement, activation="gelu_tanh")

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.norm.add(x, residual)
        attended = self.attention(normed, step)
        return self.mlp(normed), residual + attended


# ---- model -----------------------------------------------------------------------------------------------------------


class Phi(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: ModelConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        size, tied = (config.vocab_size, config.hidden_size), config.tie_embeddings
        self.embed = Embedding(*size, placement, bias=tied and config.has_head)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if tied else Embedding(*size, placement, bias=True)
        self.scorer = self.embed if self.head is None else self.head


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    *pair("layers.{i}.norm:", HF + "input_layernorm", GG + "attn_norm"),
    *projections(),
    *pair("layers.{i}.attention.output:", HF + "self_attn.dense", GG + "attn_output"),
    *pair("layers.{i}.mlp.up:", HF + "mlp.fc1", GG + "ffn_up"),
    *pair("layers.{i}.mlp.down:", HF + "mlp.fc2", GG + "ffn_down"),
    *pair("norm:", "model.final_layernorm", "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
    WeightName("scorer:bias", "lm_head.bias", "output.bias"),
]


FAMILY = Family(
    hf={"PhiForCausalLM": "phi"},
    gguf=("phi2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Phi,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"phi": Architecture(name="phi2", eps=LAYER_NORM_EPS, head=True, square=True, unread=(DIVISORS,))},
)
