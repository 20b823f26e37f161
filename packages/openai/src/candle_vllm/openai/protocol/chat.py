# SPDX-License-Identifier: MIT
"""Wire types of `/v1/chat/completions`: requests, answers and chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator
from pydantic_core import CoreSchema

from candle_vllm.openai.json_body import Tagged
from candle_vllm.openai.protocol.fields import MAX_PARTS, MAX_TOOLS, WireModel, invalid, list_form, unsupported
from candle_vllm.openai.protocol.generation import GenerationFields, Logprobs, MaxTokens
from candle_vllm.openai.protocol.messages import AssistantMessage, Messages, check_history
from candle_vllm.openai.protocol.templating import TemplateFields
from candle_vllm.openai.protocol.tools import (
    AnyTool,
    ToolChoice,
    check_chat_tools,
    custom_names,
    tool_use,
)
from candle_vllm.openai.protocol.usage import PromptProgress, ShownPrompt, Timings, Usage
from candle_vllm.openai.task import ToolUse


def _conversation(value: Any) -> Any:
    """Convert a plain text to one user message; the Rust candle-vllm accepts a text as `messages`."""
    return [{"role": "user", "content": value}] if isinstance(value, str) and value else value


class _OrText:
    """Adds the plain text that `_conversation` accepts to the JSON schema."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}


def _text_modality(value: Any) -> Any:
    if value is not None and value != ["text"]:
        raise unsupported("", 'the server generates text only, so it can only be ["text"]')
    return value


Label = Annotated[str, Field(min_length=1, max_length=256)]


class PredictionPart(WireModel):
    """A text part of a predicted answer."""

    type: Literal["text"]
    text: str


