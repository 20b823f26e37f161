# SPDX-License-Identifier: MIT
"""The response to a request, and its output items."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.openai.json_body import Tagged
from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.responses.protocol.items import Phase


class OutputText(Tagged, frozen=True, kw_only=True, tag="output_text"):
    """Text of an answer; `logprobs` is empty unless the request asks for them."""

    text: str
    annotations: tuple[None, ...] = ()
    logprobs: tuple[ChatTokenLogprob, ...] = ()


class ReasoningText(Tagged, frozen=True, kw_only=True, tag="reasoning_text"):
    """Text of the reasoning."""

    text: str


class MessageOut(Tagged, frozen=True, kw_only=True, tag="message"):
    """A message of the model.

    Attributes:
        status: `in_progress`, `completed`, or `incomplete` if a limit or a failure ended it.
        phase: absent until it is known, and in a truncated message that might have preceded a call.
    """

    id: str
    status: str
    role: str = "assistant"
    content: tuple[OutputText, ...]
    phase: Phase | UnsetType = UNSET


class ReasoningOut(Tagged, frozen=True, kw_only=True, tag="reasoning"):
    """Reasoning of the model.

    Attributes:
        summary: always empty; the reasoning is in `content`.
        encrypted_content: reasoning to send back in a later request, if requested; encoded but not encrypted.
    """

    id: str
    status: str
    summary: tuple[None, ...] = ()
    content: tuple[ReasoningText, ...]
    encrypted_content: str | None = None


class FunctionCallOut(Tagged, frozen=True, kw_only=True, tag="function_call"):
    """A call that the client has to run; the client's output item refers to its `call_id`.

    Attributes:
        namespace: namespace of the tool, if it has one.
        arguments: JSON text as the model generated it; incomplete if the answer was truncated.
    """

    id: str
    status: str
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET


class CustomToolCallOut(Tagged, frozen=True, kw_only=True, tag="custom_tool_call"):
    """A call of a custom tool, with its input, that the client has to run."""

    id: str
    status: str
    call_id: str
    name: str
    input: str
    namespace: str | UnsetType = UNSET


class ListedTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of an MCP server; `annotations` is `{"read_only": true}` if the server declares that, otherwise null."""

    name: str
    description: str
    input_schema: dict[str, Any]
    annotations: dict[str, Any] | None = None


class McpListToolsOut(Tagged, frozen=True, kw_only=True, tag="mcp_list_tools"):
    """Tools of an MCP server, or why they could not be listed."""

    id: str
    server_label: str
    tools: tuple[ListedTool, ...]
    error: str | None = None
    status: str


class ToolFailure(Tagged, frozen=True, kw_only=True, tag="mcp_tool_execution_error"):
    """The error that a tool itself reported."""

    content: tuple[dict[str, Any], ...]


class ProtocolFailure(Tagged, frozen=True, kw_only=True, tag="mcp_protocol_error"):
    """Why a call has no output: for example, the server could not be reached, or did not answer in time."""

    code: int
    message: str


class ShownText(Tagged, frozen=True, kw_only=True, tag="input_text"):
    """Text of a tool's result, as the model saw it."""

    text: str


class ShownImage(Tagged, frozen=True, kw_only=True, tag="input_image"):
    """An image of a tool's result that the model saw, as a data URL."""

    image_url: str


class McpCallOut(Tagged, frozen=True, kw_only=True, tag="mcp_call"):
    """A tool call that this server made on an MCP server.

    Attributes:
        status: `in_progress`, `completed`, `failed`, or `incomplete` if the response ended before the result.
        output: result as text; null unless the call completed.
        content: the parts of the result that the model saw, if they include images and these are not too large.
        approval_request_id: id of the approval request that the client answered, if one was needed.
    """

    id: str
    status: str
    server_label: str
    name: str
    arguments: str
    output: str | None = None
    content: tuple[ShownText | ShownImage, ...] | UnsetType = UNSET
    error: ToolFailure | ProtocolFailure | None = None
    approval_request_id: str | None = None


class McpApprovalRequestOut(Tagged, frozen=True, kw_only=True, tag="mcp_approval_request"):
    """A call that waits for an approval: send an `mcp_approval_response` with its id."""

    id: str
    server_label: str
    name: str
    arguments: str
    status: str = "completed"


OutputItem = (
    MessageOut
    | ReasoningOut
    | FunctionCallOut
    | CustomToolCallOut
    | McpListToolsOut
    | McpCallOut
    | McpApprovalRequestOut
)


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Cached tokens of the prompt; writes to the prefix cache are not counted (always 0)."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Kinds of output tokens: `reasoning_tokens` counts the reasoning with the markers around it.

    With `return_draft_counts`, there are also the numbers of verified and of accepted draft tokens.
    """

    reasoning_tokens: int
    draft_tokens: int | UnsetType = UNSET
    accepted_draft_tokens: int | UnsetType = UNSET


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts, summed over all turns of the model."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class CompactedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A compacted conversation.

    Attributes:
        output: the users' messages, and an item of type `compaction` with a summary; use them as the next input.
    """

    id: str
    object: str = "response.compaction"
    created_at: int
    output: tuple[dict[str, Any], ...]
    usage: ResponseUsage


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
    """The conversation of a response."""

    id: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The response to a request; every field is always present.

    Attributes:
        created_at, completed_at: Unix seconds.
        status: `queued`, `in_progress`, `completed`, `incomplete`, `failed` or `cancelled`.
        tools: tools and MCP servers of the request, without hosted tools, headers and secrets.
        temperature, top_p, presence_penalty, frequency_penalty: values with which tokens were sampled.
        store: whether the response is stored.
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
    """A response that has been deleted."""

    id: str
    object: str = "response"
    deleted: bool = True


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Number of tokens of a request's prompt."""

    input_tokens: int
    object: str = "response.input_tokens"
