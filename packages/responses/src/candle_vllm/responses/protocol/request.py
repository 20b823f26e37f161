# SPDX-License-Identifier: MIT
"""Requests of `POST /v1/responses`, its `input_tokens` and its `compact`, from bytes to a checked object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.generation import Logprobs, MaxTokens, SamplerFields
from candle_vllm.openai.protocol.structured import JsonObjectFormat, JsonSchema, TextFormat
from candle_vllm.responses.protocol.fields import (
    MAX_ITEMS,
    REFUSED_COUNT_FIELDS,
    REFUSED_RESPONSES_FIELDS,
    ItemId,
    Metadata,
    Text,
)
from candle_vllm.responses.protocol.items import InputItem
from candle_vllm.responses.protocol.tools import AnyTool, ToolChoice

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    # accepted without effect
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
INCLUDABLE: tuple[str, ...] = get_args(Include)


class StreamOptions(fields.WireModel):
    """Options of the stream; this server offers no choice."""

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = {
        "include_obfuscation": fields.Refusal("events are never padded with random characters", (False,))
    }


class JsonSchemaFormat(JsonSchema):
    """A schema that the answer always follows, whether `strict` or not; it is not part of the prompt."""

    type: Literal["json_schema"]


class PlainFormat(TextFormat):
    """Any text."""

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Raise an error that lists the known formats, if the type is another one."""
        if data.get("type") != "text":
            raise fields.invalid("type", "must be one of text, json_object, json_schema")


class TextConfig(fields.WireModel):
    """Format of the answer; `verbosity` has no effect."""

    format: (
        Annotated[
            Annotated[PlainFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
            Discriminator(fields.by_type("json_object", "json_schema", otherwise="text")),
        ]
        | None
    ) = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(fields.WireModel):
    """How much the model reasons: by `effort`, if its template supports it, and up to `max_tokens`.

    The other fields have no effect.
    """

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Annotated[str, Field(max_length=64)] | None = None
    max_tokens: Annotated[int, fields.bounded("thinking_token_budget", ge=0)] | None = None


class ConversationReference(fields.WireModel):
    """A conversation by its id."""

    id: ItemId


Input = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True), Tag("<list>")],
    Discriminator(fields.list_form),
]


class SharedFields(fields.WireModel):
    """Fields that every request of these routes may have; null always means absent."""

    input: Input | None = None
    instructions: Text | None = None
    previous_response_id: ItemId | None = None
    tools: Annotated[list[AnyTool], Field(max_length=fields.MAX_TOOLS, fail_fast=True)] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None


class PromptFields(SharedFields):
    """Fields that define the prompt."""

    model: fields.ModelName | None = None
    conversation: (
        Annotated[
            Annotated[ItemId, Tag("<id>")] | Annotated[ConversationReference, Tag("<object>")],
            Discriminator(lambda value: "<object>" if isinstance(value, (dict, ConversationReference)) else "<id>"),
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=fields.MAX_TEMPLATE_KWARGS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.previous_response_id is not None and self.conversation is not None:
            raise fields.invalid("previous_response_id", "and conversation exclude each other; give one of them")
        if not self.input and self.previous_response_id is None and self.conversation is None:
            raise fields.invalid("input", "is required: a text, or a list of items that is not empty")
        return self

    @property
    def conversation_id(self) -> str | None:
        """Id of the conversation, which a request gives as a string or in an object."""
        named = self.conversation
        return named.id if isinstance(named, ConversationReference) else named


class ResponsesRequest(PromptFields, SamplerFields):
    """A request for an answer, with tools and history: `POST /v1/responses`."""

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = REFUSED_RESPONSES_FIELDS

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    include: Annotated[list[Include], Field(max_length=32, fail_fast=True)] | None = None
    max_output_tokens: MaxTokens | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=10_000)] | None = None
    temperature: Annotated[float, fields.bounded("temperature", le=2)] | None = None
    top_logprobs: Logprobs | None = None
    metadata: Metadata | None = None

    # vLLM's extra fields
    repetition_penalty: Annotated[float, fields.bounded("repetition_penalty")] | None = None
    cache_salt: fields.CacheSalt | None = None
    priority: fields.Priority | None = None
    return_draft_counts: bool | None = None

    # llama.cpp's extra fields
    timings_per_token: bool | None = None
    return_progress: bool | None = None

    # ADVISORY_RESPONSES_FIELDS, without effect
    user: Annotated[str, Field(max_length=fields.MAX_NAME)] | None = None
    safety_identifier: Annotated[str, Field(max_length=fields.MAX_NAME)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=fields.MAX_NAME)] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    client_metadata: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None
    background_options: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fields.invalid("stream_options", "needs stream: true")
        if self.background and self.store is False:
            said = "must not be false where background is true: the answer is fetched from the store"
            raise fields.invalid("store", said)
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer includes log-probabilities of its tokens."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def wants_encrypted(self) -> bool:
        """Whether reasoning items have `encrypted_content`, too."""
        return ENCRYPTED in (self.include or ())


class InputTokensRequest(PromptFields):
    """A request whose prompt tokens are counted: `POST /v1/responses/input_tokens`."""

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = REFUSED_COUNT_FIELDS


class CompactRequest(SharedFields):
    """A conversation to compact: `POST /v1/responses/compact`; tools, reasoning and the options have no effect."""

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = {
        "image": REFUSED_RESPONSES_FIELDS["image"],
        "stream": fields.Refusal("a compaction cannot be streamed", (False,)),
    }

    model: fields.ModelName
    # without effect, as in other requests
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None

    @model_validator(mode="after")
    def _has_something(self) -> Self:
        if not self.input and self.previous_response_id is None:
            raise fields.invalid("input", "is required, or previous_response_id: there is nothing to compact")
        return self


def parse_responses_request(body: bytes | Mapping[str, Any] | ResponsesRequest) -> ResponsesRequest:
    """Parse and check a request from a body or an object, unless it is one already; raises `RequestError`."""
    return parse_body(ResponsesRequest, body)
