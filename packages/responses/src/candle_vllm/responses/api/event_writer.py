# SPDX-License-Identifier: MIT
"""EventWriter: converts the events of a conversation to the events of a streamed response.

The final response is made of the items that the events have sent, so whole and streamed answers cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.openai.chat_answers import RunningTimings, wire_progress
from candle_vllm.openai.errors import ErrorBody
from candle_vllm.openai.events import Progress, Usage
from candle_vllm.responses.api.item_writers import OutputLog
from candle_vllm.responses.api.tool_plan import ToolPlan
from candle_vllm.responses.api.turn_items import MAX_SHOWN, TurnItems
from candle_vllm.responses.conversation import events as said
from candle_vllm.responses.conversation.options import ConversationUsage
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.response import (
    IncompleteDetails,
    InputTokensDetails,
    ListedTool,
    McpListToolsOut,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseUsage,
)
from candle_vllm.responses.store.entries import new_id
from candle_vllm.responses.tools.tool import ToolDefinition

_LAST = {"completed": wire.ResponseCompleted, "incomplete": wire.ResponseIncomplete}


class EventWriter:
    """Writes the events of one response; must be given every event of the conversation.

    Args:
        response: initial response, in progress or queued, without output.
        plan: the tools; if they are not known yet, `resume` gets them.
        encoded: whether reasoning items have `encrypted_content`, too.
        tells_drafts: whether the usage reports the counts of draft tokens.
        room: maximum bytes of the images in the output items.
        clock: returns seconds since 1970.
    """

    def __init__(
        self,
        response: Response,
        plan: ToolPlan | None = None,
        *,
        encoded: bool = False,
        tells_drafts: bool = False,
        room: int = MAX_SHOWN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.response = response  # with the output so far
        self.concluded = False  # whether the last event has been written
        self._encoded, self._tells_drafts, self._room = encoded, tells_drafts, room
        self._clock = clock
        self._log = OutputLog()
        self._items = TurnItems(self._log, plan or ToolPlan(), encoded=encoded, room=room)
        self._usage = ConversationUsage()
        self._running = RunningTimings()

    def start(self) -> list[wire.StreamEvent]:
        """Return the first events; for a queued response, the next event comes from `resume`."""
        self._log.emit(wire.ResponseCreated, response=self.response)
        queued = self.response.status == "queued"
        self._log.emit(wire.ResponseQueued if queued else wire.ResponseInProgress, response=self.response)
        return self._log.take()

    def resume(self, plan: ToolPlan | None = None) -> list[wire.StreamEvent]:
        """Record that work has begun, with these tools, and return the events."""
        if plan is not None:
            self._items = TurnItems(self._log, plan, encoded=self._encoded, room=self._room)
        if self.response.status == "queued":
            self.response = replace(self.response, status="in_progress")
            self._log.emit(wire.ResponseInProgress, response=self.response)
        return self._log.take()

    def list_server(self, label: str, offered: list[ToolDefinition], error: str | None) -> list[wire.StreamEvent]:
        """Return the events that list the tools of an MCP server, or say why they cannot be listed."""
        begun = McpListToolsOut(id=new_id("mcpl"), server_label=label, tools=(), status="in_progress")
        status = "failed" if error else "completed"
        ended = replace(begun, tools=tuple(map(_listed, offered)), error=error, status=status)
        outcome = wire.McpListToolsFailed if error else wire.McpListToolsCompleted
        self._log.add(begun, ended, wire.McpListToolsInProgress, outcome, item_id=begun.id)
        return self._log.take()

    def add(self, event: said.Event) -> list[wire.StreamEvent]:
        """Return the events for one event of the conversation; after the last, `conclude` returns the final event."""
        items = self._items
        match event:
            case said.TextDelta():
                items.text(event.text, event.logprobs)
            case said.ReasoningDelta():
                items.thoughts(event.text)
            case said.CallStarted():
                items.begin_call(event.call_id, event.name)
            case said.CallArgumentsDelta():
                items.arguments(event.call_id, event.delta)
            case said.TurnStarted():
                items.begin_turn()
            case said.TurnMeasured(counts=Progress() as counts):
                self._log.emit(wire.ResponseInProgress, response=self.response, prompt_progress=wire_progress(counts))
            case said.TurnMeasured(counts=Usage() as counts):
                self._log.timings = self._running.of(counts)
            case said.TurnFinished():
                self._usage += event.usage
                items.end_turn(cut=event.finish_reason.cut)
            case said.ApprovalRequested():
                items.ask(event.call)
            case said.ToolStarted():
                items.run(event.call)
            case said.ToolFinished():
                items.ran(event.result, event.shown)
            case said.ToolProgressed() | said.ResultsShortened():
                pass  # the specification has no event for them
            case said.ConversationFinished():
                self._usage = event.result.usage
                reason = event.result.stop_reason
                if isinstance(reason, FinishReason):
                    self._end(reason.responses or None)
                else:
                    self._end(None if reason in ("client_tools", "approval") else reason)
        return self._log.take()

    def cut(self, reason: str) -> list[wire.StreamEvent]:
        """End a response that reached one of its limits between two turns; `conclude` returns its last event."""
        self._end(reason)
        return self._log.take()

    def conclude(self) -> list[wire.StreamEvent]:
        """Return the last event of a response that has ended."""
        self.concluded = True
        self._log.emit(_LAST[self.response.status], response=self.response)
        return self._log.take()

    def fail(self, error: ErrorBody, code: str) -> list[wire.StreamEvent]:
        """End a response that failed; unfinished items become incomplete.

        `error` is as in the envelope of a failed request; `code` is the error code of the response object.
        """
        self.concluded = True
        self._items.close("incomplete")
        self._log.emit(wire.ErrorOccurred, error=error, code=error.code, message=error.message, param=error.param)
        failure = ResponseError(code=code, message=error.message)
        self.response = replace(self._ended("failed"), error=failure, incomplete_details=None, usage=None)
        self._log.emit(wire.ResponseFailed, response=self.response)
        return self._log.take()

    def _end(self, reason: str | None) -> None:
        status = "completed" if reason is None else "incomplete"
        self._items.close(status)
        details = None if reason is None else IncompleteDetails(reason=reason)
        self.response = replace(self._ended(status), incomplete_details=details)

    def _ended(self, status: str) -> Response:
        usage = self._usage
        drafts: dict[str, int] = {}
        if self._tells_drafts:
            drafts = {"draft_tokens": usage.draft_tokens, "accepted_draft_tokens": usage.accepted_draft_tokens}
        return replace(
            self.response,
            status=status,
            completed_at=int(self._clock()) if status == "completed" else None,
            output=self._log.items,
            usage=ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens, **drafts),
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
            ),
        )


def _listed(definition: ToolDefinition) -> ListedTool:
    return ListedTool(
        name=definition.original_name or definition.name,
        description=definition.description,
        input_schema=dict(definition.parameters),
        annotations={"read_only": True} if definition.read_only else None,
    )
