"""EventWriter: what happens in a conversation -> the events of a streamed response.

There is one path: the response at the end is made of the items that the events have told, so whole and streamed
answers cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from msgspec.structs import replace

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.responses.api.item_writers import (
    CallWriter,
    CustomWriter,
    FunctionWriter,
    ItemWriter,
    McpCallWriter,
    MessageWriter,
    ReasoningWriter,
    new_id,
)
from candle_vllm.responses.api.mcp_source import OpenServer
from candle_vllm.responses.api.tool_plan import ToolPlan
from candle_vllm.responses.conversation import events as said
from candle_vllm.responses.conversation.options import ConversationUsage, StopReason
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.output import (
    ListedTool,
    McpApprovalRequestOut,
    McpListToolsOut,
    OutputItem,
)
from candle_vllm.responses.protocol.response import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseUsage,
)
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition, ToolResult

_Writer = TypeVar("_Writer", bound=ItemWriter)

_REASONS: Mapping[StopReason, str] = {"length": "max_output_tokens"}
_ENDED: frozenset[StopReason] = frozenset({"stop", "client_tools", "approval"})


class EventWriter:
    """Writes the events of one response; feed it every event of the conversation.

    Args:
        response: as it begins, in progress and without output.
        plan: the tools.
        encoded: thoughts come in the form that is sent back, too.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        response: Response,
        plan: ToolPlan | None = None,
        *,
        encoded: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.response = response
        self._plan = plan or ToolPlan()
        self._encoded = encoded
        self._clock = clock
        self._number = 0
        self._new: list[wire.StreamEvent] = []
        self._output: list[OutputItem | ItemWriter] = []
        self._open: MessageWriter | ReasoningWriter | None = None
        self._calls: dict[str, CallWriter] = {}  # by the id of the call; those that are not done
        self._told: set[str] = set()  # ids of calls that have an item
        self._current: CallWriter | None = None  # the call whose arguments come now
        self._space: list[tuple[str, tuple[ChatTokenLogprob, ...]]] = []  # white space that may begin a message
        self._said_this_turn = False
        self._usage = ConversationUsage()

    def start(self) -> list[wire.StreamEvent]:
        """The first events; for a response that is queued, `resume` has the next."""
        self._emit(wire.ResponseCreated, response=self.response)
        if self.response.status == "queued":
            self._emit(wire.ResponseQueued, response=self.response)
        else:
            self._emit(wire.ResponseInProgress, response=self.response)
        return self._taken()

    def resume(self) -> list[wire.StreamEvent]:
        """Work has begun on a response that was queued."""
        if self.response.status == "queued":
            self.response = replace(self.response, status="in_progress")
            self._emit(wire.ResponseInProgress, response=self.response)
        return self._taken()

    def list_server(self, server: OpenServer, offered: list[ToolDefinition]) -> list[wire.StreamEvent]:
        """The tools of an MCP server, or why there are none."""
        place = {"item_id": new_id("mcpl"), "output_index": len(self._output)}
        listed = McpListToolsOut(id=place["item_id"], server_label=server.label, tools=(), status="in_progress")
        self._emit(wire.OutputItemAdded, output_index=place["output_index"], item=listed)
        self._emit(wire.McpListToolsInProgress, **place)
        listed = replace(
            listed,
            tools=tuple(map(_listed, offered)),
            error=server.error,
            status="failed" if server.error else "completed",
        )
        self._emit(wire.McpListToolsFailed if server.error else wire.McpListToolsCompleted, **place)
        self._emit(wire.OutputItemDone, output_index=place["output_index"], item=listed)
        self._output.append(listed)
        return self._taken()

    def add(self, event: said.Event) -> list[wire.StreamEvent]:
        """The events that one of the conversation makes."""
        if isinstance(event, said.TextDelta):
            self._text(event.text, event.logprobs)
        elif isinstance(event, said.ReasoningDelta):
            self._thoughts(event.text)
        elif isinstance(event, said.CallStarted):
            self._begin_call(event.call_id, event.name)
        elif isinstance(event, said.CallArgumentsDelta):
            self._more_arguments(event.call_id, event.delta)
        elif isinstance(event, said.TurnStarted):
            self._said_this_turn = False
        elif isinstance(event, said.TurnFinished):
            self._end_turn(event)
        elif isinstance(event, said.ApprovalRequested):
            self._ask(event.call)
        elif isinstance(event, said.ToolStarted):
            self._run(event.call)
        elif isinstance(event, said.ToolFinished):
            self._ran(event.result)
        elif isinstance(event, said.ConversationFinished):
            result = event.result
            self._usage = result.usage
            reason = None if result.stop_reason in _ENDED else _REASONS.get(result.stop_reason, result.stop_reason)
            self._finish(reason)
        return self._taken()

    def cut(self, reason: str) -> list[wire.StreamEvent]:
        """Ends a response that met a limit of its own between two turns."""
        self._finish(reason)
        return self._taken()

    def withdraw(self, last: wire.StreamEvent) -> None:
        """Takes back the last event, which nobody has seen: the response fails at its very end."""
        assert last.sequence_number == self._number - 1
        self._number -= 1

    def fail(self, error: wire.ErrorDetail, code: str) -> list[wire.StreamEvent]:
        """Ends a response that failed: what has begun is incomplete.

        Args:
            error: as in the envelope of a failed request.
            code: what the response says.
        """
        self._close_all("incomplete")
        self._emit(wire.ErrorOccurred, error=error, code=error.code, message=error.message, param=error.param)
        self.response = replace(
            self._ended("failed"), error=ResponseError(code=code, message=error.message), incomplete_details=None
        )
        self._emit(wire.ResponseFailed, response=self.response)
        return self._taken()

    # ---- what the model says -----------------------------------------------------------------------------------------

    def _text(self, text: str, logprobs: tuple[Any, ...]) -> None:
        if isinstance(self._open, MessageWriter):
            self._open.add(text, logprobs)
            return
        self._space.append((text, logprobs))
        if text.strip():  # white space alone stands between thoughts and calls
            self._flush()

    def _flush(self) -> None:
        self._end_open()
        self._end_current()
        writer = self._place(MessageWriter(self._emit, len(self._output)))
        self._open, self._space, held = writer, [], self._space
        for text, logprobs in held:
            writer.add(text, logprobs)

    def _thoughts(self, text: str) -> None:
        writer = self._open
        if not isinstance(writer, ReasoningWriter):
            self._end_open()
            self._end_current()
            self._space = []
            writer = self._place(ReasoningWriter(self._emit, len(self._output), encoded=self._encoded))
            self._open = writer
        writer.add(text)

    def _begin_call(self, call_id: str, name: str) -> None:
        self._end_open()
        self._end_current()
        self._space = []
        tool = self._plan.by_name.get(name)
        self._said_this_turn = True
        if tool is None or self._plan.needs_approval(name):
            return  # the model made it up, or it is told when somebody is asked
        if tool.kind == "mcp":
            writer: CallWriter = McpCallWriter(self._emit, len(self._output), tool.server or "", tool.name)
        else:
            kind = FunctionWriter if tool.kind == "function" else CustomWriter
            writer = kind(self._emit, len(self._output), call_id, tool.name, tool.namespace)
        self._told.add(call_id)
        self._calls[call_id] = self._current = self._place(writer)

    def _more_arguments(self, call_id: str, delta: str) -> None:
        writer = self._calls.get(call_id)
        if call_id not in self._told:
            return  # its arguments are told when somebody is asked, or never
        if writer is None or writer is not self._current:
            raise CandleVllmError("The model's answer has the arguments of several calls mixed up.")
        writer.add(delta)

    def _end_turn(self, turn: said.TurnFinished) -> None:
        self._usage += turn.usage
        cut = turn.finish_reason == "length"
        if not self._said_this_turn and not cut and self._open is None:
            self._flush()  # an answer of white space, or of nothing
        self._end_open("incomplete" if cut else "completed")
        self._end_current("incomplete" if cut else "completed")
        self._space = []

    def _end_open(self, status: str = "completed") -> None:
        if self._open is not None:
            self._done(self._open, status)
            self._open = None

    def _end_current(self, status: str = "completed") -> None:
        """Ends the call whose arguments came; one that runs here goes on until its result is there."""
        writer, self._current = self._current, None
        if isinstance(writer, McpCallWriter) and status == "completed":
            writer.end_arguments()
        elif writer is not None:
            self._done(writer, status)

    # ---- what becomes of calls ---------------------------------------------------------------------------------------

    def _ask(self, call: ToolCall) -> None:
        tool = self._plan.by_name.get(call.name)
        self._told.add(call.id)
        item = McpApprovalRequestOut(
            id=new_id("mcpr"),
            server_label=(tool.server if tool else None) or "",
            name=tool.name if tool else call.name,
            arguments=call.arguments,
        )
        place = len(self._output)
        self._emit(wire.OutputItemAdded, output_index=place, item=item)
        self._emit(wire.OutputItemDone, output_index=place, item=item)
        self._output.append(item)

    def _run(self, call: ToolCall) -> None:
        """A call runs; one that was agreed to has not been told yet."""
        tool = self._plan.by_name.get(call.name)
        if call.id in self._told or tool is None or tool.kind != "mcp":
            return
        self._told.add(call.id)
        approval = call.id if self._plan.needs_approval(call.name) else None
        writer = McpCallWriter(self._emit, len(self._output), tool.server or "", tool.name, approval)
        self._calls[call.id] = self._place(writer)
        writer.add(call.arguments)
        writer.end_arguments()

    def _ran(self, result: ToolResult) -> None:
        self._run(result.call)  # one that was not let run, such as one with wrong arguments
        writer = self._calls.get(result.call.id)
        if isinstance(writer, McpCallWriter):
            writer.finish(result)
            self._put(writer)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, reason: str | None) -> None:
        self._close_all("completed" if reason is None else "incomplete")
        if reason is None:
            self.response = self._ended("completed")
            self._emit(wire.ResponseCompleted, response=self.response)
        else:
            self.response = replace(self._ended("incomplete"), incomplete_details=IncompleteDetails(reason=reason))
            self._emit(wire.ResponseIncomplete, response=self.response)

    def _close_all(self, status: str) -> None:
        self._end_open(status)
        self._current = None
        for writer in list(self._calls.values()):
            self._done(writer, "incomplete" if isinstance(writer, McpCallWriter) else status)

    def _ended(self, status: str) -> Response:
        usage = self._usage
        return replace(
            self.response,
            status=status,
            completed_at=int(self._clock()) if status == "completed" else None,
            output=tuple(item for item in self._output if not isinstance(item, ItemWriter)),
            usage=ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
            ),
        )

    def _place(self, writer: _Writer) -> _Writer:
        """Gives a new item its place and begins it."""
        self._output.append(writer)
        self._said_this_turn = True
        writer.begin()
        return writer

    def _done(self, writer: ItemWriter, status: str) -> None:
        writer.end(status)
        self._put(writer)

    def _put(self, writer: ItemWriter) -> None:
        assert writer.final is not None
        self._output[writer.index] = writer.final
        for call_id, one in list(self._calls.items()):
            if one is writer:
                del self._calls[call_id]

    def _emit(self, kind: type[wire.StreamEvent], **fields: Any) -> None:
        self._new.append(kind(sequence_number=self._number, **fields))
        self._number += 1

    def _taken(self) -> list[wire.StreamEvent]:
        new, self._new = self._new, []
        return new


def _listed(definition: ToolDefinition) -> ListedTool:
    return ListedTool(
        name=definition.original_name or definition.name,
        description=definition.description,
        input_schema=dict(definition.parameters),
        annotations={"read_only": True} if definition.read_only else None,
    )
