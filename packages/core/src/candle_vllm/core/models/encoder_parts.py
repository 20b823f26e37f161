# SPDX-License-Identifier: MIT
"""Parts that several encoder families share: the labels of a head, activations by name, and tables of weight names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.config import MAX_LAYERS, EncoderConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import Parameter, Seen, WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.pooled_head import Dense, Likelihood

MAX_LABELS = 1 << 16

ACTIVATIONS: Mapping[str, Literal["gelu", "gelu_tanh", "relu"]] = MappingProxyType(
    {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
)


def sizes_from_hf(fields: Fields) -> dict[str, Any]:
    """The sizes that config.json of most encoders stores under the same keys."""
    return {
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": fields.count("hidden_size"),
        "intermediate_size": fields.count("intermediate_size"),
        "num_layers": fields.count("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": fields.count("num_attention_heads"),
    }


def sizes_from_gguf(fields: Fields, checkpoint: Checkpoint) -> dict[str, Any]:
    """The sizes of `sizes_from_hf` from GGUF metadata, with the maximum context and the epsilon of norms."""
    table = checkpoint.tensors.get("token_embd.weight")
    return {
        "vocab_size": table.shape[0] if table and table.shape else fields.count("vocab_size"),
        "hidden_size": fields.count("embedding_length"),
        "intermediate_size": fields.count("feed_forward_length"),
        "num_layers": fields.count("block_count", most=MAX_LAYERS),
        "num_heads": fields.count("attention.head_count"),
        "max_position": fields.count("context_length"),
        "norm_eps": fields.get("attention.layer_norm_epsilon", float),
    }


def types_from_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """`token_types` and `typed` of a `StackConfig`, from the table in a GGUF file."""
    table = checkpoint.tensors.get("token_types.weight")
    return {"token_types": table.shape[0] if table and len(table.shape) == 2 else 1, "typed": table is not None}


def check_only(fields: Fields, model_type: str, only: Mapping[str, object]) -> None:
    """Refuse a config with values other than `only`; a missing key or null is never refused.

    Raises:
        UnsupportedModelError: some values are not implemented; the message names all their keys.
    """
    given = {key: fields.values.get(key) for key in only}
    wrong = [f"{key} is {given[key]!r:.40}" for key, value in only.items() if given[key] not in (value, None)]
    if wrong:
        raise UnsupportedModelError(f"{fields.path}: {', '.join(wrong)}, which is not implemented for {model_type}")


def head_of(fields: Fields, *, scores: bool) -> dict[str, Any]:
    """`labels` and `likelihood` of an `EncoderConfig`; empty if the model has no head."""
    if not scores:
        return {}
    labels = _labels(fields)
    return {"labels": labels, "likelihood": _likelihood(fields, len(labels))}


def _labels(fields: Fields) -> tuple[str, ...]:
    """Names of the head's outputs; with neither id2label nor num_labels there are two, as in transformers."""
    named = fields.get("id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"})
    count = fields.count("num_labels", len(named), most=MAX_LABELS)
    if not 0 < count <= MAX_LABELS:
        raise InvalidFileError(f"{fields.path}: id2label names {count} labels; 1 to {MAX_LABELS} are possible")
    names = [named.get(str(number), f"LABEL_{number}") for number in range(count)]
    if not all(isinstance(name, str) for name in names):
        raise InvalidFileError(f"{fields.path}: id2label must name every label by a text")
    return tuple(names)


def _likelihood(fields: Fields, labels: int) -> Likelihood:
    """The activation of the head: by problem_type for several labels, as in transformers; by `_sigmoid` for one."""
    if labels > 1:
        kinds: Mapping[str, Likelihood] = {
            "single_label_classification": "softmax",
            "multi_label_classification": "sigmoid",
            "regression": "none",
        }
        return kinds[fields.choice("problem_type", "single_label_classification", *kinds)]
    return "sigmoid" if _sigmoid(fields) else "none"


def _sigmoid(fields: Fields) -> bool:
    """Whether one label gets a sigmoid: yes, unless the files name Identity, or the model is a regression.

    sentence-transformers writes the name beside config.json since version 5.4, and wrote it into config.json before.
    """
    beside = fields.path.with_name("config_sentence_transformers.json")
    newest = Fields(read_json(beside) if beside.is_file() else {}, beside)
    usual = "Identity" if fields.get("problem_type", str, "") == "regression" else "Sigmoid"
    older = fields.get("sbert_ce_default_activation_function", str, usual)
    name = newest.get("activation_fn", str, fields.section("sentence_transformers").get("activation_fn", str, older))
    kind = name.rpartition(".")[2]
    if kind not in ("Sigmoid", "Identity"):
        raise UnsupportedModelError(
            f"{fields.path}: the score's activation is {name!r:.80}; implemented: Sigmoid, Identity"
        )
    return kind == "Sigmoid"


