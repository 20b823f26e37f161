# SPDX-License-Identifier: MIT
"""BERT and the families that differ from it by flags: RoBERTa and XLM-RoBERTa count positions from behind the padding
token and tell no texts of a pair apart. As encoders of texts, and as cross-encoders with a head of one number.

Each block is norm(x + attention(x)), then norm(x + mlp(x)). Op by op, matrices are multiplied in the placement's type;
what is added and normalised stays fp32. Source: Devlin et al., 2018, arXiv:1810.04805.
Shapes: T tokens, R texts, H heads, E hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation, activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import MAX_LAYERS, EncoderConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.family import EncoderFamily

# ---- config ----------------------------------------------------------------------------------------------------------

MAX_LABELS = 1 << 16

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
)


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> EncoderConfig:
    """Reads `config.json` of bert, roberta and xlm-roberta."""
    fields.choice("position_embedding_type", "absolute", "absolute")
    if fields.get("is_decoder", bool, False):
        raise UnsupportedModelError(f"{fields.path}: is_decoder is true, which is not implemented for {model_type}")
    positions = fields.count("max_position_embeddings")
    first = 0 if model_type == "bert" else fields.get("pad_token_id", int, 1) + 1
    labels = _labels(fields) if scores else ()
    return EncoderConfig(
        model_type=model_type,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=fields.count("num_attention_heads"),
        max_position=positions - first,
        norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        first_position=first,
        token_types=fields.count("type_vocab_size", 2),
        activation=fields.choice("hidden_act", "gelu", *_ACTIVATIONS),
        labels=labels,
        likelihood=_likelihood(fields, len(labels)) if scores else "none",
    )


def _labels(fields: Fields) -> tuple[str, ...]:
    """Names of the head's numbers; transformers takes two where the file says nothing."""
    named = fields.get("id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"})
    count = fields.count("num_labels", len(named), most=MAX_LABELS)
    if not 0 < count <= MAX_LABELS:
        raise InvalidFileError(f"{fields.path}: id2label names {count} labels; 1 to {MAX_LABELS} are possible")
    names = [named.get(str(number), f"LABEL_{number}") for number in range(count)]
    if not all(isinstance(name, str) for name in names):
        raise InvalidFileError(f"{fields.path}: id2label must name every label by a text")
    return tuple(names)


def _likelihood(fields: Fields, labels: int) -> Literal["none", "sigmoid", "softmax"]:
    """What problem_type says of several labels, as transformers reads it; else of one what is said below."""
    if labels > 1:
        kinds: Mapping[str, Literal["none", "sigmoid", "softmax"]] = {
            "single_label_classification": "softmax",
            "multi_label_classification": "sigmoid",
            "regression": "none",
        }
        return kinds[fields.choice("problem_type", "single_label_classification", *kinds)]
    return "sigmoid" if _sigmoid(fields) else "none"


