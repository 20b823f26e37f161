# SPDX-License-Identifier: MIT
"""Wire types of Anthropic's requests; step 2 of a request's life parses and validates a body as one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from candle_vllm.core.sampling import params as caps
from candle_vllm.openai.anthropic.blocks import CacheControl, SystemContent, one_of
from candle_vllm.openai.anthropic.messages import AssistantMessage, Message, check_history
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol.fields import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Name,
    Refusal,
    WireModel,
    bounded,
    by_type,
    invalid,
    spelled,
    unsupported,
)
from candle_vllm.openai.protocol.generation import MaxTokens, Text
from candle_vllm.openai.protocol.tools import ArgumentsSchema, Schema, check_tools

MAX_TOOL_NAME = 128  # characters of a tool's name; Anthropic's limit
_SEARCH = re.compile(r"tool_search_tool_[a-z0-9_]+")
ToolName = Annotated[
    str,
    spelled(
        rf"[a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME}}}",
        f"must be 1 to {MAX_TOOL_NAME} of the characters a-z, A-Z, 0-9, _ and -, not {{!r:.150}}",
    ),
]


class Tool(WireModel):
    """A tool that the client runs.

    `defer_loading` has no effect: every tool is in the prompt from the start, so the beginning of the prompt stays the
    same for the prefix cache. `eager_input_streaming` has no effect either: the input is always streamed.
    """

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: ArgumentsSchema
    strict: bool | None = None
    cache_control: CacheControl | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "allowed_callers": Refusal("only the model itself calls tools", (["direct"],)),
        "input_examples": Refusal("put examples into the description", ([],)),
        "parameters": Refusal("it is OpenAI's; use input_schema"),
        "function": Refusal("it is OpenAI's; name, description and input_schema stand in the tool itself"),
    }

    def shown(self) -> dict[str, Any]:
        """Return the tool in the form that chat templates expect."""
        given = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


class SearchTool(WireModel):
    """Anthropic's search among deferred tools; ignored, because every tool is in the prompt from the start."""

    type: str
    name: Name
    cache_control: CacheControl | None = None


def _is_search(value: Any) -> bool:
    kind = value.get("type") if isinstance(value, dict) else None
    return isinstance(kind, str) and _SEARCH.fullmatch(kind) is not None


def _run_by_the_client(value: Any) -> Any:
    """Refuse, with a hint, tools that Anthropic executes or whose schema it defines."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom" and not _is_search(value):
        if kind == "function":
            raise unsupported("type", "'function' is OpenAI's; leave it out, and put name and input_schema here")
        raise unsupported("type", f"{kind!r:.60} is a tool of Anthropic's own; define one with name and input_schema")
    return value


# Tags in angle brackets are omitted from the paths in error messages.
AnyTool = Annotated[
    Annotated[Tool, Tag("<tool>")] | Annotated[SearchTool, Tag("<search>")],
    Discriminator(lambda value: "<search>" if _is_search(value) or isinstance(value, SearchTool) else "<tool>"),
    BeforeValidator(_run_by_the_client),
]


class AutoChoice(WireModel):
    """The model decides whether to call tools (`auto`), or must call one (`any`)."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class ToolNameChoice(WireModel):
    """The model must make exactly one call, of the named tool."""

    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class NoneChoice(WireModel):
    """The model must not call tools; they are not in the prompt either."""

    type: Literal["none"]


ToolChoice = Annotated[
    Annotated[AutoChoice, Tag("<auto>")]
    | Annotated[ToolNameChoice, Tag("<tool>")]
    | Annotated[NoneChoice, Tag("<none>")],
    Discriminator(by_type("tool", "none", otherwise="auto")),
    BeforeValidator(one_of(("auto", "any", "tool", "none"))),
]


# Fields that are validated but have no effect, and why.
ADVISORY_MESSAGES_FIELDS: Mapping[str, str] = {
    "metadata": "names the caller's user; the server keeps no per-user state",
    "service_tier": "chooses a service tier; there is only one",
    "speed": "chooses a speed; there is only one",
    "cache_control": "sets cache breakpoints; every full block of every prompt is cached",
    "context_management": "removes old parts of the prompt; the model gets the prompt as it was sent",
    "diagnostics": "asks why the cache was missed; usage has the number of cached tokens",
    "inference_geo": "chooses a region; there is only one",
    "user_profile_id": "names the caller's user; the server keeps no per-user state",
    "workspace_id": "names the caller's workspace; the server has none",
}

_HOSTED = "it belongs to Anthropic's own service"

REFUSED_PROMPT_FIELDS: Mapping[str, Refusal] = {
    "mcp_servers": Refusal("the server runs no tools; the client does", ([],)),
    "compaction": Refusal("prompts are never cut"),
    "billing_policy": Refusal(_HOSTED),
    "output_format": Refusal("use output_config with format"),
    "response_format": Refusal("it is OpenAI's; use output_config with format"),
    "functions": Refusal("it is OpenAI's; use tools", ([],)),
    "prompt": Refusal("it belongs to an older API; use messages"),
    "max_completion_tokens": Refusal("it is OpenAI's; use max_tokens"),
    "max_tokens_to_sample": Refusal("it belongs to an older API; use max_tokens"),
    "stop": Refusal("it is OpenAI's; use stop_sequences"),
    "n": Refusal("there is one answer", (1,)),
    "parallel_tool_calls": Refusal("it is OpenAI's; use disable_parallel_tool_use in tool_choice"),
    "reasoning_effort": Refusal("it is OpenAI's; use thinking"),
}

