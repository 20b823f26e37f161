# SPDX-License-Identifier: MIT
"""Fields that requests for embeddings and scores share, and their token counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import MAX_PRIORITY, ModelFields, Refusal, RequestId

MAX_INPUTS = 2048  # texts of one embedding request; OpenAI's limit
MAX_PAIRS = 2048  # pairs of texts of one score request
MAX_POOLED_TOKENS = 1 << 20  # tokens of all texts or pairs of a request
MAX_NUMBERS = 1 << 24  # elements of all vectors, if a text has several vectors or one as long as the vocabulary

_NEVER_CUT = "texts are never cut; one that is too long is refused with its number"
_TEXT_ONLY = "the server takes text only"

POOLING_REFUSED_FIELDS: Mapping[str, Refusal] = {
    "truncate_prompt_tokens": Refusal(_NEVER_CUT),
    "truncation_side": Refusal(_NEVER_CUT),
    "truncate": Refusal(_NEVER_CUT, (False, "NONE")),
    "late_chunking": Refusal("each text gets one vector of its own", (False,)),
    "softmax": Refusal("the model's config says what its score goes through", (True,)),
    "activation": Refusal("the model's config says what its score goes through", (True,)),
    "use_activation": Refusal("the model's config says what its score goes through", (True,)),
    "mm_processor_kwargs": Refusal(_TEXT_ONLY, ({},)),
    "messages": Refusal("a conversation has no vector; send its text as input"),
    "chat_template": Refusal("texts are read as they are"),
    "additional_data": Refusal("there is no plug-in that reads it"),
    "instruction": Refusal("put the instruction into the text, as the model's page says"),
}


Words = Annotated[str, Field(min_length=1)]
"""Non-empty text."""


class PoolingFields(ModelFields):
    """Fields of every request that generates no text. None always means absent; `user` has no effect."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = POOLING_REFUSED_FIELDS

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    request_id: RequestId | None = None
    user: str | None = None


def text_form(value: Any) -> str:
    """Return pydantic's union tag for a text or a list of texts."""
    return "<strings>" if isinstance(value, list) else "<string>"


class PoolingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that the model read; both counts are equal, because nothing is generated."""

    prompt_tokens: int
    total_tokens: int
