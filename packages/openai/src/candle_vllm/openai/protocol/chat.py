"""Wire types of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, field_validator, model_validator

from candle_vllm.openai.protocol.fields import MAX_DOCUMENTS, MAX_MESSAGES, MAX_TEMPLATE_KWARGS, invalid, unsupported
from candle_vllm.openai.protocol.generation import GenerationFields, Logprobs, MaxTokens
from candle_vllm.openai.protocol.messages import AssistantMessage, Message, check_history
from candle_vllm.openai.protocol.usage import Usage

# Arguments of the template call, which `chat_template_kwargs` must not shadow.
_TEMPLATE_ARGUMENTS = frozenset({
    "self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "tokenize", "template", "conversation",
})  # fmt: skip


def _text_format(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema", "grammar", "structural_tag"):
        raise unsupported("type", "structured output is not implemented yet; only 'text' is")
    if value is not None and value != {"type": "text"}:
        raise invalid("", 'must be {"type": "text"}')
    return value


def _text_modality(value: Any) -> Any:
    if value is not None and value != ["text"]:
        raise unsupported("", 'the server makes text only, so it can only be ["text"]')
    return value


class ChatCompletionRequest(GenerationFields):
    """A conversation to continue.

    `max_completion_tokens` and `max_tokens` are two names of one limit, `thinking` and `enable_thinking` of one
    template switch. None of either limit means: up to the model's context.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    response_format: Annotated[dict[str, str] | None, BeforeValidator(_text_format)] = None
    modalities: Annotated[list[str] | None, BeforeValidator(_text_modality)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_names(cls, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        if kwargs is not None and len(kwargs) > MAX_TEMPLATE_KWARGS:
            raise invalid("", f"must have at most {MAX_TEMPLATE_KWARGS} entries, not {len(kwargs)}")
        for name in kwargs or ():
            if not name.isidentifier() or len(name) > 64:
                raise invalid("", f"names template variables; {name!r:.70} cannot be one")
            if name in _TEMPLATE_ARGUMENTS:
                raise invalid(name, "cannot be set here; it is a part of every call of the template")
        return kwargs

    @model_validator(mode="after")
    def _chat_rules(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("max_tokens", "is the older name of max_completion_tokens; give one, or both alike")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid("continue_final_message", "and add_generation_prompt exclude each other")
        if self.echo and not isinstance(self.messages[-1], AssistantMessage):
            raise invalid("echo", "repeats a last message of role assistant, and there is none")
        check_history(self.messages)
        self.template_kwargs()
        return self

    def template_kwargs(self) -> dict[str, Any]:
        """The template's variables: `chat_template_kwargs` and the fields that are variables too.

        Templates know the thinking switch under two names, so both are set; effort "none" turns it off as well,
        for templates that know the switch only. Raises where two of these contradict each other.
        """
        kwargs = dict(self.chat_template_kwargs or {})
        for field in ("thinking", "enable_thinking"):
            switch = getattr(self, field)
            if switch is not None:
                _agree(kwargs, field, "thinking", switch)
                _agree(kwargs, field, "enable_thinking", switch)
        if self.reasoning_effort is not None:
            _agree(kwargs, "reasoning_effort", "reasoning_effort", self.reasoning_effort)
        if self.reasoning_effort == "none":
            _agree(kwargs, "reasoning_effort", "thinking", False)
            _agree(kwargs, "reasoning_effort", "enable_thinking", False)
        return kwargs


def _agree(kwargs: dict[str, Any], field: str, name: str, value: Any) -> None:
    if kwargs.setdefault(name, value) != value:
        raise invalid(field, f"contradicts another setting of the template variable {name!r}")


class TopLogprob(msgspec.Struct, frozen=True):
    """A likely token at one position."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """The token at one position and the likeliest ones there; log-probabilities are natural, at least -9999."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a choice, or of one chunk of it."""

    content: tuple[ChatTokenLogprob, ...]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `n` answers.

    `stop_reason` is the stop string or token id that ended it, null for the model's own end; `token_ids` are there
    when `return_token_ids` asked for them.
    """

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET


PromptLogprobs = tuple["dict[str, PromptLogprob] | None", ...]


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's form of a prompt token's log-probability; keyed by the token id."""

    logprob: float
    rank: int
    decoded_token: str


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer to a chat request."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in one choice; the role stands in the first delta only."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The news of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET


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