REFUSED_MESSAGES_FIELDS: Mapping[str, Refusal] = {
    **REFUSED_PROMPT_FIELDS,
    "container": Refusal("the server has no containers"),
    "thread": Refusal("the server keeps no conversations"),
    "fallbacks": Refusal("one model is served", ([],)),
    "fallback_credit_token": Refusal(_HOSTED),
}

REFUSED_COUNT_FIELDS: Mapping[str, Refusal] = {
    **REFUSED_PROMPT_FIELDS,
    **dict.fromkeys(
        ("max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "metadata", "service_tier"),
        Refusal("counting generates nothing"),
    ),
}


MIN_BUDGET = 1024  # Anthropic's minimum for `budget_tokens`

_Display = Literal["summarized", "omitted", "updates"]


class ThinkingOn(WireModel):
    """Thinking is on (`enabled`), or the model decides (`adaptive`). Chat templates have one switch for both.

    Attributes:
        budget_tokens: maximum number of thinking tokens; after that thinking is ended and the answer follows.
        display: `omitted` leaves the text of the thinking out of the answer; otherwise it is streamed.
        block_binding: no effect, because it applies to signatures, which are not checked.
    """

    type: Literal["enabled", "adaptive"]
    budget_tokens: Annotated[int, bounded("max_tokens", ge=MIN_BUDGET)] | None = None
    display: _Display | None = None
    block_binding: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _budget_of_its_kind(self) -> Self:
        if self.type == "enabled" and self.budget_tokens is None:
            raise invalid("budget_tokens", "is required where the type is 'enabled'")
        if self.type == "adaptive" and self.budget_tokens is not None:
            raise invalid("budget_tokens", "belongs to the type 'enabled'")
        return self


class ThinkingOff(WireModel):
    """Thinking is off. If a model cannot turn it off, its thinking is left out of the answer."""

    type: Literal["disabled"]


# Tags in angle brackets are omitted from the paths in error messages.
Thinking = Annotated[
    Annotated[ThinkingOn, Tag("<on>")] | Annotated[ThinkingOff, Tag("<disabled>")],
    Discriminator(by_type("disabled", otherwise="on")),
    BeforeValidator(one_of(("enabled", "adaptive", "disabled"))),
]


class JsonFormat(WireModel):
    """The answer is JSON that follows a schema; the schema is not in the prompt."""

    type: Literal["json_schema"]
    json_schema: Schema = Field(alias="schema")


class OutputConfig(WireModel):
    """Format of the answer. `effort` has no effect, because chat templates accept different efforts."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "task_budget": Refusal("task budgets are not supported; use max_tokens", idle=True)
    }


class Metadata(WireModel):
    """The caller's user; no effect."""

    user_id: str | None = None


class PromptRequest(WireModel):
    """Fields that set the prompt, common to `MessagesRequest` and `CountTokensRequest`. None means absent."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: SystemContent | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # These fields have no effect (ADVISORY_MESSAGES_FIELDS).
    cache_control: CacheControl | None = None
    context_management: dict[str, Any] | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    @field_validator("tools")
    @classmethod
    def _tools_fit(cls, tools: list[AnyTool] | None) -> list[AnyTool] | None:
        named = ((place, tool) for place, tool in enumerate(tools or ()) if isinstance(tool, Tool))
        check_tools(((f"{place}.name", tool.name, tool.shown()) for place, tool in named), "input_schema")
        return tools

    @model_validator(mode="after")
    def _history_fits(self) -> Self:
        check_history(self.messages)
        last = self.messages[-1]
        if isinstance(last, AssistantMessage) and last.content:
            end = last.content if isinstance(last.content, str) else getattr(last.content[-1], "text", "")
            if end and end[-1].isspace():
                place = f"messages.{len(self.messages) - 1}.content"
                raise invalid(place, "is the beginning of the answer and must not end with white space")
        return self


class MessagesRequest(PromptRequest):
    """Body of `POST /v1/messages`: a conversation to continue."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = REFUSED_MESSAGES_FIELDS

    max_tokens: MaxTokens
    stream: bool | None = None
    stop_sequences: Annotated[list[Text], Field(max_length=caps.MAX_STOP_STRINGS, fail_fast=True)] | None = None
    temperature: Annotated[float, bounded("temperature", le=1)] | None = None
    top_p: Annotated[float, bounded("top_p")] | None = None
    top_k: Annotated[int, bounded("top_k", ge=0)] | None = None

    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None

    @model_validator(mode="after")
    def _budget_fits(self) -> Self:
        budget = getattr(self.thinking, "budget_tokens", None)
        if budget is not None and budget >= self.max_tokens:
            raise invalid("thinking.budget_tokens", f"must be less than max_tokens, which is {self.max_tokens}")
        return self


class CountTokensRequest(PromptRequest):
    """Body of `POST /v1/messages/count_tokens`: a conversation whose tokens are counted."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = REFUSED_COUNT_FIELDS


parse_messages_request = partial(parse_body, MessagesRequest)
parse_count_tokens_request = partial(parse_body, CountTokensRequest)
"""Parsers of a body or an object, unless it is a request already; they raise `RequestError`."""
