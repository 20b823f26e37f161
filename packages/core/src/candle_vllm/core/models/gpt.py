# SPDX-License-Identifier: MIT
"""The layers of the LayerNorm decoders of 2019 to 2024, which differ in flags: GPT-2, GPT-NeoX, Falcon and others.

Each block is x + attention(norm(x)), then x + mlp(norm(x)), the MLP without a gate; a parallel block is
x + attention(norm(x)) + mlp(norm(x)). Positions are rotary, or rows of a table that are added to the embedding, or a
bias of the scores by distance (ALiBi). Each family's file has its config and weight names.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.family import DIVISORS, LAYER_NORM_EPS, Architecture
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------

_TANH: dict[str, Activation] = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "relu": "relu", **_TANH}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptConfig(ModelConfig):
    """Config of these families.

    Attributes:
        activation: activation of the MLP.
        positions: rows of the position table, which is the maximum context; 0 for rotary positions or ALiBi.
        parallel: attention and the MLP of a block read the same x.
        shared_norm: in a parallel block, both read the result of one norm.
        qkv_bias, output_bias, mlp_bias, head_bias: which projections have biases.
        scales: for each layer, the factor of its attention scores; empty for D^-0.5.
        embed_norm: a norm follows the embedding (`bloom.py`).
        first_heads: indices of the first head of queries and of keys; above 0 on a rank with later heads.
    """

    activation: Activation = "gelu_tanh"
    positions: int = 0
    parallel: bool = False
    shared_norm: bool = False
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    scales: tuple[float, ...] = ()
    embed_norm: bool = False
    first_heads: tuple[int, int] = (0, 0)


def activation_of(fields: Fields, key: str, default: str) -> Activation:
    """The activation that `config.json` names."""
    return _ACTIVATIONS[fields.choice(key, default, *_ACTIVATIONS)]


# ---- attention and block ---------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention, with rotary positions unless there is a position table or ALiBi: x [T, E] -> [T, E]."""

    def __init__(self, config: GptConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim, self.sizes = dim, (heads * dim, kv_heads * dim, kv_heads * dim)
        shards = dict[str, int](zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(config.hidden_size, shards, placement, bias=config.qkv_bias)
        self.output = Linear(heads * dim, config.hidden_size, placement, bias=config.output_bias)
        of_heads = np.array(config.slopes[config.first_heads[0] :][:heads], np.float32)
        self.attend = PagedAttention(
            layer,
            dim,
            None if config.positions or config.slopes else rotary,
            window=config.sliding_windows[layer],
            scale=config.scales[layer] if config.scales else None,
            slopes=placement.constant(of_heads) if config.slopes else None,
        )

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        return self.output(self.attend(q, k, v, step).flatten(1))


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: GptConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self.parallel = config.parallel
        self.attention_norm = LayerNorm(hidden, eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_norm = None if config.shared_norm else LayerNorm(hidden, eps, placement)
        self.mlp = MLP(hidden, config.intermediate_size, placement, bias=config.mlp_bias, activation=config.activation)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        attended = self.attention(normed, step)
        if self.parallel:
            normed = normed if self.mlp_norm is None else self.mlp_norm(residual)
            return self.mlp(normed), residual + attended
        assert self.mlp_norm is not None
        normed, residual = self.mlp_norm.add(attended, residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Gpt(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: GptConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        hidden, tied = config.hidden_size, config.tie_embeddings
        self.embed = Embedding(config.vocab_size, hidden, placement, bias=config.head_bias and tied and config.has_head)
        self.positions = Embedding(config.positions, hidden, placement) if config.positions else None
        self.embed_norm = LayerNorm(hidden, config.norm_eps, placement) if config.embed_norm else None
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(hidden, config.norm_eps, placement)
        self.head = None if tied else Embedding(config.vocab_size, hidden, placement, bias=config.head_bias)
        self.scorer = self.embed if self.head is None else self.head

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        if not (self.config.positions or self.config.slopes):
            super().prepare(positions)

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`."""
        x = self.embed(token_ids)
        x = x if self.embed_norm is None else side_by_side(self.embed_norm(x))  # stored for norms and sums
        return x if self.positions is None else x + self.positions(step.positions)


fused = functools.partial(
    Architecture, names=lambda _: ("attn_qkv",), eps=LAYER_NORM_EPS, square=True, unread=(DIVISORS,)
)
"""Make a row of `Family.as_gguf` for a family whose files store q, k and v as one matrix."""
