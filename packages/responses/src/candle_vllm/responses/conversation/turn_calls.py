# SPDX-License-Identifier: MIT
"""The calls of one turn: what may run, what must wait, and the results, which come in any order.

Two phases: first every call is checked and, where the policy says so, somebody is asked, one call after the other;
then the calls that may run do so at the same time. So nothing has been done yet while a person decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.conversation.channel import EventChannel
from candle_vllm.responses.conversation.events import (
    ApprovalRequested,
    Event,
    ToolFinished,
    ToolProgressed,
    ToolStarted,
)
from candle_vllm.responses.conversation.options import ConversationOptions, StopReason
from candle_vllm.responses.conversation.transcript import Transcript
from candle_vllm.responses.tools.approval import Approval, decide
from candle_vllm.responses.tools.execution import Checked, check, denied, run, unknown_text
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import (
    ToolCall,
    ToolDefinition,
    ToolOutput,
    ToolProgress,
    ToolResult,
    ToolStatus,
    output_size,
)

MAX_KEPT = 64 << 20  # characters of output in the results; beyond it they keep what the model saw


class Decisions(NamedTuple):
    """What was decided about calls before the conversation goes on.

    Attributes:
        approved: ids of calls that run without asking.
        denied: ids of calls that do not run.
        auto_approve: True for a tool that needs no approval, whatever the policy is.
    """

    approved: Collection[str] = ()
    denied: Collection[str] = ()
    auto_approve: Callable[[ToolDefinition], bool] | None = None

    def check(self, transcript: Transcript) -> None:
        """Raises `InvalidParameterError` where an id is no open call of the transcript, or is in both."""
        known = {call.id for call in transcript.open_calls}
        for name, ids in (("approved", self.approved), ("denied", self.denied)):
            unknown = sorted(set(ids) - known)
            if unknown:
                raise InvalidParameterError(
                    f"{name} has {unknown[0]!r:.80}, which is no call without a result of the last assistant message; "
                    f"those are: {', '.join(sorted(known)) or 'none'}",
                    name,
                )
        both = set(self.approved) & set(self.denied)
        if both:
            raise InvalidParameterError(f"{min(both)!r:.80} cannot be approved and denied", "denied")


class TurnCalls:
    """Runs the calls of a conversation, turn by turn.

    Args:
        tools: what there is; of it, only tools that the options allow are found.
        options: approval and limits.
        decisions: of before.
        client_names: tools that the caller runs.
        transcript: gets the results.
        channel: gets the events.
    """

    def __init__(
        self,
        tools: ToolRegistry,
        options: ConversationOptions,
        decisions: Decisions,
        client_names: Collection[str],
        transcript: Transcript,
        channel: EventChannel[Event],
    ) -> None:
        self._tools = tools
        self._options = options
        self._decisions = decisions
        self._client_names = client_names
        self._transcript = transcript
        self._channel = channel
        self._results: dict[str, ToolResult | None] = {}  # by call id, in the order of the calls
        self._room = options.max_tool_calls
        self._kept = 0  # size of the outputs in the results
        self._seen: tuple[int, Mapping[str, ToolDefinition]] = (-1, {})  # revision of the tools, and those allowed

    @property
    def results(self) -> tuple[ToolResult, ...]:
        """Of all turns, in the order of the calls."""
        return tuple(result for result in self._results.values() if result is not None)

    def definitions(self) -> Mapping[str, ToolDefinition]:
        """The tools that the model may call and that run here."""
        revision, shown = self._seen
        if revision != self._tools.revision:
            found = self._tools.definitions(self._options.allowed_tools)
            shown = {one.name: one for one in found if one.name not in self._client_names}
            self._seen = (self._tools.revision, shown)
        return shown

    async def run(self, calls: Sequence[ToolCall]) -> StopReason | None:
        """Runs the calls of one turn; cancelling it ends those that run.

        Returns:
            Why the conversation cannot go on: some of the calls have no result. None where all have one.
        """
        self._results.update(dict.fromkeys(call.id for call in calls))
        ready: list[Checked] = []
        reasons: set[StopReason] = set()
        definitions = self.definitions()
        for call in calls:
            decided = await self._decide(call, definitions)
            if isinstance(decided, Checked):
                ready.append(decided)
            elif decided is not None:
                reasons.add(decided)
        slots = asyncio.Semaphore(self._options.parallel_tools)
        try:
            async with asyncio.TaskGroup() as group:
                for checked in ready:
                    group.create_task(self._run(checked, slots))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        order: tuple[StopReason, ...] = ("max_tool_calls", "approval", "client_tools")
        return next((reason for reason in order if reason in reasons), None)

    def of_turn(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """The results of some calls."""
        return [result for call in calls if (result := self._results.get(call.id)) is not None]

    async def refuse(self, call: ToolCall, status: ToolStatus, text: str) -> None:
        """Gives a call a result that says why it did not run, or not to its end."""
        definition = self.definitions().get(call.name)
        output = ToolOutput.of_text(text, is_error=True)
        server = None if definition is None else definition.server
        await self._finish(ToolResult(call=call, server=server, status=status, output=output, text=text))

    async def _decide(self, call: ToolCall, definitions: Mapping[str, ToolDefinition]) -> Checked | StopReason | None:
        """The call if it may run, or why it waits; None when it has its result already."""
        if call.name in self._client_names:
            return "client_tools"
        if call.name not in definitions:
            await self.refuse(call, "unknown", unknown_text(call.name, definitions))
            return None
        most = self._options.max_result_chars
        checked = await check(self._tools, call, max_chars=most)
        if isinstance(checked, ToolResult):
            await self._finish(checked)
            return None
        if self._room == 0 and call.id not in self._decisions.denied:
            return "max_tool_calls"
        approval = await self._approval(call, checked.definition)
        if approval is Approval.PENDING:
            return "approval"
        if approval is Approval.DENY:
            await self._finish(denied(checked, max_chars=most))
            return None
        if self._room is not None:
            self._room -= 1
        return checked

    async def _approval(self, call: ToolCall, definition: ToolDefinition) -> Approval:
        auto, policy = self._decisions.auto_approve, self._options.approval
        if call.id in self._decisions.denied:
            return Approval.DENY
        if call.id in self._decisions.approved or (auto is not None and auto(definition)):
            return Approval.ALLOW
        if callable(policy):
            await self._channel.send(ApprovalRequested(call=call, definition=definition))
            return await decide(policy, call, definition)
        approval = await decide(policy, call, definition)
        if approval is Approval.PENDING:
            await self._channel.send(ApprovalRequested(call=call, definition=definition))
        return approval

    async def _run(self, checked: Checked, slots: asyncio.Semaphore) -> None:
        call = checked.call

        def report(progress: ToolProgress) -> None:
            self._channel.offer(ToolProgressed(call_id=call.id, progress=progress))

        async with slots:
            self._transcript.begin(call)
            await self._channel.send(ToolStarted(call=call, definition=checked.definition))
            options = self._options
            await self._finish(
                await run(checked, timeout=options.tool_timeout, max_chars=options.max_result_chars, report=report)
            )

    async def _finish(self, result: ToolResult) -> None:
        self._kept += output_size(result.output)
        kept = result
        if self._kept > MAX_KEPT:
            kept = replace(result, output=ToolOutput.of_text(result.text, is_error=result.output.is_error))
        self._results[result.call.id] = kept
        self._transcript.add_result(result)
        await self._channel.send(ToolFinished(result=result))
