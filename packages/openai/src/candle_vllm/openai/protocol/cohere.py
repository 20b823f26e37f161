# SPDX-License-Identifier: MIT
"""Wire types of Cohere's `/v2/embed` and `/v1/embed`. Source: docs.cohere.com/reference/embed."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from pydantic import Field

from candle_vllm.core.engine.outputs import EmbeddingOutput
from candle_vllm.core.pooling import MAX_DIMENSIONS
from candle_vllm.openai.protocol.embeddings import EmbeddingRequest
from candle_vllm.openai.protocol.fields import CutFields, Refusal
from candle_vllm.openai.protocol.pooling import MAX_INPUTS, POOLING_REFUSED_FIELDS, PoolingFields, Words

_QUERY, _DOCUMENT = ("query", "retrieval.query"), ("document", "passage", "corpus", "retrieval.passage")
INPUT_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"search_query": _QUERY, "query": _QUERY, "search_document": _DOCUMENT, "document": _DOCUMENT, "passage": _DOCUMENT}
)
"""input_type -> other names of a model's prompt for this type, used if the model has no prompt of that name."""

EmbeddingType = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]


class CohereEmbedRequest(PoolingFields):
    """Texts to embed, in Cohere's form.

    Attributes:
        input_type: what the texts are; the model's prompt for this type is prepended to each text.
        embedding_types: types of the vectors; None means floats, and for `/v1/embed` a plain list of float vectors.
        output_dimension: length of the vectors, for models trained for truncated vectors (Matryoshka).
        truncate: end at which a text that is too long is truncated; "NONE" refuses such a text, None means "END".
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        **{name: refusal for name, refusal in POOLING_REFUSED_FIELDS.items() if name != "truncate"},
        **dict.fromkeys(CutFields.model_fields, Refusal("use truncate")),
        "images": Refusal("the server takes text only", ([],)),
        "inputs": Refusal("send the texts in texts", ([],)),
        "max_tokens": Refusal("texts are truncated at the model's longest input only"),
    }

    texts: Annotated[list[Words], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    input_type: Literal["search_document", "search_query", "classification", "clustering"] | None = None
    embedding_types: Annotated[list[EmbeddingType], Field(min_length=1, max_length=6, fail_fast=True)] | None = None
    output_dimension: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None

    def inner(self) -> EmbeddingRequest:
        """Convert this request to an OpenAI request."""
        return EmbeddingRequest(
            **{name: getattr(self, name) for name in ("model", "lora_path", "priority", "input_type")},
            input=self.texts,
            dimensions=self.output_dimension,
            truncate_prompt_tokens=None if self.truncate == "NONE" else -1,
            truncation_side="left" if self.truncate == "START" else "right",
        )


class CohereEmbeddings(msgspec.Struct, frozen=True, kw_only=True):
    """Embeddings in the order of the texts: lists by type, or for `/v1/embed` without types one list."""

    id: str
    embeddings: dict[str, list[Any]] | list[Any]
    texts: list[str]
    meta: dict[str, dict[str, Any]]
    response_type: str


def cohere_answer(
    request: CohereEmbedRequest, request_id: str, outputs: Sequence[EmbeddingOutput], version: str
) -> CohereEmbeddings:
    """Build the response of version 1 or 2 of the API."""
    plain, types = version == "1" and request.embedding_types is None, request.embedding_types or ["float"]
    tokens = sum(each.num_tokens for each in outputs)
    made: dict[str, list[Any]] = {
        kind: [_typed(each.embedding, kind) for each in outputs] for kind in dict.fromkeys(types)
    }
    return CohereEmbeddings(
        id=request_id,
        embeddings=made["float"] if plain else made,
        texts=list(request.texts),
        meta={"api_version": {"version": version}, "billed_units": {"input_tokens": tokens}},
        response_type="embeddings_floats" if plain else "embeddings_by_type",
    )


def _typed(vector: array[float], kind: EmbeddingType) -> list[float] | list[int] | str:
    """Convert a vector to one of Cohere's types.

    int8 is 127 times each element of the vector scaled to length 1, and uint8 is 128 more. ubinary has one bit for each
    element, 1 if it is above 0, the first in the highest bit of a byte; binary is 128 less.
    """
    if kind == "float":
        return vector.tolist()
    if kind == "base64":  # little-endian float32
        return base64.b64encode(vector.tobytes()).decode("ascii")
    numbers = np.asarray(vector)
    if kind in ("int8", "uint8"):
        scaled = np.rint(numbers * (127 / max(np.linalg.norm(numbers), 1e-12))).astype(int)
        return (scaled + 128 * (kind == "uint8")).tolist()
    return (np.packbits(numbers > 0).astype(int) - 128 * (kind == "binary")).tolist()
