# SPDX-License-Identifier: MIT
"""Fields that requests for embeddings, classes and scores share, and the token counts of the responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Generic, TypeVar

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import ModelFields, Priority, Refusal, RequestId

MAX_INPUTS = 2048  # texts of one embedding request; OpenAI's limit
MAX_PAIRS = 2048  # pairs of texts of one score request
MAX_POOLED_TOKENS = 1 << 20  # tokens of all texts or pairs of a request
MAX_NUMBERS = 1 << 24  # elements of all vectors of a request, for multi-vector and sparse embeddings

_NEVER_CUT = "texts are never truncated; shorten them"
_TEXT_ONLY = "the server takes text only"
_ACTIVATION = "the model's config sets the activation of its scores"

POOLING_REFUSED_FIELDS: Mapping[str, Refusal] = {
    "truncate_prompt_tokens": Refusal(_NEVER_CUT),
    "truncation_side": Refusal(_NEVER_CUT),
    "truncate": Refusal(_NEVER_CUT, (False, "NONE")),
    "padding": Refusal("texts are never padded, and a vector depends on no other text", ("do_not_pad",)),
    "late_chunking": Refusal("each text has one vector of its own", (False,)),
    "softmax": Refusal(_ACTIVATION, (True,)),
    "activation": Refusal(_ACTIVATION, (True,)),
    "use_activation": Refusal(_ACTIVATION, (True,)),
    "mm_processor_kwargs": Refusal(_TEXT_ONLY, ({},)),
    "messages": Refusal("send the conversation's text as input"),
    "chat_template": Refusal("texts are not rendered by a template"),
    "additional_data": Refusal("there are no plug-ins that read it"),
    "instruction": Refusal("put the instruction into the text, as the model card shows"),
}


Words = Annotated[str, Field(min_length=1)]
"""Non-empty text."""


class PoolingFields(ModelFields):
    """Fields of every request for vectors, classes or scores. None always means absent; `user` has no effect."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = POOLING_REFUSED_FIELDS

    priority: Priority | None = None
    request_id: RequestId | None = None
    user: str | None = None


class PoolingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the prompts; both counts are equal, because no text is generated."""

    prompt_tokens: int
    total_tokens: int


Item = TypeVar("Item")


class Listed(msgspec.Struct, Generic[Item], frozen=True, kw_only=True):
    """Response with one item for each text, or for each pair of texts, of a request."""

    id: str
    created: int
    model: str
    data: tuple[Item, ...]
    usage: PoolingUsage
    object: str = "list"
