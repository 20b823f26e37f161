# SPDX-License-Identifier: MIT
"""Output heads of encoders for each token: classes, ColBERT vectors, weights of the vocabulary.

- `...ForTokenClassification`: class probabilities of each token.
- ColBERT: a matrix projects each token to a short vector; `HF_ColBERT`, PyLate's folders, or bge-m3's `colbert_linear`.
- SPLADE and bge-m3's `sparse_linear`: one weight for each token of the vocabulary.

Sources: Khattab and Zaharia, 2020, arXiv:2004.12832; Formal et al., 2021, arXiv:2109.10086; Chen et al., 2024,
arXiv:2402.03216 (bge-m3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.encoder_parts import ACTIVATIONS, classifier, head_of, read_part
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.pooled_head import Dense, PooledHead
from candle_vllm.core.pooling import ModelPooling, PoolingKind
from candle_vllm.core.text.tokenizer import Tokenizer

_CLASSES, _COLBERT = "ForTokenClassification", "HF_ColBERT"
_LINEAR = "linear.weight"  # in an HF_ColBERT checkpoint

# dense, norm, output matrix and its bias in the heads of masked language models
_MASKED = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder.weight",
     "cls.predictions.bias"),
    ("vocab_transform", "vocab_layer_norm", "vocab_projector.weight", "vocab_projector.bias"),
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.weight", "lm_head.bias"),
    ("head.dense", "head.norm", "decoder.weight", "decoder.bias"),
)  # fmt: skip


_ROWS = 64  # positions at a time, so that logits of a large vocabulary take 128 MB


@dataclasses.dataclass(frozen=True, eq=False)
class TokenHead(PooledHead):
    """Output head for each token, with further heads for other kinds of pooling.

    Attributes:
        kinds: heads for the kinds of pooling that this head does not serve.
        skip: leading positions that get no vector.
        words: vocabulary size V if the head gives one weight for each position: a vocabulary entry then has the largest
            weight of its positions. 0 otherwise.
        unweighted: token ids that get no weight.
    """

    kinds: Mapping[str, PooledHead] = dataclasses.field(default_factory=dict[str, PooledHead])
    skip: int = 0
    words: int = 0
    unweighted: tuple[int, ...] = ()

    def of(self, kind: str) -> PooledHead:
        """See `pooling.Behind`."""
        return self.kinds.get(kind, self)

    def by_token(
        self, rows: NDArray[np.float64], token_ids: Sequence[int], *, activate: bool, sparse: bool
    ) -> NDArray[np.float64]:
        """See `pooling.Behind`; a masked language model's weights are log(1 + ReLU(the largest logit of all rows))."""
        made = []
        for first in range(self.skip, len(rows), _ROWS):
            part = self(rows[first : first + _ROWS], activate=activate)
            made.append(part.max(0, keepdims=True) if sparse and not self.words else part)
        width = len(self.layers[-1].weight) if self.layers else rows.shape[1]
        found = np.concatenate(made) if made else np.empty((0, width))
        if not sparse:
            return found
        if not self.words:
            return np.log1p(np.maximum(found.max(0), 0))
        weights = np.zeros(self.words)
        np.maximum.at(weights, np.array(token_ids), found[:, 0])
        weights[list(self.unweighted)] = 0
        return weights


def base_class(name: str, config: Mapping[str, Any], known: Collection[str]) -> str:
    """Class name of the encoder under a token head, or of jina v3 under another name; any other name as it is."""
    if config.get("position_embedding_type") == "rotary" and name in (_COLBERT, "XLMRobertaModel"):
        return "JinaEmbeddingsV3Model"  # jina's remote code uses XLM-RoBERTa's class name
    if name == _COLBERT:
        return {"bert": "BertModel", "xlm-roberta": "XLMRobertaModel"}.get(str(config.get("model_type")), name)
    stem = name.removesuffix(_CLASSES)
    return next((stem + end for end in ("Model", "ForMaskedLM") if stem != name and stem + end in known), name)


