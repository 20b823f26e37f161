# SPDX-License-Identifier: MIT
"""Wire types of requests that score pairs of texts or rank documents, and of their responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag, model_validator

from candle_vllm.openai.protocol.fields import Refusal, WireModel, invalid, list_form
from candle_vllm.openai.protocol.pooling import (
    MAX_PAIRS,
    POOLING_REFUSED_FIELDS,
    Listed,
    PoolingFields,
    PoolingUsage,
    Words,
)

Texts = Annotated[
    Annotated[Words, Tag("<string>")]
    | Annotated[list[Words], Field(min_length=1, max_length=MAX_PAIRS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]

# vLLM's names for the two sides of the pairs.
_SIDES = (("text_1", "text_2"), ("queries", "items"), ("queries", "documents"), ("data_1", "data_2"))


class ScoringFields(PoolingFields):
    """Fields of requests with pairs of texts, which by default are refused if they are too long.

    Attributes:
        truncate_prompt_tokens: maximum tokens of a pair, or of each text if the model compares vectors; -1 for the
            model's maximum. Texts lose their ends, in pairs only the second texts.
        max_tokens_per_doc: maximum tokens of a second text; 0 for no limit.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        **{name: refusal for name, refusal in POOLING_REFUSED_FIELDS.items() if name != "truncate_prompt_tokens"},
        "truncation_side": Refusal("texts of pairs lose their ends", ("right",)),
        "truncate": Refusal("use truncate_prompt_tokens", (False, "NONE")),
        "encoding_format": Refusal("scores are numbers", ("float",)),
    }

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = None


class ScoreRequest(ScoringFields):
    """Pairs of texts: one text with each of several, or two lists of equal length, paired in order."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    items: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        given = {name for side in _SIDES for name in side if getattr(self, name) is not None}
        if not any(given == set(side) for side in _SIDES):
            ways = ", or ".join(" and ".join(side) for side in _SIDES)
            raise invalid(
                min(given) if given else "text_1", f"is a side of the pairs, and exactly two are needed: {ways}"
            )
        left, right = self._lists()
        if len(left) not in (1, len(right)):
            raise invalid(
                self._names()[0],
                f"has {len(left)} texts and {self._names()[1]} has {len(right)}: give one text, or as many on both "
                "sides",
            )
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All pairs of texts."""
        left, right = self._lists()
        return list(zip(left * len(right) if len(left) == 1 else left, right))

    def blamed(self, number: int, side: int) -> str:
        """Return the path of the field with the first (0) or second (1) text of a pair."""
        name = self._names()[side]
        texts = getattr(self, name)
        return name if isinstance(texts, str) else f"{name}.{min(number, len(texts) - 1)}"

    def _names(self) -> tuple[str, str]:
        return next(side for side in _SIDES if all(getattr(self, name) is not None for name in side))

    def _lists(self) -> tuple[list[str], list[str]]:
        left, right = (getattr(self, name) for name in self._names())
        return [left] if isinstance(left, str) else left, [right] if isinstance(right, str) else right


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Score of one pair."""

    index: int
    score: float
    object: str = "score"


class ScoreList(Listed[Score], frozen=True, kw_only=True):
    """Scores in the order of the pairs."""


class TextDocument(WireModel):
    """A document as an object with its text."""

    text: Words

    refused_fields: ClassVar[Mapping[str, Refusal]] = {"image": Refusal("the server takes text only")}


Document = Annotated[
    Annotated[Words, Tag("<string>")] | Annotated[TextDocument, Tag("<object>")],
    Discriminator(lambda value: "<object>" if isinstance(value, dict) else "<string>"),
]


class RerankRequest(ScoringFields):
    """Documents to rank by their relevance to a query.

    Attributes:
        top_n: maximum number of documents in the response, best first; None or 0 means all.
        return_documents: whether the response has the texts; None means yes.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        **ScoringFields.refused_fields,
        "max_chunks_per_doc": Refusal("use max_tokens_per_doc"),
        "rank_fields": Refusal("documents are texts"),
    }

    query: Words
    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_PAIRS, fail_fast=True)]
    top_n: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """Texts of the documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RankedText(msgspec.Struct, frozen=True, kw_only=True):
    """Text of a document."""

    text: str


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """Index of a document in the request, and its score."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The documents, best first."""

    id: str
    model: str
    results: tuple[Ranked, ...]
    usage: PoolingUsage
