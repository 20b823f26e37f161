# SPDX-License-Identifier: MIT
"""What comes of a request: the response and the items that it is made of."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.responses.protocol.items import Phase


class _Typed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An object with a `type`."""


class OutputText(_Typed, frozen=True, kw_only=True, tag="output_text"):
    """Text of an answer; `logprobs` are empty where the request did not ask for them."""

    text: str
    annotations: tuple[None, ...] = ()
    logprobs: tuple[ChatTokenLogprob, ...] = ()


class ReasoningText(_Typed, frozen=True, kw_only=True, tag="reasoning_text"):
    """Text of thoughts."""

    text: str


class MessageOut(_Typed, frozen=True, kw_only=True, tag="message"):
    """What the model said.

    Attributes:
        status: `incomplete` where it was cut.
        phase: `commentary` before and between calls, `final_answer` otherwise; absent while it is not known.
    """

    id: str
    status: str
    role: str = "assistant"
    content: tuple[OutputText, ...]
    phase: Phase | UnsetType = UNSET


class ReasoningOut(_Typed, frozen=True, kw_only=True, tag="reasoning"):
    """What the model thought.

    Attributes:
        summary: always empty; the thoughts are in `content`.
        encrypted_content: the thoughts once more, in the form that is sent back, where the request asked for it. It
            is encoded and not encrypted.
    """

    id: str
    status: str
    summary: tuple[None, ...] = ()
    content: tuple[ReasoningText, ...]
    encrypted_content: str | None = None


class FunctionCallOut(_Typed, frozen=True, kw_only=True, tag="function_call"):
    """A call that the caller is asked to make; the result refers to its `call_id`.

    Attributes:
        namespace: of the tool, where it has one.
        arguments: JSON text as the model wrote it, cut short where the answer was.
    """

    id: str
    status: str
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET


class CustomToolCallOut(_Typed, frozen=True, kw_only=True, tag="custom_tool_call"):
    """A call of a custom tool with the text for it."""

    id: str
    status: str
    call_id: str
    name: str
    input: str
    namespace: str | UnsetType = UNSET


class ListedTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of an MCP server; `annotations` are hints of the server's."""

    name: str
    description: str
    input_schema: dict[str, Any]
    annotations: dict[str, Any] | None = None


class McpListToolsOut(_Typed, frozen=True, kw_only=True, tag="mcp_list_tools"):
    """The tools of an MCP server, or why they could not be had."""

    id: str
    server_label: str
    tools: tuple[ListedTool, ...]
    error: str | None = None
    status: str


class ToolFailure(_Typed, frozen=True, kw_only=True, tag="mcp_tool_execution_error"):
    """What a tool said when it failed."""

    content: tuple[dict[str, Any], ...]


class ProtocolFailure(_Typed, frozen=True, kw_only=True, tag="mcp_protocol_error"):
    """Why a call has no output of its tool: the server could not be reached, or did not answer in time."""

    code: int
    message: str


class ShownText(_Typed, frozen=True, kw_only=True, tag="input_text"):
    """Text of a result that the model was shown."""

    text: str


class ShownImage(_Typed, frozen=True, kw_only=True, tag="input_image"):
    """An image of a result that the model was shown, as a data URL."""

    image_url: str


class McpCallOut(_Typed, frozen=True, kw_only=True, tag="mcp_call"):
    """A call that the server made on an MCP server.

    Attributes:
        status: `completed`, `failed`, or `incomplete` where it was not run.
        output: the result as text; null where it failed.
        content: what the model saw of the result, where images were among that.
        approval_request_id: the request that somebody agreed to.
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


class McpApprovalRequestOut(_Typed, frozen=True, kw_only=True, tag="mcp_approval_request"):
    """A call that waits for agreement: send an `mcp_approval_response` with its id."""

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
    """Where the prompt's tokens came from; writing to the prefix cache is not counted."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What the output's tokens were: `reasoning_tokens` are thoughts, with the marks around them.

    The other two are there where `return_draft_counts` asked for them: draft tokens that were tried, and tokens of
    the output that came of them.
    """

    reasoning_tokens: int
    draft_tokens: int | UnsetType = UNSET
    accepted_draft_tokens: int | UnsetType = UNSET


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all turns of the model together."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class CompactedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation made shorter.

    Attributes:
        output: what users said, and an item of type `compaction` with a summary; the input of what follows.
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
