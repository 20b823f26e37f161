# SPDX-License-Identifier: MIT
"""Fields of the Responses API that have no effect here, refused fields, and types that several objects share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from candle_vllm.openai.protocol.fields import DRAFT_FIELDS, REFUSED_FIELDS, Refusal, few_entries, invalid

MAX_ITEMS = 8192  # items of one request
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_TEXT = 10 << 20  # characters of one text; OpenAI's limit

Text = Annotated[str, Field(max_length=MAX_TEXT)]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete", "failed", "calling"]

# Fields that are validated but have no effect, and why.
ADVISORY_RESPONSES_FIELDS: Mapping[str, str] = {
    "user": "names the caller's user; the server keeps no per-user state",
    "safety_identifier": "names the caller's user; the server keeps no per-user state",
    "prompt_cache_key": "routes to a server with a warm cache; there is one prefix cache",
    "prompt_cache_retention": "sets how long the cache is kept; blocks are kept until memory is needed",
    "prompt_cache_options": "sets cache breakpoints; every full block of every prompt is cached",
    "service_tier": "chooses a service tier; there is only one, and answers say `default`",
    "client_metadata": "labels requests for a client's own records",
    "background_options": "sets how late a background response may begin; it begins at once, or is refused",
    "access_programs": "chooses one of OpenAI's access programs, which this server does not have",
    "text.verbosity": "is a hint that open models were not trained on",
    "reasoning.summary": "asks for a summary of the reasoning; the answer has the whole reasoning",
    "reasoning.generate_summary": "the older name of `reasoning.summary`",
    "reasoning.context": "chooses which reasoning the model gets again; its chat template decides that",
    "reasoning.mode": "chooses a mode; there is only one",
}

REFUSED_RESPONSES_FIELDS: Mapping[str, Refusal] = {
    **{
        name: REFUSED_FIELDS[name]
        for name in ("functions", "function_call", "audio", "moderation", "web_search_options", "suffix")
    },
    **DRAFT_FIELDS,
    "prompt": Refusal("the server keeps no prompt templates; put the text into instructions and input"),
    "context_management": Refusal("prompts are never compacted; truncation: auto drops the oldest turns", ([],)),
    "image": Refusal("send images in messages, as input_image", ({},)),
    "messages": Refusal("it belongs to chat requests; use input"),
    "prediction": Refusal("it belongs to chat requests"),
    "max_tokens": Refusal("it belongs to chat requests; use max_output_tokens"),
    "max_completion_tokens": Refusal("it belongs to chat requests; use max_output_tokens"),
    "response_format": Refusal("it belongs to chat requests; use text with format"),
    "reasoning_effort": Refusal("it belongs to chat requests; use reasoning with effort"),
    "logprobs": Refusal("use include with message.output_text.logprobs", (False,)),
    "n": Refusal("there is one answer", (1,)),
    "modalities": Refusal("the server generates text only", (["text"],)),
    "generate": Refusal("requests that generate nothing are not supported", (True,)),
    "stream_id": Refusal("the responses of a connection run one after the other"),
    "betas": Refusal("it belongs to OpenAI's own service", ([],)),
}

REFUSED_COUNT_FIELDS: Mapping[str, Refusal] = {
    **REFUSED_RESPONSES_FIELDS,
    "personality": Refusal("it chooses a style of OpenAI's models; put it into instructions"),
    **dict.fromkeys(
        ("stream", "store", "background", "max_output_tokens", "max_tool_calls", "temperature", "top_p", "include"),
        Refusal("counting generates nothing"),
    ),
}


def _checked(metadata: dict[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not 0 < len(key) <= MAX_METADATA_KEY:
            raise invalid("", f"has a key of {len(key)} characters; 1 to {MAX_METADATA_KEY} are allowed")
        if len(value) > MAX_METADATA_VALUE:
            raise invalid(key, f"must have at most {MAX_METADATA_VALUE} characters, not {len(value)}")
    return metadata


Metadata = Annotated[dict[str, str], few_entries(MAX_METADATA), AfterValidator(_checked)]
"""Labels of a response, a conversation or a batch for its owner's use: up to 16 pairs of strings."""
