"""The response object."""

from __future__ import annotations

from typing import Any

import msgspec

from candle_vllm.responses.protocol.output import OutputItem


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompt's tokens came from; writing to the prefix cache is not counted."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What the output's tokens were: `reasoning_tokens` are thoughts, with the marks around them."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all turns of the model together."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response is incomplete.

    Attributes:
        reason: `max_output_tokens` (also the end of the context), `max_tool_calls`, `max_turns`, `timeout` or `loop`.
    """

    reason: str


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class ConversationOut(msgspec.Struct, frozen=True, kw_only=True):
    """The conversation that a response belongs to."""

    id: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a request; every field is always there.

    Attributes:
        created_at, completed_at: Unix seconds.
        status: `queued`, `in_progress`, `completed`, `incomplete`, `failed` or `cancelled`.
        tools: those that the model was shown; tools of others are not among them. Headers and tokens are left out.
        temperature, top_p, presence_penalty, frequency_penalty: as used.
        store: whether it is kept.
    """

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    incomplete_details: IncompleteDetails | None = None
    error: ResponseError | None = None
    model: str
    previous_response_id: str | None
    conversation: ConversationOut | None
    instructions: str | None
    output: tuple[OutputItem, ...] = ()
    tools: tuple[dict[str, Any], ...]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    max_tool_calls: int | None
    max_output_tokens: int | None
    truncation: str
    text: dict[str, Any]
    reasoning: dict[str, Any] | None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    usage: ResponseUsage | None = None
    store: bool
    background: bool
    service_tier: str = "default"
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None
    user: str | None


class ResponseDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A response that is gone."""

    id: str
    object: str = "response"
    deleted: bool = True


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens the prompt of a request has."""

    input_tokens: int
    object: str = "response.input_tokens"
