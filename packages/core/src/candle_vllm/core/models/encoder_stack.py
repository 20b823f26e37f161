# SPDX-License-Identifier: MIT
"""Parts that encoders share: tables of tokens, positions and types, a stack of blocks, norms, a head.

A block is norm(x + attention(x)), then norm(x + mlp(x)), as in BERT; or, with `prenorm`, x + attention(norm(x)), then
x + mlp(norm(x)), with one more norm after the last block. If torch runs them op by op, matrices are multiplied in the
placement's type; sums and norms stay fp32. Sources: Devlin et al., 2018, arXiv:1810.04805; Xiong et al., 2020,
arXiv:2002.04745 (norms in front). Shapes: T tokens, R texts, H heads of size D, K key-value heads, E hidden, L labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP, GatedMLP
from candle_vllm.core.layers.moe import Mixture, SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.models.encoder_parts import ACTIVATIONS

Attend = Callable[[Value], Value]
"""Attention of a layer: queries, keys and values side by side, [T, (H + 2 K) * D], to [T, H * D]."""


class DistanceBias(Protocol):
    """A bias of the attention scores by the distance of query and key: `table` is `bias` of `whole_attention`."""

    table: Value


class EncoderStack:
    """Token ids [T] of R concatenated texts -> hidden states [T, E], and scores [R, L] of a head.

    A family's model creates the parts; parts that it does not have are None.

    Attributes:
        config: the model's config.
        embed, positions, types: tables of tokens, positions and token types.
        embed_norm, norm: norms after the sum of the tables' rows, and after the last layer.
        rotary, local_rotary: rotary embeddings of layers without and with a window.
        near: a bias by distance.
        kv_heads: K; None for H.
        windows: for each layer, the maximum distance of two tokens that attend to each other; None for all.
        layers: each maps x [T, E] to [T, E] in fp32; the last argument is the token types.
        head, score, head_activation: the two matrices of a head, and the activation between them.
    """

    config: EncoderConfig
    embed: Embedding
    positions: Embedding | None = None
    types: Embedding | None = None
    embed_norm: LayerNorm | None = None
    norm: LayerNorm | RMSNorm | None = None
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    near: DistanceBias | None = None
    kv_heads: int | None = None
    windows: Sequence[int | None]
    layers: Sequence[Callable[[Value, Attend, Value], Value]]
    head: Linear | None = None
    score: Linear | None = None
    head_activation: Activation = "tanh"

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Hidden states [T, E] in fp32.

        Args:
            token_ids, positions, types: [T] int64; a text's positions begin at the config's first position.
            lengths: as for `whole_attention`.
        """
        x = self.embed(token_ids)
        for table, numbers in ((self.positions, positions), (self.types, types)):
            x = x if table is None else x + table(numbers)
        x = x if self.embed_norm is None else self.embed_norm(x)
        for layer, attend in zip(self.layers, self.attends(positions, lengths), strict=True):
            x = layer(x, attend, types)
        return x if self.norm is None else self.norm(x)

    def attends(self, positions: Value, lengths: Sequence[int]) -> Iterator[Attend]:
        """The attention of each layer; arguments as in `forward`."""
        heads, kv_heads, bias = self.config.num_heads, self.kv_heads, None if self.near is None else self.near.table
        far, local = (
            None if rotary is None else Turned(positions, *rotary.tables) for rotary in (self.rotary, self.local_rotary)
        )
        for window in self.windows:
            turned = far if window is None else local
            more: dict[str, Any] = {"kv_heads": kv_heads, "bias": bias, "window": window}
            yield lambda qkv, turned=turned, more=more: whole_attention(qkv, heads, lengths, turned, **more)

    def scores(self, first: Value) -> Value:
        """Scores [R, L] of the hidden states [R, E] of the texts' first tokens, if the model computes the head."""
        assert self.head is not None
        assert self.score is not None
        return self.score(activation(self.head(first), self.head_activation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(EncoderConfig):
    """Config of an encoder of plain blocks.

    Attributes:
        typed: the model has a table of token types.
        placed: the model has a table of positions.
        prenorm: norms precede attention and MLP; the embeddings' norm serves as that of the first layer's attention.
        rope, local_rope: rotary settings of layers without and with a window; None for no rotation.
        windows: see `EncoderStack`; empty if no layer has a window.
        gate: activation of the gate in the feed-forward layer; empty without a gate.
        norm_bias, qkv_bias, output_bias, mlp_bias, down_bias: whether there are biases in norms; in queries, keys and
            values; in attention's output; in the feed-forward layer's first matrix; in its last matrix.
        head_activation, head_bias: activation between a head's matrices; a bias of the first one (`modernbert.py`).
        mixture, sparse_every: experts instead of the feed-forward layer in every `sparse_every`-th layer (2 or more),
            from the second layer on; None without experts.
        mixture_bias: the sum of the experts has a bias.
    """

    typed: bool = True
    placed: bool = True
    prenorm: bool = False
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    gate: Literal["", "silu", "gelu", "gelu_tanh"] = ""
    norm_bias: bool = True
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    down_bias: bool = True
    head_activation: Literal["gelu", "gelu_tanh", "relu", "tanh"] = "tanh"
    head_bias: bool = False
    mixture: Mixture | None = None
    sparse_every: int = 1
    mixture_bias: bool = False


class Attention:
    """Attention of each token to those that `attend` allows: x [T, E] -> [T, E]."""

    def __init__(self, config: StackConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=config.qkv_bias)
        self.output = Linear(size, size, placement, bias=config.output_bias)

    def __call__(self, x: Value, attend: Attend) -> Value:
        return self.output(attend(self.qkv(x)))


class Block:
    """One layer: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: StackConfig, placement: Placement, layer: int) -> None:
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        sparse = config.mixture if layer % config.sparse_every == 1 else None
        norm = functools.partial(LayerNorm, size, config.norm_eps, placement, bias=config.norm_bias)
        self._prenorm = config.prenorm
        self.attention = Attention(config, placement)
        self.attention_norm = norm() if layer or not config.prenorm else None
        if sparse is not None:
            self.mlp = SparseMLP(size, sparse, placement)
        elif config.gate:
            down, gate = config.down_bias, config.gate
            self.mlp = GatedMLP(size, inner, placement, bias=bias, down_bias=down, activation=gate)
        else:
            self.mlp = MLP(size, inner, placement, bias=bias, activation=ACTIVATIONS[config.activation])
        self.mlp_norm = norm()

        # a table with one row, for the only token type, because a recorded step can add such a row
        self.mlp_bias = Embedding(1, size, placement, wide=True) if sparse and config.mixture_bias else None

    def __call__(self, x: Value, attend: Attend, types: Value) -> Value:
        if self._prenorm:
            x = x + self.attention(x if self.attention_norm is None else self.attention_norm(x), attend)
            return x + self.mlp(self.mlp_norm(x))
        assert self.attention_norm is not None
        x = self.attention_norm(x + self.attention(x, attend))
        y = x + self.mlp(x)
        return self.mlp_norm(y if self.mlp_bias is None else y + self.mlp_bias(types))


class PlainEncoder(EncoderStack):
    """The encoder for a `StackConfig`.

    Args:
        config, placement: its config, and the device and types of its weights.
        near: a bias by distance; None without one.
    """

    def __init__(self, config: StackConfig, placement: Placement, near: DistanceBias | None = None) -> None:
        size, most = config.hidden_size, config.max_position
        table = functools.partial(Embedding, size=size, placement=placement, wide=True)
        norm = functools.partial(LayerNorm, size, config.norm_eps, placement, bias=config.norm_bias)
        self.config, self.near = config, near
        self.embed = table(config.vocab_size)
        self.positions = table(config.first_position + most) if config.placed else None
        self.types = table(config.token_types) if config.typed else None
        self.rotary, self.local_rotary = (
            None if rope is None else Rotary(rope, most, placement) for rope in (config.rope, config.local_rope)
        )
        self.embed_norm, self.norm = norm(), norm() if config.prenorm else None
        self.windows = config.windows or (None,) * config.num_layers
        self.layers = [Block(config, placement, layer) for layer in range(config.num_layers)]
        if config.scores:
            self.head = Linear(size, size, placement, bias=True)
            self.score = Linear(size, len(config.labels), placement, bias=True)
            self.head_activation = config.head_activation
