# SPDX-License-Identifier: MIT
"""The calls of one turn: which may run, which must wait, and the results, which arrive in any order.

There are two phases: first every call is checked, and its approval is requested if the policy needs one, one call after
the other; then the calls that may run do so concurrently. So no call has run while a person decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.core.vision.pictures import from_base64
from candle_vllm.openai.task import ImagePart, Part, TextPart
from candle_vllm.responses.conversation import events
from candle_vllm.responses.conversation.channel import EventChannel
from candle_vllm.responses.conversation.chat_model import Eyes
from candle_vllm.responses.conversation.options import ConversationOptions, StopReason
from candle_vllm.responses.conversation.transcript import Transcript
from candle_vllm.responses.tools import tool
from candle_vllm.responses.tools.approval import Approval, decide
from candle_vllm.responses.tools.execution import Checked, check, denied, not_run, run, unknown_text
from candle_vllm.responses.tools.registry import ToolRegistry

NOT_ALLOWED = "This request does not allow a call of this tool, so it was not run."
MAX_PICTURES = 64 << 20  # base64 characters of all images of results that a model sees in one run
MAX_KEPT = 64 << 20  # characters of output in the results; further results have only the text that the model saw


class Decisions(NamedTuple):
    """Decisions about calls, made before the conversation continues, by id or, whatever the policy, by tool."""

    approved: Collection[str] = ()
    denied: Collection[str] = ()
    auto_approve: Callable[[tool.ToolDefinition], bool] | None = None

    def check(self, transcript: Transcript) -> None:
        """Raise `InvalidParameterError` if an id is not an open call's, or is in both lists."""
        known = {call.id for call in transcript.open_calls}
        for name, ids in (("approved", self.approved), ("denied", self.denied)):
            if unknown := sorted(set(ids) - known):
                raise InvalidParameterError(
                    f"{name} has {unknown[0]!r:.80}, which is not a call of the last assistant message that has no "
                    f"result yet; these are: {', '.join(sorted(known)) or 'none'}",
                    name,
                )
        if both := set(self.approved) & set(self.denied):
            raise InvalidParameterError(f"{min(both)!r:.80} cannot be approved and denied", "denied")


class ShownPictures:
    """Images of results: the model sees those that it can decode within the limits, and a reason for each other image.

    Images are decoded before they are added to the conversation, because an invalid image would make later turns fail.
    Without `eyes`, or with a limit of 0 images, results are not changed. The transcript counts the images.
    """

    def __init__(self, eyes: Eyes | None, transcript: Transcript, max_chars: int) -> None:
        self._eyes = None if eyes is None or not eyes.max_images else eyes
        self._transcript = transcript
        self._max_chars = max_chars
        self._room = MAX_PICTURES
        self._turn = asyncio.Lock()  # concurrent calls must be counted one after the other

    async def of(self, result: tool.ToolResult) -> tuple[tool.ToolResult, tuple[Part, ...]]:
        """Return the result, whose text names images that are not shown, and its parts if the model sees an image."""
        pictures = {place: part for place, part in enumerate(result.output.content) if tool.is_picture(part)}
        if self._eyes is None or not pictures:
            return result, ()
        async with self._turn:
            faults, images = dict[int, str](), dict[int, str]()
            for place, part in pictures.items():
                fault = await self._fault(self._eyes, part.data or "", self._transcript.images + len(images))
                if fault is None:
                    self._room -= len(part.data or "")
                    images[place] = f"data:{tool.picture_type(part)};base64,{part.data}"
                else:
                    faults[place] = fault
            if faults:
                result = replace(result, text=tool.output_text(result.output, self._max_chars, faults))
            pieces = tool.output_pieces(result.output, self._max_chars, faults, images)
            parts = tuple(TextPart(text) if image is None else ImagePart(image) for text, image in pieces)
            self._transcript.images += len(images)  # before another result is processed
            return result, parts if images else ()

    async def _fault(self, eyes: Eyes, data: str, there: int) -> str | None:
        """Return why an image cannot be shown in addition to `there` others, as a text for the model, or None."""
        if there >= eyes.max_images:
            return f"it is not shown: a conversation may have {eyes.max_images} images"
        if len(data) > self._room:
            return f"it is not shown: the images of tools may have {MAX_PICTURES >> 20} MB of base64 in all"
        try:
            await eyes.try_picture(await asyncio.to_thread(from_base64, data, "the image"))
        except RequestError as error:
            return f"it cannot be shown: {str(error).removeprefix('the image: ')}"
        return None