def _sigmoid(fields: Fields) -> bool:
    """sentence-transformers' rule: a class that the config names, else a sigmoid."""
    nested = fields.section("sentence_transformers")
    name = nested.get("activation_fn", str, fields.get("sbert_ce_default_activation_function", str, "Sigmoid"))
    kind = name.rpartition(".")[2]
    if kind not in ("Sigmoid", "Identity"):
        raise UnsupportedModelError(
            f"{fields.path}: the score's activation is {name!r:.80}; implemented: Sigmoid, Identity"
        )
    return kind == "Sigmoid"


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> EncoderConfig:
    """Reads GGUF metadata of bert."""
    table = checkpoint.tensors.get("token_embd.weight")
    types = checkpoint.tensors.get("token_types.weight")
    return EncoderConfig(
        model_type="bert",
        vocab_size=table.shape[0] if table and table.shape else fields.count("vocab_size"),
        hidden_size=fields.count("embedding_length"),
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=fields.count("block_count", most=MAX_LAYERS),
        num_heads=fields.count("attention.head_count"),
        max_position=fields.count("context_length"),
        norm_eps=fields.get("attention.layer_norm_epsilon", float),
        token_types=types.shape[0] if types and types.shape else 1,
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Every token of a text sees all of that text: x [T, E] -> [T, E]."""

    def __init__(self, config: EncoderConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.heads = config.num_heads
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=True)
        self.output = Linear(size, size, placement, bias=True)

    def __call__(self, x: Value, lengths: Sequence[int]) -> Value:
        return self.output(whole_attention(self.qkv(x), self.heads, lengths))


# ---- mlp, block ------------------------------------------------------------------------------------------------------


class Block:
    """One layer: [T, E] -> [T, E] in fp32."""

    def __init__(self, config: EncoderConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.attention = Attention(config, placement)
        self.attention_norm = LayerNorm(size, config.norm_eps, placement)
        self.mlp = MLP(size, config.intermediate_size, placement, activation=_ACTIVATIONS[config.activation])
        self.output_norm = LayerNorm(size, config.norm_eps, placement)

    def __call__(self, x: Value, lengths: Sequence[int]) -> Value:
        x = self.attention_norm(x + self.attention(x, lengths))
        return self.output_norm(x + self.mlp(x))


# ---- model -----------------------------------------------------------------------------------------------------------


class Bert:
    """The encoder: token ids [T] of R texts behind each other -> hidden states [T, E], and scores [R, L]."""

    def __init__(self, config: EncoderConfig, placement: Placement) -> None:
        size = config.hidden_size
        self.config = config
        self.embed = Embedding(config.vocab_size, size, placement, wide=True)
        self.positions = Embedding(config.first_position + config.max_position, size, placement, wide=True)
        self.types = Embedding(config.token_types, size, placement, wide=True)
        self.norm = LayerNorm(size, config.norm_eps, placement)
        self.layers = [Block(config, placement) for _ in range(config.num_layers)]
        self.head = Linear(size, size, placement, bias=True) if config.scores else None
        self.score = Linear(size, len(config.labels), placement, bias=True) if config.scores else None

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Hidden states [T, E] in fp32.

        Args:
            token_ids, positions, types: [T] int64; a text's positions begin at the config's first one.
            lengths: as for `whole_attention`.
        """
        x = self.norm(self.embed(token_ids) + self.positions(positions) + self.types(types))
        for layer in self.layers:
            x = layer(x, lengths)
        return x

    def scores(self, first: Value) -> Value:
        """Scores [R, L] of the hidden states [R, E] of the texts' first tokens, where there is a head of L labels."""
        assert self.head is not None
        assert self.score is not None
        return self.score(activation(self.head(first), "tanh"))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _pair(target: str, hf: str, gguf: str | None) -> list[WeightName]:
    return [
        WeightName(f"{target}{kind}", f"{hf}.{kind}", None if gguf is None else f"{gguf}.{kind}")
        for kind in ("weight", "bias")
    ]


def weights(config: EncoderConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of names; in a model that was `stored` with its head, the encoder's have a prefix."""
    family = "bert" if config.model_type == "bert" else "roberta"
    prefix = f"{family}." if any(name.startswith(f"{family}.") for name in stored) else ""
    at, layer, block = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{i}}.", "blk.{i}."
    head = ("bert.pooler.dense", "classifier") if family == "bert" else ("classifier.dense", "classifier.out_proj")
    return [
        WeightName("embed:weight", at + "word_embeddings.weight", "token_embd.weight"),
        WeightName("positions:weight", at + "position_embeddings.weight", "position_embd.weight"),
        WeightName("types:weight", at + "token_type_embeddings.weight", "token_types.weight"),
        *_pair("norm:", at + "LayerNorm", "token_embd_norm"),
        *_pair("layers.{i}.attention.qkv:q.", layer + "attention.self.query", block + "attn_q"),
        *_pair("layers.{i}.attention.qkv:k.", layer + "attention.self.key", block + "attn_k"),
        *_pair("layers.{i}.attention.qkv:v.", layer + "attention.self.value", block + "attn_v"),
        *_pair("layers.{i}.attention.output:", layer + "attention.output.dense", block + "attn_output"),
        *_pair("layers.{i}.attention_norm:", layer + "attention.output.LayerNorm", block + "attn_output_norm"),
        *_pair("layers.{i}.mlp.up:", layer + "intermediate.dense", block + "ffn_up"),
        *_pair("layers.{i}.mlp.down:", layer + "output.dense", block + "ffn_down"),
        *_pair("layers.{i}.output_norm:", layer + "output.LayerNorm", block + "layer_output_norm"),
        *_pair("head:", head[0], None),
        *_pair("score:", head[1], None),
    ]


def ignored(config: EncoderConfig) -> list[str]:
    """Stored names that a vector does not need: counted positions, the pooler, the heads of pre-training."""
    buffers = r"(bert\.|roberta\.)?embeddings\.(position_ids|token_type_ids)"
    unused = (
        [] if config.scores and config.model_type == "bert" else [r"(bert\.|roberta\.)?pooler\.dense\.(weight|bias)"]
    )
    return [buffers, *unused, r"cls\..*", r"lm_head\..*"]


FAMILY = EncoderFamily(
    hf={
        "BertModel": ("bert", False),
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
