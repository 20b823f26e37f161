# SPDX-License-Identifier: MIT
"""TurnItems: output items of the model's text, reasoning and calls, and of the calls' results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from msgspec import UNSET

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.openai.task import ImagePart, Part
from candle_vllm.responses.api.item_writers import (
    CallWriter,
    CustomWriter,
    FunctionWriter,
    ItemWriter,
    McpCallWriter,
    MessageWriter,
    OutputLog,
    ReasoningWriter,
)
from candle_vllm.responses.api.tool_plan import ToolPlan
from candle_vllm.responses.protocol.items import Phase
from candle_vllm.responses.protocol.response import McpApprovalRequestOut
from candle_vllm.responses.store.entries import new_id
from candle_vllm.responses.tools.tool import ToolCall, ToolResult

MAX_SHOWN = 8 << 20  # bytes of the images of results in one response
MAX_SHOWN_OF_ITEM = 3 << 20  # bytes of the images in one item; `max_item_bytes` of a store is 4 MB by default

_Writer = TypeVar("_Writer", bound=ItemWriter)


class TurnItems:
    """The items of all turns of one response; `log` receives their events. Other arguments are as in `EventWriter`."""

    def __init__(self, log: OutputLog, plan: ToolPlan, *, encoded: bool, room: int = MAX_SHOWN) -> None:
        self._log = log
        self._plan = plan
        self._encoded = encoded
        self._room = room
        self._open: MessageWriter | ReasoningWriter | None = None
        self._calls: dict[str, CallWriter] = {}  # unfinished calls by their ids
        self._with_item: set[str] = set()  # ids of calls that have an item
        self._current: CallWriter | None = None  # the call whose arguments are being generated
        self._space: list[tuple[str, tuple[ChatTokenLogprob, ...]]] = []  # white space that may begin a message
        self._has_items_this_turn = self._called_this_turn = self._began = False
        self._may_call = bool(plan.by_name) and plan.choice.mode != "none"

    # ---- text, reasoning and calls of the model ----------------------------------------------------------------------

    def begin_turn(self) -> None:
        self._has_items_this_turn = self._called_this_turn = False
        self._began = True  # calls that were approved have ended

    def text(self, text: str, logprobs: tuple[Any, ...]) -> None:
        if isinstance(self._open, MessageWriter):
            self._open.add(text, logprobs)
            return
        if not text and isinstance(self._open, ReasoningWriter):
            return  # tokens of the reasoning, or of the mark that ends it
        self._space.append((text, logprobs))
        if text.strip():  # a message of only white space, as between reasoning and calls, is dropped
            self._begin_message()

    def thoughts(self, text: str) -> None:
        writer = self._open
        if not isinstance(writer, ReasoningWriter):
            self._name_phase("commentary")
            self._end_output()
            self._space = []
            writer = self._begin(ReasoningWriter(self._log.emit, self._log.next_place, encoded=self._encoded))
            self._open = writer
        writer.add(text)

    def begin_call(self, call_id: str, name: str) -> None:
        self._name_phase("commentary")
        self._end_output()
        self._space = []
        tool = self._plan.by_name.get(name)
        self._has_items_this_turn = self._called_this_turn = True
        if tool is None or self._plan.needs_approval(name):
            return  # the tool does not exist, or the item is written when the approval is requested
        emit, place = self._log.emit, self._log.next_place
        if tool.kind == "mcp":
            writer: CallWriter = McpCallWriter(emit, place, tool.server or "", tool.name)
        else:
            kind = FunctionWriter if tool.kind == "function" else CustomWriter
            writer = kind(emit, place, call_id, tool.name, tool.namespace)
        self._with_item.add(call_id)
        self._calls[call_id] = self._current = self._begin(writer)

    def arguments(self, call_id: str, delta: str) -> None:
        if call_id not in self._with_item:
            return  # an approval request has the arguments, too; other calls have no item
        if (writer := self._calls.get(call_id)) is None or writer is not self._current:
            raise CandleVllmError("The model's answer mixes the arguments of several calls.")
        writer.add(delta)

    def end_turn(self, *, cut: bool) -> None:
        """End the turn; `cut` tells whether a limit ended the answer."""
        if not self._has_items_this_turn and not cut and self._open is None:
            self._begin_message()  # an answer of white space, or an empty one
        if self._called_this_turn or not cut:
            self._name_phase("commentary" if self._called_this_turn else "final_answer")
        self._end_output("incomplete" if cut else "completed")
        self._space = []

    # ---- approvals and results of calls ------------------------------------------------------------------------------

    def ask(self, call: ToolCall) -> None:
        tool = self._plan.by_name.get(call.name)
        self._with_item.add(call.id)
        label, name = (tool.server or "", tool.name) if tool else ("", call.name)
        item = McpApprovalRequestOut(id=new_id("mcpr"), server_label=label, name=name, arguments=call.arguments)
        self._log.add(item, item)

    def run(self, call: ToolCall, *, approved: bool = True) -> None:
        """Add an MCP call's item if it has no item yet; with `approved`, the item names the approval of the call."""
        tool = self._plan.by_name.get(call.name)
        if call.id in self._with_item or tool is None or tool.kind != "mcp":
            return
        self._with_item.add(call.id)
        approval = call.id if approved and self._plan.needs_approval(call.name) else None
        writer = McpCallWriter(self._log.emit, self._log.next_place, tool.server or "", tool.name, approval)
        self._calls[call.id] = self._begin(writer)
        writer.add(call.arguments)
        writer.end_arguments()

    def ran(self, result: ToolResult, shown: Sequence[Part] = ()) -> None:
        """End a call with its result; its item has the images that the model sees, within the limits."""
        self.run(result.call, approved=not self._began)  # adds the item of a call that did not run
        writer = self._calls.get(result.call.id)
        if isinstance(writer, McpCallWriter):
            size = sum(len(part.source) for part in shown if isinstance(part, ImagePart))
            fits = size <= min(self._room, MAX_SHOWN_OF_ITEM)
            self._room -= size if fits else 0
            writer.finish(result, shown if fits else ())
            self._settle(writer)

    def close(self, status: str) -> None:
        """End the response and its open items; an MCP call without a result is incomplete."""
        self._end_open(status)
        self._current = None
        for writer in list(self._calls.values()):
            self._end(writer, "incomplete" if isinstance(writer, McpCallWriter) else status)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, writer: _Writer) -> _Writer:
        self._has_items_this_turn = True
        return self._log.begin(writer)

    def _begin_message(self) -> None:
        self._end_output()
        phase = UNSET if self._may_call else "final_answer"  # only the end of the message shows whether a call follows
        writer = self._begin(MessageWriter(self._log.emit, self._log.next_place, phase))
        self._open, self._space, held = writer, [], self._space
        for text, logprobs in held:
            writer.add(text, logprobs)

    def _name_phase(self, phase: Phase) -> None:
        """Set the phase of the open message, if it has no phase yet."""
        if isinstance(self._open, MessageWriter) and self._open.phase is UNSET:
            self._open.phase = phase

    def _end_output(self, status: str = "completed") -> None:
        """End the open message or reasoning and the current call, but only the arguments of a complete MCP call."""
        self._end_open(status)
        writer, self._current = self._current, None
        if isinstance(writer, McpCallWriter) and status == "completed":
            writer.end_arguments()  # the call's item stays open until its result arrives
        elif writer is not None:
            self._end(writer, status)

    def _end_open(self, status: str) -> None:
        writer, self._open = self._open, None
        if writer is not None:
            self._end(writer, status)

    def _end(self, writer: ItemWriter, status: str) -> None:
        writer.end(status)
        self._settle(writer)

    def _settle(self, writer: ItemWriter) -> None:
        self._log.settle(writer)
        for call_id, one in list(self._calls.items()):
            if one is writer:
                del self._calls[call_id]
