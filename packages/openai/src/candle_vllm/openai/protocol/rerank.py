"""Wire types of `/v1/rerank`: Jina's and Cohere's, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag

from candle_vllm.openai.protocol.fields import Refusal, WireModel
from candle_vllm.openai.protocol.pooling import (
    MAX_PAIRS,
    POOLING_REFUSED_FIELDS,
    PoolingFields,
    PoolingUsage,
    Words,
)


class TextDocument(WireModel):
    """A document as an object."""

    text: Words

    refused_fields: ClassVar[Mapping[str, Refusal]] = {"image": Refusal("the server takes text only")}


def _document_form(value: Any) -> str:
    return "<object>" if isinstance(value, dict) else "<string>"


Document = Annotated[
    Annotated[Words, Tag("<string>")] | Annotated[TextDocument, Tag("<object>")], Discriminator(_document_form)
]


class RerankRequest(PoolingFields):
    """Documents to be put in order by how well they fit a query.

    Attributes:
        top_n: how many of them to return, best first; None or 0 is all.
        return_documents: with their texts; None is yes.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        **POOLING_REFUSED_FIELDS,
        "max_tokens_per_doc": Refusal("documents are never cut"),
        "max_chunks_per_doc": Refusal("documents are never cut"),
        "rank_fields": Refusal("documents are texts"),
    }

    query: Words
    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_PAIRS, fail_fast=True)]
    top_n: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RankedText(msgspec.Struct, frozen=True, kw_only=True):
    """A document's text."""

    text: str


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The documents, best first."""

    id: str
    model: str
    results: tuple[Ranked, ...]
    usage: PoolingUsage
