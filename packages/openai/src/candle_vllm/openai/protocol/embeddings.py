# SPDX-License-Identifier: MIT
"""Wire types of `/v1/embeddings`, llama.cpp's `/embedding`, `/v1/moderations`, vLLM's `/pooling` and `/classify`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import msgspec
from pydantic import Discriminator, Field, Tag, model_validator

from candle_vllm.core.pooling import MAX_DIMENSIONS, PoolingKind, PoolingParams
from candle_vllm.openai.protocol.fields import (
    Cut,
    CutFields,
    Refusal,
    TokenIds,
    WireModel,
    entries,
    invalid,
    prompt_form,
)
from candle_vllm.openai.protocol.messages import Messages
from candle_vllm.openai.protocol.pooling import MAX_INPUTS, POOLING_REFUSED_FIELDS, Listed, PoolingFields, Words
from candle_vllm.openai.protocol.score import Texts
from candle_vllm.openai.protocol.templating import TemplateFields

# Maximum inputs with encoding_format bytes: the header `metadata` has 120 bytes for each; clients read up to 64 KiB.
MAX_DESCRIBED = 256
TaskName = Annotated[str, Field(min_length=1, max_length=64)]


def _without(refused: Mapping[str, Refusal], *names: str) -> dict[str, Refusal]:
    return {name: refusal for name, refusal in refused.items() if name not in names}


EMBEDDING_REFUSED_FIELDS: Mapping[str, Refusal] = {
    **_without(POOLING_REFUSED_FIELDS, *CutFields.model_fields, "truncate", "use_activation"),
    "messages": Refusal("a request has an input or messages"),
    "output_dtype": Refusal("use embed_dtype with encoding_format", ("float", "float32")),
    "embd_normalize": Refusal("send normalize, where true is 2 and false is -1"),
}

Input = Annotated[
    Annotated[Words, Tag("<string>")]
    | Annotated[list[Words], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("<strings>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("<token lists>")],
    Discriminator(prompt_form),
]


class EmbeddingRequest(CutFields, PoolingFields):
    """Texts to embed: a text, several texts, token ids, or several lists of token ids.

    Attributes:
        encoding_format: "float" for vectors of numbers, "base64" for their bytes as text. With "bytes" the body of the
            response is the bytes of all vectors, and the header `metadata` has their offsets, their shapes and the
            usage as JSON; "bytes_only" leaves this header out. Batches refuse both; `embed` returns base64 for both.
        embed_dtype: type of the elements in base64 and bytes.
        endianness: byte order of these elements; "native" is "little".
        dimensions: length of the vectors, for models trained for truncated vectors (Matryoshka).
        pooling, embedding_type: pooling method, see `PoolingKind`; the second name is the Rust candle-vllm's. As in
            Jina's API, the second may be "float" or "base64" instead, and is then another name of `encoding_format`.
        normalize, normalized, use_activation: whether to scale vectors to length 1; null uses the model's setting. The
            second name is Jina's, the third vLLM's.
        add_special_tokens: whether special tokens are added to texts; None adds them.
        truncate: whether to truncate texts to the model's maximum length, as with `truncate_prompt_tokens` -1 (Jina).
        task: Jina's name of a task ("retrieval.query"), which selects the LoRA adapter "retrieval_query" and, without
            `input_type`, the sentence-transformers prompt of this name.
        return_multivector: whether each token gets a vector, as with `pooling` "all" (Jina).
        input_type: "query", "document" or another name of a sentence-transformers prompt, which precedes each text.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = EMBEDDING_REFUSED_FIELDS
    own_tasks: ClassVar[bool] = False  # whether `task` is not the name of an adapter
    texts: ClassVar[str] = "input"  # field of the texts
    scaled: ClassVar[bool | None] = None  # `normalize` if a request sets none of its three names

    input: Input
    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] | None = None
    embed_dtype: Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"] | None = None
    endianness: Literal["native", "big", "little"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    pooling: PoolingKind | None = None
    embedding_type: PoolingKind | None = None
    normalize: bool | None = None
    normalized: bool | None = None
    use_activation: bool | None = None
    add_special_tokens: bool | None = None
    truncate: bool | None = None
    task: TaskName | None = None
    return_multivector: bool | None = None
    input_type: TaskName | None = None

    @model_validator(mode="before")
    @classmethod
    def _task_adapter(cls, data: Any) -> Any:
        task = data.get("task") if isinstance(data, dict) and not cls.own_tasks else None
        if not isinstance(task, str):
            return data
        adapter = task.replace(".", "_").replace("-", "_")
        if data.get("lora_path") not in (None, adapter):
            raise invalid("task", "and lora_path name two adapters")
        return data | {"lora_path": adapter}

    @model_validator(mode="before")
    @classmethod
    def _jina_format(cls, data: Any) -> Any:
        form = data.get("embedding_type") if isinstance(data, dict) else None
        if form not in ("float", "base64"):
            return data
        if data.get("encoding_format") not in (None, form):
            raise invalid("embedding_type", "and encoding_format are two names of one field and must be equal")
        return data | {"embedding_type": None, "encoding_format": form}

    @model_validator(mode="after")
    def _one_pooling(self) -> Self:
        if self.return_multivector is not None and (self.pooling or self.embedding_type):
            raise invalid("return_multivector", "and pooling set the same option: send one of them")
        given = self._scaling()
        first = next(iter(given), "")
        for name, value in given.items():
            if value != given[first]:
                raise invalid(name, f"and {first} are two names of one field and must be equal")
        if self.truncate and self.truncate_prompt_tokens is not None:
            raise invalid("truncate", "and truncate_prompt_tokens set the same option: send one of them")
        if self.embedding_type is not None and self.pooling not in (None, self.embedding_type):
            raise invalid("embedding_type", "and pooling are two names of one field and must be equal")
        if self.encoding_format in (None, "float"):
            for name, plain in (("embed_dtype", ("float32",)), ("endianness", ("native", "little"))):
                if getattr(self, name) not in (None, *plain):
                    raise invalid(name, "needs encoding_format base64, bytes or bytes_only")
        if self.encoding_format == "bytes" and self.input is not None and len(self.inputs) > MAX_DESCRIBED:
            said = (
                f"bytes describes {MAX_DESCRIBED} inputs at most in the header metadata: send fewer, or use bytes_only"
            )
            raise invalid("encoding_format", said)
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs as a list with one entry for each text."""
        return entries(getattr(self, self.texts))

    def cut(self, otherwise: Literal["left", "right"]) -> Cut | None:
        """Return how inputs that are too long are truncated; see `CutFields.cut`."""
        if self.truncate:
            return Cut(-1, self.truncation_side or otherwise)
        return super().cut(otherwise)

    def _scaling(self) -> dict[str, bool]:
        """Return the values of `normalize` and of its other names, if the request sets them."""
        names = ("normalize", "normalized", "use_activation")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def pooling_params(self) -> PoolingParams:
        """Return the pooling parameters of the request."""
        return PoolingParams(
            dimensions=self.dimensions,
            normalize=next(iter(self._scaling().values()), self.scaled),
            pooling="all" if self.return_multivector else self.pooling or self.embedding_type,
        )


class EmbeddingChatRequest(TemplateFields, EmbeddingRequest):
    """A conversation to embed, in vLLM's form; it may contain images.

    Attributes:
        messages: as in a chat request; the template begins no answer unless `add_generation_prompt` asks for it.
        add_special_tokens: whether to add special tokens to the rendered text; null means no: templates write them.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = _without(
        EMBEDDING_REFUSED_FIELDS, "messages", *TemplateFields.model_fields
    )

    input: None = None  # pyrefly: ignore[bad-override]
    input_type: None = None
    messages: Messages

    def chat_fields(self) -> dict[str, Any]:
        """Return the validated fields that this request has in common with a chat request, with `max_tokens` 1."""
        names = ("model", "messages", "add_special_tokens", *TemplateFields.model_fields)
        more = {"add_generation_prompt": bool(self.add_generation_prompt), "max_tokens": 1}
        return {name: getattr(self, name) for name in names} | more


class ContentRequest(EmbeddingRequest):
    """Texts to embed, in llama.cpp's form: `content` is its name of `input`, and vectors have length 1 by default."""

    texts: ClassVar[str] = "content"
    scaled: ClassVar[bool | None] = True

    input: None = None  # pyrefly: ignore[bad-override]
    content: Input
    encoding_format: Literal["float", "base64"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_input(cls, data: Any) -> Any:
        named = isinstance(data, dict) and data.get("content") is None and "input" in data
        return {**data, "content": data["input"], "input": None} if named else data


class ActivationFields(WireModel):
    """Whether logits of a head become probabilities: one field with two names; `activation` is vLLM's older name."""

    use_activation: bool | None = None
    activation: bool | None = None

    @model_validator(mode="after")
    def _one_activation(self) -> Self:
        if self.activation is not None and self.use_activation not in (None, self.activation):
            raise invalid("activation", "and use_activation are two names of one field and must be equal")
        return self

    def activated(self) -> PoolingParams:
        """Return the pooling parameters for a classification."""
        return PoolingParams(use_activation=self.activation if self.use_activation is None else self.use_activation)


class ClassifyRequest(ActivationFields, CutFields, PoolingFields):
    """Texts to classify, in vLLM's form.

    Attributes:
        add_special_tokens: whether special tokens are added to texts; None adds them.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        **_without(POOLING_REFUSED_FIELDS, *CutFields.model_fields, *ActivationFields.model_fields),
        "truncate": Refusal("use truncate_prompt_tokens", (False, "NONE")),
        "softmax": Refusal("send use_activation", (True,)),
    }

    input: Input
    add_special_tokens: bool | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs as a list with one entry for each text."""
        return entries(self.input)


class ModerationRequest(PoolingFields):
    """Texts that a classifier checks for harmful content, in OpenAI's form."""

    input: Texts


class Moderated(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of the classifier's labels for one text, without harmless labels; a category is true from 0.5 on."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]


class Moderation(msgspec.Struct, frozen=True, kw_only=True):
    """Moderation results in the order of the texts."""

    id: str
    model: str
    results: tuple[Moderated, ...]


_HARMLESS = (
    r"ok(ay)?|safe|benign|harmless|neutral|normal|clean|none|other|sfw|acceptable|"
    r"no[tn]?[-_ ]?(toxic|hate|hateful|injection|jailbreak|offensive|spam|harmful|nsfw|abusive)"
)


def moderated(labels: Sequence[str], numbers: Sequence[float]) -> Moderated:
    """Convert the scores of a classifier's labels to a moderation result."""
    pairs = zip(labels, numbers, strict=True)
    scores = {label: number for label, number in pairs if not re.fullmatch(_HARMLESS, label.lower())}
    found = {label: number >= 0.5 for label, number in scores.items()}
    return Moderated(flagged=any(found.values()), categories=found, category_scores=scores)


class Classified(msgspec.Struct, frozen=True, kw_only=True):
    """Class of one text: the likeliest label, and all labels' probabilities, or logits if `use_activation` is false."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifiedList(Listed[Classified], frozen=True, kw_only=True):
    """Classes in the order of the texts."""


Numbers = list[float | list[float] | str] | str
"""A vector, or a list of vectors with one for each token; in base64, each vector is a text."""


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """Embedding of one text."""

    index: int
    embedding: Numbers
    object: str = "embedding"


class EmbeddingList(Listed[Embedding], frozen=True, kw_only=True):
    """Embeddings in the order of the texts."""


class LlamaEmbedding(msgspec.Struct, frozen=True, kw_only=True):
    """Embedding of one text in llama.cpp's form: a list with its vector, or with one vector for each token."""

    index: int
    embedding: list[float | list[float] | str]

    @classmethod
    def of(cls, each: Embedding) -> Self:
        """Convert an embedding in OpenAI's form."""
        flat = isinstance(each.embedding, str) or isinstance(next(iter(each.embedding), None), float)
        return cls(index=each.index, embedding=cast("Any", [each.embedding] if flat else each.embedding))


PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]


class PoolingRequest(ActivationFields, EmbeddingRequest):
    """Texts to pool, in vLLM's form.

    Attributes:
        task: what is computed, for a text or for each of its tokens; null uses the model's own task. For vectors,
            `use_activation` is another name of `normalize`.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = _without(
        EMBEDDING_REFUSED_FIELDS, *ActivationFields.model_fields
    ) | {"messages": Refusal("the texts are the input"), "softmax": Refusal("send use_activation", (True,))}
    own_tasks: ClassVar[bool] = True

    task: PoolingTask | None = None


class Pooled(msgspec.Struct, frozen=True, kw_only=True):
    """Pooling result of one text."""

    index: int
    data: Numbers
    object: str = "pooling"


class PooledList(Listed[Pooled], frozen=True, kw_only=True):
    """Pooling results in the order of the texts, in vLLM's form."""
