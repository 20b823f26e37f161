# SPDX-License-Identifier: MIT
"""ConversationLoop: a model and its tools alternate until the model has answered, or a limit ends the conversation.

`ResponsesSession`, the chat route that runs tools, and `/v1/responses` use this loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import PromptTooLongError, RequestAbortedError
from candle_vllm.openai.events import Event as Answer
from candle_vllm.openai.task import Task
from candle_vllm.responses.conversation.channel import EventChannel, end_task
from candle_vllm.responses.conversation.chat_form import ChatTranscript, allowed_names, chat_message, client_names
from candle_vllm.responses.conversation.chat_model import ChatModel, eyes_of
from candle_vllm.responses.conversation.events import (
    ConversationFinished,
    Event,
    ResultsShortened,
    TurnFinished,
    TurnStarted,
)
from candle_vllm.responses.conversation.options import (
    ConversationOptions,
    ConversationResult,
    ConversationUsage,
    StopReason,
)
from candle_vllm.responses.conversation.transcript import LOST, Transcript
from candle_vllm.responses.conversation.turn_calls import Decisions, ShownPictures, TurnCalls
from candle_vllm.responses.conversation.turn_reader import TurnReader
from candle_vllm.responses.tools.execution import parsed_arguments
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolDefinition, ToolResult

_LIMITS = frozenset({"max_tokens", "max_completion_tokens"})
CUT = "The answer was cut at {} within this call. It did not run."
WHOLE = "The answer was cut at {} behind this call, so it did not run."


class Ask(Protocol):
    """Makes the request of the next turn; `tools` run in this process, `first` is whether it is the first turn."""

    def __call__(self, tools: Sequence[ToolDefinition], /, *, first: bool) -> Task | Mapping[str, Any]: ...


class RepeatWatch:
    """Counts consecutive turns with equal calls and results, in any order and with any ids; `most` turns are a loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._last: tuple[tuple[str, ...], ...] = ()
        self._count = 0

    def is_loop(self, results: Sequence[ToolResult]) -> bool:
        """Add the results of one turn; return whether they complete a loop."""
        this = tuple(sorted((one.call.name, _canonical(one.call.arguments), one.status, one.text) for one in results))
        self._count = self._count + 1 if this == self._last else 1
        self._last = this
        return bool(this) and self._count >= self._most


def _canonical(arguments: str) -> str:
    """Return JSON arguments with sorted names and uniform white space; return other text unchanged."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


class ConversationLoop:
    """Runs conversations, any number of them concurrently; `tools` are read again before each turn.

    `auto_approve` returns True for a tool that needs no approval, whatever the policy.
    """

    def __init__(
        self,
        model: ChatModel,
        tools: ToolRegistry | None = None,
        options: ConversationOptions | None = None,
        *,
        auto_approve: Callable[[ToolDefinition], bool] | None = None,
    ) -> None:
        self._model = model
        self._tools = tools if tools is not None else ToolRegistry()
        self._options = options or ConversationOptions()
        self._auto_approve = auto_approve
        self._running: set[asyncio.Task[None]] = set()

    def run(
        self,
        messages: Sequence[Mapping[str, Any]] | ChatTranscript,
        *,
        client_tools: Sequence[Mapping[str, Any]] = (),
        approved: Collection[str] = (),
        denied: Collection[str] = (),
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a conversation; `ConversationFinished` is the last.

        Calls of the last assistant message that have no result run before the first turn. A `tool_choice` that forces a
        call applies to the first turn; after that, the model chooses.

        Closing the iterator, or cancelling the task that reads it, ends the model's answer and all running tools before
        the close returns; use `contextlib.aclosing`.

        Args:
            messages: messages in OpenAI's format; a `ChatTranscript` gets the new ones, even if the run ends early.
            client_tools: OpenAI definitions of tools that the caller runs; a turn that calls one is the last.
            approved, denied: ids of calls without results that may run, or may not.

        Raises:
            RequestError: a message, tool or option is invalid, or the conversation is too long.
            CandleVllmError: the model failed, or `aclose` was called; running tools have been ended.
        """
        transcript = messages if isinstance(messages, ChatTranscript) else ChatTranscript(messages)
        ask = partial(transcript.request, self._options.request, client_tools)
        return self.converse(transcript, ask, client_names(client_tools, self._tools), approved=approved, denied=denied)

    async def converse(
        self,
        transcript: Transcript,
        ask: Ask,
        names: Collection[str] = (),
        *,
        approved: Collection[str] = (),
        denied: Collection[str] = (),
    ) -> AsyncGenerator[Event, None]:
        """Run a conversation as `run` does, in any format of messages; `names` are of the caller's own tools."""
        decisions = Decisions(frozenset(approved), frozenset(denied), self._auto_approve)
        decisions.check(transcript)
        channel: EventChannel[Event] = EventChannel()
        shown = ShownPictures(eyes_of(self._model), transcript, self._options.max_result_chars)
        calls = TurnCalls(self._tools, self._options, decisions, names, transcript, channel, shown)
        repeats = RepeatWatch(self._options.max_repeats)
        conversation = _Conversation(self._model, self._options, ask, transcript, calls, channel, repeats)
        task = asyncio.create_task(conversation.run(), name="conversation")
        task.add_done_callback(partial(_close, channel))
        self._running.add(task)
        try:
            while (event := await channel.receive()) is not None:
                yield event
        finally:
            try:
                await end_task(task)
            finally:
                self._running.discard(task)
                del task  # its error refers to this frame
                transcript.settle()

    async def aclose(self) -> None:
        """End the running conversations; their readers get `RequestAbortedError`."""
        await asyncio.gather(*map(end_task, self._running))


