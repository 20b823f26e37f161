# SPDX-License-Identifier: MIT
"""BERT and the families that differ from it by flags: RoBERTa and XLM-RoBERTa count positions from behind the padding
token and tell no texts of a pair apart. As encoders of texts, and as cross-encoders and classifiers with a head. Other
encoders that normalise behind each sum (MPNet, nomic-bert, GTE, ...) build the same model by their own configs.

Each block is norm(x + attention(x)), then norm(x + mlp(x)). Op by op, matrices are multiplied in the placement's type;
what is added and normalised stays fp32. Source: Devlin et al., 2018, arXiv:1810.04805.
Shapes: T tokens, R texts, H heads, E hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP, GatedMLP
from candle_vllm.core.layers.moe import Mixture, SparseMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    both,
    head_of,
    sizes_from_gguf,
    sizes_from_hf,
    types_from_gguf,
)
from candle_vllm.core.models.family import EncoderFamily

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """An encoder whose blocks normalise behind each sum.

    Attributes:
        typed: there is a table of token types.
        placed: there is a table of positions.
        rope: queries and keys are rotated; None where they are not.
        gate: the feed-forward layer has a gate with this activation; empty where it has none.
        qkv_bias, output_bias, mlp_bias, down_bias: there are biases of queries, keys and values, of attention's result,
            of the feed-forward layer's first matrix, and of its last.
        head_activation: between the two matrices of a head.
        mixture, sparse_every: experts in place of the feed-forward layer of every `sparse_every`-th layer from the
            second on; None where there are none.
        mixture_bias: a bias of their sum.
    """

    typed: bool = True
    placed: bool = True
    rope: RopeConfig | None = None
    gate: Literal["", "silu", "gelu", "gelu_tanh"] = ""
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    down_bias: bool = True
    head_activation: Activation = "tanh"
    mixture: Mixture | None = None
    sparse_every: int = 1
    mixture_bias: bool = False


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> BertConfig:
    """Reads `config.json` of bert, roberta and xlm-roberta."""
    fields.choice("position_embedding_type", "absolute", "absolute")
    if fields.get("is_decoder", bool, False):
        raise UnsupportedModelError(f"{fields.path}: is_decoder is true, which is not implemented for {model_type}")
    positions = fields.count("max_position_embeddings")
    first = 0 if model_type == "bert" else fields.get("pad_token_id", int, 1) + 1
    return BertConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=positions - first,
        norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        first_position=first,
        token_types=fields.count("type_vocab_size", 2),
        activation=fields.choice("hidden_act", "gelu", *ACTIVATIONS),
        **head_of(fields, scores=scores),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> BertConfig:
    """Reads GGUF metadata of bert."""
    return BertConfig(
        model_type="bert",
        **sizes_from_gguf(fields, checkpoint),
        **types_from_gguf(checkpoint),  # DistilBERT has none
    )


# ---- attention -------------------------------------------------------------------------------------------------------

Attend = Callable[[Value], Value]
"""Mixes queries, keys and values [T, 3 * E] to [T, E]: `whole_attention` of a step."""


class Attention:
    """Every token of a text sees all of that text: x [T, E] -> [T, E]."""

    def __init__(self, config: BertConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=config.qkv_bias)
        self.output = Linear(size, size, placement, bias=config.output_bias)

    def __call__(self, x: Value, attend: Attend) -> Value:
        return self.output(attend(self.qkv(x)))


# ---- mlp, block ------------------------------------------------------------------------------------------------------


class Block:
    """One layer: [T, E] -> [T, E] in fp32."""

    def __init__(self, config: BertConfig, placement: Placement, layer: int = 0) -> None:
        size, inner = config.hidden_size, config.intermediate_size
        sparse = config.mixture if layer % config.sparse_every == 1 else None
        self.attention = Attention(config, placement)
        self.attention_norm = LayerNorm(size, config.norm_eps, placement)
        bias = config.mlp_bias
        if sparse is not None:
            self.mlp = SparseMLP(size, sparse, placement)
        elif config.gate:
            down, gate = config.down_bias, config.gate
            self.mlp = GatedMLP(size, inner, placement, bias=bias, down_bias=down, activation=gate)
        else:
            self.mlp = MLP(size, inner, placement, bias=bias, activation=ACTIVATIONS[config.activation])
        self.output_norm = LayerNorm(size, config.norm_eps, placement)

        # as a table of one row, for texts of one type, in which a sum with it is recorded
        self.mlp_bias = Embedding(1, size, placement, wide=True) if sparse and config.mixture_bias else None

    def __call__(self, x: Value, attend: Attend, types: Value) -> Value:
        x = self.attention_norm(x + self.attention(x, attend))
        y = x + self.mlp(x)
        return self.output_norm(y if self.mlp_bias is None else y + self.mlp_bias(types))


# ---- model -----------------------------------------------------------------------------------------------------------


class DistanceBias(Protocol):
    """What is added to scores by the distance of query and key: `table` is the bias of `whole_attention`."""

    table: Value


class Bert:
    """The encoder: token ids [T] of R texts behind each other -> hidden states [T, E], and scores [R, L].

    Args:
        config, placement: its description, and where its weights live.
        near: a bias by distance; None where there is none.
    """

    def __init__(self, config: BertConfig, placement: Placement, near: DistanceBias | None = None) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self.config, self.near = config, near
        self.embed = Embedding(config.vocab_size, size, placement, wide=True)
        rows = config.first_position + config.max_position
        self.positions = Embedding(rows, size, placement, wide=True) if config.placed else None
        self.types = Embedding(config.token_types, size, placement, wide=True) if config.typed else None
        self.rotary = None if config.rope is None else Rotary(config.rope, config.max_position, placement)
        self.norm = LayerNorm(size, eps, placement)
        self.layers = [Block(config, placement, layer) for layer in range(config.num_layers)]
        self.head = Linear(size, size, placement, bias=True) if config.scores else None
        self.score = Linear(size, len(config.labels), placement, bias=True) if config.scores else None

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Hidden states [T, E] in fp32.

        Args:
            token_ids, positions, types: [T] int64; a text's positions begin at the config's first one.
            lengths: as for `whole_attention`.
        """
        x = self.embed(token_ids)
        for table, numbers in ((self.positions, positions), (self.types, types)):
            x = x if table is None else x + table(numbers)
        turned = None if self.rotary is None else Turned(positions, *self.rotary.tables)
        bias = None if self.near is None else self.near.table
        x, heads = self.norm(x), self.config.num_heads
        for layer in self.layers:
            x = layer(x, lambda qkv: whole_attention(qkv, heads, lengths, turned, bias=bias), types)
        return x

    def scores(self, first: Value) -> Value:
        """Scores [R, L] of the hidden states [R, E] of the texts' first tokens, where there is a head of L labels."""
        assert self.head is not None
        assert self.score is not None
        return self.score(activation(self.head(first), self.config.head_activation))


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: BertConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of names; in a model that was `stored` with its head, the encoder's have a prefix."""
    family = "bert" if config.model_type == "bert" else "roberta"
    prefix = f"{family}." if any(name.startswith(f"{family}.") for name in stored) else ""
    at, layer, block = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{i}}.", "blk.{i}."
    head = ("bert.pooler.dense", "classifier") if family == "bert" else ("classifier.dense", "classifier.out_proj")
    return [
        WeightName("embed:weight", at + "word_embeddings.weight", "token_embd.weight"),
        WeightName("positions:weight", at + "position_embeddings.weight", "position_embd.weight"),
        WeightName("types:weight", at + "token_type_embeddings.weight", "token_types.weight"),
        *both("norm:", at + "LayerNorm", "token_embd_norm"),
        *both("layers.{i}.attention.qkv:q.", layer + "attention.self.query", block + "attn_q"),
        *both("layers.{i}.attention.qkv:k.", layer + "attention.self.key", block + "attn_k"),
        *both("layers.{i}.attention.qkv:v.", layer + "attention.self.value", block + "attn_v"),
        *both("layers.{i}.attention.output:", layer + "attention.output.dense", block + "attn_output"),
        *both("layers.{i}.attention_norm:", layer + "attention.output.LayerNorm", block + "attn_output_norm"),
        *both("layers.{i}.mlp.up:", layer + "intermediate.dense", block + "ffn_up"),
        *both("layers.{i}.mlp.down:", layer + "output.dense", block + "ffn_down"),
        *both("layers.{i}.output_norm:", layer + "output.LayerNorm", block + "layer_output_norm"),
        *both("head:", head[0]),
        *both("score:", head[1]),
    ]


def ignored(config: BertConfig) -> list[str]:
    """Stored names that a vector does not need: counted positions, the pooler, the heads of pre-training."""
    buffers = r"(bert\.|roberta\.)?embeddings\.(position_ids|token_type_ids)"
    unused = (
        [] if config.scores and config.model_type == "bert" else [r"(bert\.|roberta\.)?pooler\.dense\.(weight|bias)"]
    )
    return [buffers, *unused, r"cls\..*", r"lm_head\..*"]


FAMILY = EncoderFamily(
    hf={
        "BertModel": ("bert", False),
        "BertForMaskedLM": ("bert", False),
        "BertForSequenceClassification": ("bert", True),
        "RobertaModel": ("roberta", False),
        "RobertaForSequenceClassification": ("roberta", True),
        "XLMRobertaModel": ("xlm-roberta", False),
        "XLMRobertaForSequenceClassification": ("xlm-roberta", True),
    },
    gguf=("bert",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Bert,
    weights=weights,
    ignored=ignored,
)