@dataclass(eq=False, repr=False)
class TurnCalls:
    """Runs the calls of a conversation, turn by turn."""

    tools: ToolRegistry  # only tools that the options allow are used
    options: ConversationOptions
    decisions: Decisions
    client_names: Collection[str]  # names of the tools that the caller runs
    transcript: Transcript
    channel: EventChannel[events.Event]
    pictures: ShownPictures
    allowed: Collection[str] | None = None  # the tools that the latest turn may call (`tool_choice`); None means all

    def __post_init__(self) -> None:
        self._results: dict[str, tool.ToolResult | None] = {}  # by call id, in the order of the calls
        self._room = self.options.max_tool_calls
        self._kept = 0  # size of the outputs in the results
        self._seen: tuple[int, Mapping[str, tool.ToolDefinition]] = (-1, {})  # tools' revision, and allowed tools

    @property
    def results(self) -> tuple[tool.ToolResult, ...]:
        """Results of all turns, in the order of the calls."""
        return tuple(result for result in self._results.values() if result is not None)

    def definitions(self) -> Mapping[str, tool.ToolDefinition]:
        """Return the tools that the model may call and that run here."""
        revision, shown = self._seen
        if revision != self.tools.revision:
            found = self.tools.definitions(self.options.allowed_tools)
            shown = {one.name: one for one in found if one.name not in self.client_names}
            self._seen = (self.tools.revision, shown)
        return shown

    async def run(self, calls: Sequence[tool.ToolCall]) -> StopReason | None:
        """Run the calls of one turn; cancelling the coroutine ends the running calls.

        Return the reason why the conversation cannot continue, if some of the calls have no result; otherwise None.
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
        slots = asyncio.Semaphore(self.options.parallel_tools)
        try:
            async with asyncio.TaskGroup() as group:
                for checked in ready:
                    group.create_task(self._run(checked, slots))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        order: tuple[StopReason, ...] = ("max_tool_calls", "approval", "client_tools")
        return next((reason for reason in order if reason in reasons), None)

    def of_turn(self, calls: Sequence[tool.ToolCall]) -> list[tool.ToolResult]:
        return [result for call in calls if (result := self._results.get(call.id)) is not None]

    async def refuse(self, call: tool.ToolCall, status: tool.ToolStatus, text: str) -> None:
        """Give a call a result that says why it did not run, or did not complete."""
        definition = self.definitions().get(call.name)
        server = None if definition is None else definition.server
        await self._finish(not_run(call, server, status, text, self.options.max_result_chars))

    async def _decide(
        self, call: tool.ToolCall, definitions: Mapping[str, tool.ToolDefinition]
    ) -> Checked | StopReason | None:
        """Return the call if it may run, or the reason why it must wait; None if it has its result already."""
        if call.name in self.client_names:
            return "client_tools"
        if call.name not in definitions:
            await self.refuse(call, "unknown", unknown_text(call.name, definitions))
            return None
        if self.allowed is not None and call.name not in self.allowed:
            await self.refuse(call, "denied", NOT_ALLOWED)
            return None
        most = self.options.max_result_chars
        checked = await check(self.tools, call, max_chars=most)
        if isinstance(checked, tool.ToolResult):
            await self._finish(checked)
            return None
        if self._room == 0 and call.id not in self.decisions.denied:
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

    async def _approval(self, call: tool.ToolCall, definition: tool.ToolDefinition) -> Approval:
        auto, policy = self.decisions.auto_approve, self.options.approval
        if call.id in self.decisions.denied:
            return Approval.DENY
        if call.id in self.decisions.approved or (auto is not None and auto(definition)):
            return Approval.ALLOW
        if callable(policy):
            await self.channel.send(events.ApprovalRequested(call=call, definition=definition))
        approval = await decide(policy, call, definition)
        if approval is Approval.PENDING and not callable(policy):
            await self.channel.send(events.ApprovalRequested(call=call, definition=definition))
        return approval

    async def _run(self, checked: Checked, slots: asyncio.Semaphore) -> None:
        call = checked.call

        def report(progress: tool.ToolProgress) -> None:
            self.channel.offer(events.ToolProgressed(call_id=call.id, progress=progress))

        async with slots:
            self.transcript.begin(call)
            await self.channel.send(events.ToolStarted(call=call, definition=checked.definition))
            options = self.options
            await self._finish(
                await run(checked, timeout=options.tool_timeout, max_chars=options.max_result_chars, report=report)
            )

    async def _finish(self, result: tool.ToolResult) -> None:
        result, parts = await self.pictures.of(result)
        self._kept += tool.output_size(result.output)
        kept = result
        if self._kept > MAX_KEPT:
            kept = replace(result, output=tool.ToolOutput.of_text(result.text, is_error=result.output.is_error))
        self._results[result.call.id] = kept
        self.transcript.add_result(result, parts)
        await self.channel.send(events.ToolFinished(result=result, shown=parts))