@dataclass(eq=False, repr=False)
class _Conversation:
    """One run of the loop, in a task of its own, so that its timeout does not cancel the reader's task."""

    model: ChatModel
    options: ConversationOptions
    ask: Ask
    transcript: Transcript
    calls: TurnCalls
    channel: EventChannel[Event]
    repeats: RepeatWatch
    turns: int = 0
    words: str = ""
    usage: ConversationUsage = field(default_factory=ConversationUsage)

    async def run(self) -> None:
        limit = asyncio.timeout(self.options.timeout)
        try:
            async with limit:
                reason = await self._take_turns()
        except TimeoutError:
            if not limit.expired():
                raise
            reason = "timeout"
            for call in self.transcript.lost_calls():
                await self.calls.refuse(call, "timed_out", LOST)
        finally:
            del limit  # it refers to this task, whose error refers to this frame
        result = ConversationResult(
            final_message=self.words,
            tool_calls=self.calls.results,
            turns_taken=self.turns,
            completed=reason is FinishReason.STOP,
            stop_reason=reason,
            pending=self.transcript.open_calls,
            usage=self.usage,
        )
        added = tuple(map(chat_message, self.transcript.added))
        await self.channel.send(ConversationFinished(result=result, messages=added))

    async def _take_turns(self) -> StopReason:
        reason = await self._run_calls()
        while reason is None:
            if self.turns >= self.options.max_turns:
                return "max_turns"
            turn = await self._take_turn()
            if (ended := turn.finish_reason).cut:
                for call in self.transcript.open_calls:
                    if call.arguments.strip() and isinstance(parsed_arguments(call.arguments), dict):
                        await self.calls.refuse(call, "not_run", WHOLE.format(ended.limit))
                    else:
                        await self.calls.refuse(call, "invalid_arguments", CUT.format(ended.limit))
                return ended
            if not self.transcript.open_calls:
                return FinishReason.STOP
            reason = await self._run_calls()
        return reason

    async def _run_calls(self) -> StopReason | None:
        """Run the open calls; return the reason if the conversation ends after them, otherwise None."""
        calls = self.transcript.open_calls
        reason = await self.calls.run(calls)
        if reason is None and self.repeats.is_loop(self.calls.of_turn(calls)):
            return "loop"
        return reason

    async def _take_turn(self) -> TurnFinished:
        await self.channel.send(TurnStarted(number=self.turns + 1))
        async with AsyncExitStack() as stack:
            request, answer = await self._ask_within(stack)
            measures = isinstance(request, Task) and request.tell_counts
            reader = TurnReader(self.turns + 1, self.transcript.call_ids, measures=measures)
            async for one in answer:
                for event in reader.read(one):
                    await self.channel.send(event)
        turn = reader.finish()
        self.turns += 1
        self.usage += turn.usage
        self.words = turn.message["content"] or ""
        self.transcript.add_turn(reader.message())
        self.calls.allowed = allowed_names(request)
        await self.channel.send(turn)
        return turn

    async def _ask_within(self, stack: AsyncExitStack) -> tuple[Task | Mapping[str, Any], AsyncIterator[Answer]]:
        """Return the next turn's request and its answer; if the context is too small, the results are shortened."""
        while True:
            request = self.ask([*self.calls.definitions().values()], first=not self.turns)
            try:
                return request, await stack.enter_async_context(self.model.stream(request))
            except PromptTooLongError:
                if self.transcript.grew and not isinstance(request, Task) and _LIMITS & request.keys():
                    # The results of tools left fewer tokens: now the end of the context is the limit.
                    request = {name: value for name, value in request.items() if name not in _LIMITS}
                    with suppress(PromptTooLongError):
                        return request, await stack.enter_async_context(self.model.stream(request))
                if not (most := self.transcript.shorten()):
                    raise
            await self.channel.send(ResultsShortened(characters=most))


def _close(channel: EventChannel[Event], task: asyncio.Task[None]) -> None:
    channel.close(RequestAbortedError("The conversation was cancelled.") if task.cancelled() else task.exception())