def with_head(
    name: str, family: EncoderFamily, config: EncoderConfig, fields: Fields
) -> tuple[EncoderFamily, EncoderConfig]:
    """Family that ignores the tensors of the class's token head, and config with the labels of a token classifier."""
    own = family.ignored
    if name == _COLBERT:
        return dataclasses.replace(family, ignored=lambda config: [*own(config), r"linear\.weight"]), config
    if not name.endswith(_CLASSES):
        return family, config
    labels = head_of(fields, scores=True)["labels"]
    config = dataclasses.replace(config, labels=labels, likelihood="softmax", head_pooling="all")
    ignored = lambda config: [*own(config), r"classifier\..*"]  # noqa: E731
    return dataclasses.replace(family, ignored=ignored, behind=family.behind or classifier), config


def with_token_heads(
    folder: Path,
    checkpoint: Checkpoint,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    pooling: ModelPooling,
    head: PooledHead | None,
) -> tuple[ModelPooling, PooledHead | None]:
    """Pooling of an encoder with the token heads that its files have.

    Raises:
        WeightsError, UnsupportedModelError: a head is missing or misshapen.
    """
    if _LINEAR in checkpoint.tensors:
        rows = sum(checkpoint.tensors[_LINEAR].shape[:1])
        weight = read_part(checkpoint, _LINEAR, rows, config.hidden_size)
        return dataclasses.replace(pooling, pooling="all", normalize=True, size=rows), PooledHead(
            (Dense(weight=weight),)
        )
    kinds: dict[str, PooledHead] = {}
    sizes: dict[PoolingKind, int] = {}
    if pooling.pooling == "sparse":
        kinds["sparse"], sizes["sparse"] = TokenHead(_masked(config, checkpoint)), config.vocab_size
    added = tokenizer.backend.get_added_tokens_decoder().items()
    special = tuple(number for number, token in added if token.special and number < config.vocab_size)
    for kind, name in (("all", "colbert_linear"), ("sparse", "sparse_linear")):
        if not (folder / f"{name}.safetensors").is_file():
            continue
        with open_safetensors(folder / f"{name}.safetensors") as own:
            rows = sum(own.tensors["weight"].shape[:1]) if kind == "all" and "weight" in own.tensors else 1
            bias = read_part(own, "bias", rows)
            layer = Dense(
                weight=read_part(own, "weight", rows, config.hidden_size),
                bias=bias,
                activation="none" if kind == "all" else "relu",
            )
        if kind == "all":  # the first position gives the text's dense vector
            kinds["all"], sizes["all"] = TokenHead((layer,), skip=1), rows
        else:
            kinds["sparse"] = TokenHead((layer,), words=config.vocab_size, unweighted=special)
            sizes["sparse"] = config.vocab_size
    if kinds:
        head = TokenHead(() if head is None else head.layers, kinds=kinds)
    return dataclasses.replace(pooling, sizes=sizes), head


def _masked(config: EncoderConfig, checkpoint: Checkpoint) -> tuple[Dense, Dense]:
    """Head of a masked language model; its output matrix may be tied to the embedding."""
    size, tensors = config.hidden_size, checkpoint.tensors
    names = next((names for names in _MASKED if f"{names[0]}.weight" in tensors), None)
    if names is None:
        raise UnsupportedModelError(f"{checkpoint.path}: no head of a masked language model that is implemented")
    dense, norm, matrix, bias = names
    table = next(
        (name for name in tensors if name.endswith(("word_embeddings.weight", "tok_embeddings.weight"))), matrix
    )

    def vector(name: str, size: int) -> np.ndarray | None:
        return read_part(checkpoint, name, size) if name in tensors else None

    activation = ACTIVATIONS[config.activation] if names is _MASKED[0] else "gelu"
    first = Dense(
        weight=read_part(checkpoint, f"{dense}.weight", size, size),
        bias=vector(f"{dense}.bias", size),
        activation=activation,
        norm=read_part(checkpoint, f"{norm}.weight", size),
        norm_bias=vector(f"{norm}.bias", size),
        eps=config.norm_eps,
    )
    logits = read_part(checkpoint, matrix if matrix in tensors else table, config.vocab_size, size)
    return first, Dense(weight=logits, bias=vector(bias, config.vocab_size))