_TABLES = {
    "embed:weight": ("word_embeddings.weight", "token_embd.weight"),
    "positions:weight": ("position_embeddings.weight", "position_embd.weight"),
    "types:weight": ("token_type_embeddings.weight", "token_types.weight"),
}
_BLOCK = {
    "attention.qkv:q.": ("attention.self.query", "attn_q"),
    "attention.qkv:k.": ("attention.self.key", "attn_k"),
    "attention.qkv:v.": ("attention.self.value", "attn_v"),
    "attention.output:": ("attention.output.dense", "attn_output"),
    "attention_norm:": ("attention.output.LayerNorm", "attn_output_norm"),
    "mlp.up:": ("intermediate.dense", "ffn_up"),
    "mlp.down:": ("output.dense", "ffn_down"),
    "mlp_norm:": ("output.LayerNorm", "layer_output_norm"),
}


def table_names(at: str, head: tuple[str, str], *norms: str) -> list[WeightName]:
    """The table rows of tensors outside of the blocks.

    Args:
        at: prefix of "embeddings." in safetensors.
        head: names of the two matrices of a head.
        norms: names of the embedding norm, in addition to BERT's.
    """
    return [
        *(WeightName(target, f"{at}embeddings.{hf}", gguf) for target, (hf, gguf) in _TABLES.items()),
        *pair("embed_norm:", (f"{at}embeddings.LayerNorm", *norms), "token_embd_norm"),
        *pair("head:", head[0]),
        *pair("score:", head[1]),
    ]


def block_names(layer: str, own: Mapping[str, tuple[str, ...]] = MappingProxyType({})) -> list[WeightName]:
    """The table rows of post-norm blocks, which normalise after each residual sum.

    Args:
        layer: prefix of all names in safetensors.
        own: names by target where they differ from BERT's; an empty tuple omits a target's rows.
    """
    lines = []
    for target, (usual, gguf) in _BLOCK.items():
        stems = tuple(layer + stem for stem in own.get(target, (usual,)))
        lines += pair(f"layers.{{i}}.{target}", stems, f"blk.{{i}}.{gguf}") if stems else []
    return lines


UNUSED = (
    r"(.*\.)?(position_ids|token_type_ids|inv_freq)",
    r"(\w+\.)?pooler\..*",
    r"(cls|lm_head|vocab_\w+|lm_predictions|mask_predictions|legacy_cls)\..*",
)
"""Patterns of names of tensors that are not loaded: buffers, poolers, heads of pre-training."""


def ignored(config: EncoderConfig) -> tuple[str, ...]:
    """`UNUSED`, and the head of a classifier that is used as an embedding model."""
    return UNUSED if config.scores else (*UNUSED, r"(pre_)?classifier\..*")


def thirds(alone: Mapping[str, tuple[str, ...]], fused: tuple[str, ...], gguf: str) -> list[WeightName]:
    """The table rows of q, k and v of each layer, stored as three matrices or as one.

    Args:
        alone: names of the three matrices without ".weight".
        fused: names of the fused matrix in safetensors; `gguf` is its name in GGUF files.
    """
    view = {part: row_part(number, 3) for number, part in enumerate("qkv")}
    return [
        WeightName(
            f"layers.{{i}}.attention.qkv:{part}.{kind}",
            (*(f"{stem}.{kind}" for stem in alone[part]), *(Seen(f"{stem}.{kind}", view[part]) for stem in fused)),
            (f"blk.{{i}}.attn_{part}.{kind}", Seen(f"{gguf}.{kind}", view[part])),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ]


def prefix_of(stored: Iterable[str], name: str) -> str:
    """Prefix of the encoder's tensors, found by `name`, which every model of the family stores; "" without a prefix."""
    return next((found.removesuffix(name) for found in stored if found.endswith(name)), "")


class Table:
    """A parameter "weight" of this shape that is not packed for matrix products."""

    def __init__(self, placement: Placement, *shape: int) -> None:
        self.weight = placement.empty(*shape)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)}


def read_part(checkpoint: Checkpoint, name: str, *shape: int) -> NDArray[np.float32]:
    """Read a tensor of a head in fp32.

    Raises:
        WeightsError: the tensor is missing or has another shape.
    """
    stored = checkpoint.tensors.get(name)
    if stored is None or tuple(stored.shape) != shape:
        found = "missing" if stored is None else f"of shape {list(stored.shape)}"
        raise WeightsError(f"{checkpoint.path}: tensor {name} is {found}; the model asks for {list(shape)}")
    return np.array(stored.load("F32"))


def classifier(config: EncoderConfig, checkpoint: Checkpoint) -> tuple[Dense, ...]:
    """The matrix and bias of a label head that follows the pooling; errors as in `read_part`."""
    labels = len(config.labels)
    weight = read_part(checkpoint, "classifier.weight", labels, config.hidden_size)
    return (Dense(weight=weight, bias=read_part(checkpoint, "classifier.bias", labels)),)