class Prediction(WireModel):
    """Text that is expected to make up most of the answer. It provides draft tokens and does not change the output."""

    type: Literal["content"]
    content: Annotated[
        Annotated[str, Tag("<string>")]
        | Annotated[list[PredictionPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
        Discriminator(list_form),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(TemplateFields, GenerationFields):
    """A conversation to continue.

    `max_completion_tokens` and `max_tokens` name one limit; without both, the default or the context is the limit.
    `include_reasoning: false` leaves the reasoning out of the answer; it is still generated and counted. With a
    `prediction`, usage counts the predicted tokens that are part of the answer. With `timings_per_token`, an answer and
    every chunk except a choice's first have llama.cpp's `timings`, measured by the engine only in the last chunk. With
    `verbose`, an answer, or a stream's first chunk, has the rendered prompt in `__verbose`.
    `conversation_id` and `resource_id` are the client's labels, which the answer, or a stream's first chunk, repeats.
    """

    messages: Annotated[Messages, BeforeValidator(_conversation), _OrText()]
    conversation_id: Label | None = None
    resource_id: Label | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    modalities: Annotated[list[str], Field(fail_fast=True), BeforeValidator(_text_modality)] | None = None
    tools: (
        Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(check_chat_tools)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    prediction: Prediction | None = None
    timings_per_token: bool | None = None
    verbose: bool | None = None

    @model_validator(mode="after")
    def _chat_rules(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid(
                "max_tokens", "is the older name of max_completion_tokens; give only one of them, or the same value"
            )
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid("continue_final_message", "and add_generation_prompt exclude each other")
        if self.echo and not isinstance(self.messages[-1], AssistantMessage):
            raise invalid("echo", "needs a last message of role assistant, which it repeats")
        check_history(self.messages)
        self.template_kwargs()
        self.tool_use()
        return self

    @property
    def labels(self) -> dict[str, Any]:
        """The client's labels, which the answer repeats."""
        given = {"conversation_id": self.conversation_id, "resource_id": self.resource_id}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def custom_tools(self) -> frozenset[str]:
        """Names of the custom tools, whose input is text."""
        return custom_names(self.tools) if self.tools else frozenset()

    def tool_use(self) -> ToolUse:
        """Combine the request's tool fields into one `ToolUse`."""
        if self.tools:
            return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        if self.tool_choice not in (None, "none") and not (self.tool_choice == "auto" and self.tools is not None):
            raise invalid("tool_choice", "needs tools: there is nothing to choose from")
        return ToolUse()


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """The token at a position, and the likeliest tokens there; natural log-probabilities, at least -9999."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the tokens of a choice, or of one chunk of it."""

    content: tuple[ChatTokenLogprob, ...]
    refusal: None = None


class FunctionCallOut(msgspec.Struct, frozen=True):
    """The called function; `arguments` is JSON text as the model wrote it, incomplete if the answer was truncated."""

    name: str
    arguments: str


class ToolCallOut(Tagged, frozen=True, kw_only=True, tag="function"):
    """A call that the model generated; the result refers to its `id`."""

    id: str
    function: FunctionCallOut

    @property
    def type(self) -> Literal["function"]:
        return "function"


class CustomCallOut(msgspec.Struct, frozen=True):
    """The called custom tool and its input text, incomplete if the answer was truncated."""

    name: str
    input: str


class CustomToolCallOut(Tagged, frozen=True, kw_only=True, tag="custom"):
    """A call of a custom tool; the result refers to its `id`."""

    id: str
    custom: CustomCallOut

    @property
    def type(self) -> Literal["custom"]:
        return "custom"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The message of an answer; `content` is null if it has only tool calls or reasoning.

    The reasoning has two names: `reasoning_content` (llama.cpp, DeepSeek) and `reasoning` (vLLM, OpenRouter).
    """

    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: tuple[ToolCallOut | CustomToolCallOut, ...] | UnsetType = UNSET


class ServerToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the server executed itself; its result was shown only to the model.

    Attributes:
        server: the MCP server that provides the tool; null if no such tool exists.
        name: the tool name that the model called.
        arguments: JSON text as the model wrote it.
        status: completed, failed, timed_out, unavailable, unknown, invalid_arguments, denied, or not_run.
        seconds: duration of the call.
    """

    server: str | None
    name: str
    arguments: str
    status: str
    seconds: float


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `n` answers.

    `stop_reason` is the stop string or token id that ended the answer, null for the model's end-of-sequence token.
    `token_ids` are present if `return_token_ids` requested them, `mcp_calls` if the server executed tools, and
    `mcp_limit` if a limit on tool execution ended the answer.
    """

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    mcp_calls: tuple[ServerToolCall, ...] | UnsetType = UNSET
    mcp_limit: str | UnsetType = UNSET


class PromptLogprob(msgspec.Struct, frozen=True):
    """Log-probability of a prompt token; vLLM's form has an object of these by token id for each position."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = tuple[dict[str, PromptLogprob] | None, ...]


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer to a chat request.

    Tokens and log-probabilities of the prompt are null unless the request asks for them, as in vLLM.
    """

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    conversation_id: str | UnsetType = UNSET
    resource_id: str | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    verbose: ShownPrompt | UnsetType = msgspec.field(default=UNSET, name="__verbose")


class FunctionCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Delta of a called function: its name once, then chunks of its arguments."""

    name: str | None = None
    arguments: str | None = None


class CustomCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Delta of a called custom tool: its name once, then its whole input in one chunk."""

    name: str | None = None
    input: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Delta of the call with this index; only its first delta has the id and the type."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionCallDelta | None = None
    custom: CustomCallDelta | None = None


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Delta of one choice; only the first delta has the role."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] | None = None


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Part of one choice in a chunk; the choice's last chunk has `mcp_calls` and `mcp_limit`."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    mcp_calls: tuple[ServerToolCall, ...] | UnsetType = UNSET
    mcp_limit: str | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    system_fingerprint: str
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    conversation_id: str | UnsetType = UNSET
    resource_id: str | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    verbose: ShownPrompt | UnsetType = msgspec.field(default=UNSET, name="__verbose")
