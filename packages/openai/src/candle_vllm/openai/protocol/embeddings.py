# SPDX-License-Identifier: MIT
"""Wire types of `/v1/embeddings`, and of `/pooling` and `/classify` as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, cast

import msgspec
from pydantic import Discriminator, Field, Tag, model_validator

from candle_vllm.core.pooling import MAX_DIMENSIONS, PoolingParams
from candle_vllm.openai.protocol.fields import CutFields, Refusal, TokenIds, invalid, prompt_form
from candle_vllm.openai.protocol.pooling import MAX_INPUTS, POOLING_REFUSED_FIELDS, PoolingFields, PoolingUsage, Words

PoolingName = Literal["mean", "last", "cls"]

EMBEDDING_REFUSED_FIELDS: Mapping[str, Refusal] = {
    **{name: refusal for name, refusal in POOLING_REFUSED_FIELDS.items() if name not in CutFields.model_fields},
    "embed_dtype": Refusal("vectors are float32", ("float32",)),
    "endianness": Refusal("vectors are little-endian", ("native", "little")),
    "input_type": Refusal("put the words that the model wants for queries or documents into the text"),
    "task": Refusal("put the words that the model wants for a task into the text"),
    "output_dtype": Refusal("vectors are float32", ("float", "float32")),
}


Input = Annotated[
    Annotated[Words, Tag("<string>")]
    | Annotated[list[Words], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("<strings>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("<token lists>")],
    Discriminator(prompt_form),
]


class EmbeddingRequest(CutFields, PoolingFields):
    """Texts whose vectors are wanted: a text, several, token ids, or several lists of them.

    Attributes:
        encoding_format: numbers, or the bytes of little-endian float32 in base64.
        dimensions: length of the vectors, where the model was trained to be cut.
        pooling, embedding_type: which positions a vector is made of; two names of one field, the second candle-vllm's.
        normalize: scale the vectors to length 1; None is as the model says.
        add_special_tokens: of texts; None adds them.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = EMBEDDING_REFUSED_FIELDS

    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    pooling: PoolingName | None = None
    embedding_type: PoolingName | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_pooling(self) -> Self:
        if self.embedding_type is not None and self.pooling not in (None, self.embedding_type):
            raise invalid("embedding_type", "and pooling are two names of one field and must be equal")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one entry each."""
        return _entries(self.input)

    def pooling_params(self) -> PoolingParams:
        """How the vectors are made."""
        return PoolingParams(
            dimensions=self.dimensions, normalize=self.normalize, pooling=self.pooling or self.embedding_type
        )


class ClassifyRequest(CutFields, PoolingFields):
    """Texts that a classifier is to tell apart, in vLLM's words.

    Attributes:
        add_special_tokens: of texts; None adds them.
        use_activation, activation: false asks for logits, such as rewards, in place of probabilities; two names of one
            field, the second vLLM's older one.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        name: refusal
        for name, refusal in POOLING_REFUSED_FIELDS.items()
        if name not in ("use_activation", "activation")
    }

    input: Input
    add_special_tokens: bool | None = None
    use_activation: bool | None = None
    activation: bool | None = None

    @model_validator(mode="after")
    def _one_activation(self) -> Self:
        if self.activation is not None and self.use_activation not in (None, self.activation):
            raise invalid("activation", "and use_activation are two names of one field and must be equal")
        return self

    def pooling_params(self) -> PoolingParams:
        """Whether logits become probabilities."""
        return PoolingParams(use_activation=self.activation if self.use_activation is None else self.use_activation)

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one entry each."""
        return _entries(self.input)


def _entries(given: Input) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [cast("list[int]", given)]
    return cast("list[str | list[int]]", given)


class Classified(msgspec.Struct, frozen=True, kw_only=True):
    """What one text is: the likeliest label, and the numbers of all of them in the order of the model's config."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifiedList(msgspec.Struct, frozen=True, kw_only=True):
    """The classes in the order of the texts."""

    id: str
    created: int
    model: str
    data: tuple[Classified, ...]
    usage: PoolingUsage
    object: str = "list"


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector; a text where base64 was asked for."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors in the order of the texts."""

    id: str
    created: int
    model: str
    data: tuple[Embedding, ...]
    usage: PoolingUsage
    object: str = "list"


class PoolingRequest(EmbeddingRequest):
    """The same in vLLM's words.

    Attributes:
        task: what is made of a text; vectors are the one thing.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        name: refusal for name, refusal in EMBEDDING_REFUSED_FIELDS.items() if name != "task"
    } | {"messages": Refusal("the texts are the input")}

    task: Literal["embed"] | None = None


class Pooled(msgspec.Struct, frozen=True, kw_only=True):
    """One vector; a text where base64 was asked for."""

    index: int
    data: list[float] | str
    object: str = "pooling"


class PooledList(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors in the order of the texts, in vLLM's words."""

    id: str
    created: int
    model: str
    data: tuple[Pooled, ...]
    usage: PoolingUsage
    object: str = "list"
