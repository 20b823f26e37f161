# SPDX-License-Identifier: MIT
"""Events of a streamed response, numbered from 0 without gaps."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from candle_vllm.openai.errors import ErrorBody
from candle_vllm.openai.json_body import Tagged
from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.openai.protocol.usage import PromptProgress, Timings
from candle_vllm.responses.protocol.response import OutputItem, OutputText, ReasoningText, Response


class StreamEvent(Tagged, frozen=True, kw_only=True):
    """An event; with `timings_per_token`, events after the first measurement have `timings`, as in llama.cpp."""

    sequence_number: int
    timings: Timings | UnsetType = UNSET

    @property
    def event_name(self) -> str:
        """Value of the `event:` field."""
        return str(self.__struct_config__.tag)


class LifecycleEvent(StreamEvent, frozen=True, kw_only=True):
    """An event with the current state of the response."""

    response: Response


class ResponseCreated(LifecycleEvent, frozen=True, kw_only=True, tag="response.created"):
    """The first event."""


class ResponseQueued(LifecycleEvent, frozen=True, kw_only=True, tag="response.queued"):
    """A background response waits to run."""


class ResponseInProgress(LifecycleEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """Work on the response has begun, or, with `prompt_progress`, a part of the prompt has been computed."""

    prompt_progress: PromptProgress | UnsetType = UNSET


class ResponseCompleted(LifecycleEvent, frozen=True, kw_only=True, tag="response.completed"):
    """The last event of a response that completed."""


class ResponseIncomplete(LifecycleEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last event of a response that reached a limit."""


class ResponseFailed(LifecycleEvent, frozen=True, kw_only=True, tag="response.failed"):
    """The last event of a response that failed."""


class _ItemEvent(StreamEvent, frozen=True, kw_only=True):
    output_index: int
    item: OutputItem


class OutputItemAdded(_ItemEvent, frozen=True, kw_only=True, tag="response.output_item.added"):
    """A new item."""


class OutputItemDone(_ItemEvent, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item that has ended; its status may be `incomplete` or `failed`."""


class _PlacedEvent(StreamEvent, frozen=True, kw_only=True):
    item_id: str
    output_index: int


class _PartEvent(_PlacedEvent, frozen=True, kw_only=True):
    content_index: int


class ContentPartAdded(_PartEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A new part, still empty."""

    part: OutputText | ReasoningText


class ContentPartDone(_PartEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part that has ended."""

    part: OutputText | ReasoningText


class OutputTextDelta(_PartEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """A delta of the text."""

    delta: str
    logprobs: tuple[ChatTokenLogprob, ...] = ()


class OutputTextDone(_PartEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The whole text of a part."""

    text: str
    logprobs: tuple[ChatTokenLogprob, ...] = ()


class ReasoningTextDelta(_PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """A delta of the reasoning."""

    delta: str


class ReasoningTextDone(_PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The whole reasoning."""

    text: str


class FunctionArgumentsDelta(_PlacedEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """A delta of a call's arguments."""

    delta: str


class FunctionArgumentsDone(_PlacedEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """The whole arguments of a call."""

    name: str
    arguments: str


class CustomInputDelta(_PlacedEvent, frozen=True, kw_only=True, tag="response.custom_tool_call_input.delta"):
    """The input of a custom tool, in a single delta; an empty input has no delta."""

    delta: str


class CustomInputDone(_PlacedEvent, frozen=True, kw_only=True, tag="response.custom_tool_call_input.done"):
    """The whole input of a custom tool."""

    input: str


class McpListToolsInProgress(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_list_tools.in_progress"):
    """The tools of a server are being listed."""


class McpListToolsCompleted(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_list_tools.completed"):
    """The server has listed its tools."""


class McpListToolsFailed(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_list_tools.failed"):
    """The tools of the server could not be listed."""


class McpCallInProgress(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_call.in_progress"):
    """A call of an MCP tool begins."""


class McpArgumentsDelta(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_call_arguments.delta"):
    """A delta of the call's arguments."""

    delta: str


class McpArgumentsDone(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_call_arguments.done"):
    """The whole arguments of the call."""

    arguments: str


class McpCallCompleted(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_call.completed"):
    """The tool has returned a result."""


class McpCallFailed(_PlacedEvent, frozen=True, kw_only=True, tag="response.mcp_call.failed"):
    """The call failed, or ended without a result."""


class ErrorOccurred(StreamEvent, frozen=True, kw_only=True, tag="error"):
    """An error; `response.failed` follows, unless the error is one of reading a background response's events.

    Attributes:
        error: the error, as in the Open Responses specification.
        code, message, param: the same error, as in OpenAI's events.
    """

    error: ErrorBody
    code: str | None
    message: str
    param: str | None


EVENTS = tuple(
    kind
    for kind in list(vars().values())
    if isinstance(kind, type) and issubclass(kind, StreamEvent) and not kind.__subclasses__()
)
"""Every kind of event, in the order above."""
