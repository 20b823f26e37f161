# SPDX-License-Identifier: MIT
"""A chat request whose tools run here: turns of the model and calls between them, as one chat completion.

Steps 2 to 10 of a request's life, once for each turn. The client does not get the calls as tool calls, because it would
run them too; the chunk with the finish reason, or the whole answer, lists them as `mcp_calls`, without outputs. A
stream has the text of every turn, a whole answer only that of the last turn, which nobody knows beforehand.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from candle_vllm.core.engine.outputs import DRAFT_COUNTS, FinishReason
from candle_vllm.core.engine.requests import arrived
from candle_vllm.core.errors import PromptTooLongError
from candle_vllm.openai import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from candle_vllm.openai.chat_answers import Told, told_of, wire_progress, wire_usage
from candle_vllm.openai.events import Begun, Ended, Head, Progress
from candle_vllm.openai.events import Event as AnswerEvent
from candle_vllm.openai.events import Usage as Counts
from candle_vllm.openai.protocol import chat
from candle_vllm.openai.protocol.tools import function_of, read_choice
from candle_vllm.openai.protocol.usage import Usage
from candle_vllm.openai.requests import read_chat
from candle_vllm.openai.task import Task, images_of
from candle_vllm.responses.api.turn_model import TokensSpentError, TurnModel
from candle_vllm.responses.conversation import events as conversation_events
from candle_vllm.responses.conversation.chat_model import ChatModel, InProcessModel, eyes_of
from candle_vllm.responses.conversation.loop import Ask, ConversationLoop
from candle_vllm.responses.conversation.options import ConversationOptions, ConversationUsage
from candle_vllm.responses.conversation.transcript import Transcript
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition
from candle_vllm.server.mcp.service import McpService, Offer
from candle_vllm.server.models.slot import ServedModel

_BETWEEN_TURNS = "\n\n"
NOT_RUN = "not_run"
CONTEXT = "context_length"


class WatchedTurns:
    """Passes the model's turns to the loop, and stores the first turn's head (id, time, model) for the whole answer.

    Attributes:
        head: head of the first turn, once it has begun.
        stop: stop string or stop token id that ended the last turn, or None.
        entered: set when the engine has accepted the first turn.
        eyes: image input of the model (`eyes_of`).
    """

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self._turns = 0
        self.head: Head | None = None
        self.stop: str | int | None = None
        self.entered = asyncio.Event()
        self.eyes = eyes_of(model)

    @asynccontextmanager
    async def stream(self, request: Task | Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[AnswerEvent]]:
        """Yield the events of one turn. Turns after the first have ids and arrival times of their own."""
        assert isinstance(request, Task), "turns are asked for by tasks"
        self._turns, self.stop = self._turns + 1, None
        if self._turns > 1:
            request = replace(request, request_id=None)
            arrived.set(time.monotonic())
        async with self._model.stream(request) as events:
            self.entered.set()
            yield self._read(events)

    async def _read(self, events: AsyncIterator[AnswerEvent]) -> AsyncIterator[AnswerEvent]:
        async for event in events:
            if self.head is None and isinstance(event, (Begun, Progress)):
                self.head = event.head
            if isinstance(event, Ended):
                self.stop = event.stop
            yield event


class ExecutionState:
    """The state of a conversation, updated with each of its events.

    Args:
        reasons: whether the model may reason, so that reasoning tokens are counted.
        told: further counts that the usage contains.

    Attributes:
        finish_reason: finish reason of the whole answer; "" while it is in progress.
        limit: the server's limit that ended the answer, or UNSET.
        turns: number of turns that have ended.
        text, thoughts, logprobs: output of the latest turn.
    """

    def __init__(self, registry: ToolRegistry, *, reasons: bool, told: Told = Told()) -> None:  # noqa: B008 - immutable
        self._registry = registry
        self._reasons, self._told = reasons, told
        self._usage = ConversationUsage()
        self._calls: dict[str, chat.ServerToolCall] = {}  # by id, in the model's order
        self.finish_reason = ""
        self.limit: str | UnsetType = UNSET
        self.turns = 0
        self.text = ""
        self.thoughts = ""
        self.logprobs: list[Any] = []

    def add(self, event: conversation_events.Event) -> None:
        """Update the state with an event."""
        match event:
            case conversation_events.TurnStarted():
                self.text, self.thoughts, self.logprobs = "", "", []
            case conversation_events.TextDelta():
                self.text += event.text
                self.logprobs += event.logprobs
            case conversation_events.ReasoningDelta():
                self.thoughts += event.text
            case conversation_events.TurnFinished():
                self.turns += 1
                self._usage += event.usage
                for call in event.message.get("tool_calls") or ():
                    function = call["function"]
                    self._note(ToolCall(id=call["id"], name=function["name"], arguments=function["arguments"]), NOT_RUN)
            case conversation_events.ToolFinished():
                result = event.result
                self._note(result.call, result.status, result.seconds, result.server)
            case conversation_events.ConversationFinished():
                if isinstance(reason := event.result.stop_reason, FinishReason):
                    self.end(reason)
                else:
                    self.end(FinishReason.LENGTH, limit=reason)

    def end(self, reason: FinishReason, limit: str | UnsetType = UNSET) -> None:
        """End the conversation."""
        self.finish_reason, self.limit = reason.openai, limit

    @property
    def calls(self) -> tuple[chat.ServerToolCall, ...] | UnsetType:
        """All calls, for the answer; UNSET without calls."""
        return tuple(self._calls.values()) or UNSET

    @property
    def usage(self) -> Usage:
        """Tokens of all turns."""
        total = self._usage
        counts = Counts(
            prompt_tokens=total.prompt_tokens,
            completion_tokens=total.completion_tokens,
            cached_tokens=total.cached_tokens,
            reasoning_tokens=total.reasoning_tokens if self._reasons else None,
            **{name: getattr(total, name) for name in DRAFT_COUNTS},
            final=True,
        )
        return wire_usage(counts, self._told)

    def _note(self, call: ToolCall, status: str, seconds: float = 0.0, server: str | None = None) -> None:
        entry = self._registry.entry(call.name) if server is None else None
        if entry is not None:
            server = entry.definition.server
        self._calls[call.id] = chat.ServerToolCall(
            server=server, name=call.name, arguments=call.arguments, status=status, seconds=round(seconds, 3)
        )


class Execution:
    """The events of one request's conversation with the tools of `offer`; `aclose` ends its turn and its tools.

    Attributes:
        labels: the client's labels, which the answer repeats.
        state: state of the conversation.
        turns: the turns of the model, with the head of the answer.
    """

    def __init__(self, service: McpService, offer: Offer, model: ServedModel, wire: ChatCompletionRequest) -> None:
        adapter, options = model.adapter, service.options
        self.labels = wire.labels
        limit = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
        reasons = adapter.planner.choice.reasoning is not None
        self.state = ExecutionState(service.registry, reasons=reasons, told=told_of(wire))
        self.turns = WatchedTurns(TurnModel(InProcessModel(adapter), max_tokens=limit))
        loop = ConversationLoop(
            self.turns,
            service.registry,
            ConversationOptions(
                max_turns=options.max_turns,
                allowed_tools=offer.names,
                max_tool_calls=options.max_tool_calls,
                approval="always",
                parallel_tools=1 if wire.parallel_tool_calls is False else 8,
            ),
            auto_approve=service.auto_approves,
        )
        transcript, ask = _asked(wire, model.entry.settings.default_sampling, limit)
        self._events = loop.converse(transcript, ask)
        self._next: asyncio.Task[conversation_events.Event] | None = None

    async def start(self) -> None:
        """Wait until the engine has accepted the first turn; after a failure, close everything and raise it."""
        try:
            self.state.add(await anext(self._events))
            self._next = asyncio.ensure_future(anext(self._events))
            entered = asyncio.ensure_future(self.turns.entered.wait())
            try:
                await asyncio.wait({self._next, entered}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                entered.cancel()
            if self._next.done():
                self._next.result()
        except BaseException:
            await self.aclose()
            raise

    def __aiter__(self) -> Execution:
        return self

    async def __anext__(self) -> conversation_events.Event:
        pending, self._next = self._next, None
        try:
            event = await (anext(self._events) if pending is None else pending)
        except TokensSpentError:
            self.state.end(FinishReason.LENGTH)
            raise StopAsyncIteration from None
        except PromptTooLongError:
            if not self.state.turns:
                raise
            self.state.end(FinishReason.LENGTH, limit=CONTEXT)  # outputs of tools, not the client, filled the context
            raise StopAsyncIteration from None
        finally:
            del pending  # its exception refers to this frame
        self.state.add(event)
        return event

    async def aclose(self) -> None:
        """End the model's turn and the running tools."""
        pending, self._next = self._next, None
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await self._events.aclose()


def _asked(wire: ChatCompletionRequest, defaults: Mapping[str, Any], limit: int | None) -> tuple[Transcript, Ask]:
    """Return the transcript, and a function that makes each turn's request; `limit` is the client's token limit."""
    task = read_chat(wire)
    names = {} if limit is None else {"max_tokens": "max_completion_tokens"}
    task = replace(
        task,
        sampling={**defaults, **task.sampling},
        paths=task.paths._replace(fields={**task.paths.fields, **names}),
    )
    choice = read_choice(wire.tool_choice, [tool.name for tool in task.tools.tools])
    ids = {call.id for message in task.messages for call in message.calls}
    transcript = Transcript((), ids, len(images_of(task.messages)))

    def ask(tools: Sequence[ToolDefinition], *, first: bool) -> Task:
        functions = [function_of(tool.name, tool.description, tool.parameters, None) for tool in tools]
        use = (choice if first else choice.freed()).among(
            functions, [tool.to_openai() for tool in tools], parallel=wire.parallel_tool_calls
        )
        return replace(task, messages=(*task.messages, *transcript.added), tools=use)

    return transcript, ask


async def executed(execution: Execution) -> ChatCompletion:
    """Return the whole answer. Cancelling the coroutine ends the turn and the tools."""
    async with aclosing(execution):
        await execution.start()
        async for _ in execution:
            pass
    state, head = execution.state, execution.turns.head
    assert head is not None
    content = None if not state.text and (state.thoughts or state.calls is not UNSET) else state.text
    choice = chat.ChatChoice(
        index=0,
        message=chat.ChatMessage(
            content=content, reasoning_content=state.thoughts or UNSET, reasoning=state.thoughts or UNSET
        ),
        finish_reason=state.finish_reason,
        stop_reason=execution.turns.stop if state.limit is UNSET else None,
        logprobs=chat.ChatLogprobs(tuple(state.logprobs)) if state.logprobs else None,
        mcp_calls=state.calls,
        mcp_limit=state.limit,
    )
    return ChatCompletion(**head._asdict(), **execution.labels, choices=(choice,), usage=state.usage)


class ExecutedStream:
    """The chunks of the answer as they are generated, with one id, one role, one end. `aclose` ends turn and tools."""

    def __init__(self, execution: Execution, *, include_usage: bool) -> None:
        self._execution = execution
        self._include_usage = include_usage
        self._no_usage = None if include_usage else UNSET
        self._ready: deque[ChatCompletionChunk] = deque()
        self._begun = self._ended = False
        self._spoke = False  # an earlier turn had text, so the next one begins a new paragraph
        self._turn_spoke = False

    def __aiter__(self) -> ExecutedStream:
        return self

    async def __anext__(self) -> ChatCompletionChunk:
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._read(await anext(self._execution))
            except StopAsyncIteration:
                self._end()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Stop the answer and everything that runs for it."""
        self._ended = True
        self._ready.clear()
        await self._execution.aclose()

    def _read(self, event: conversation_events.Event) -> None:
        match event:
            case conversation_events.ReasoningDelta():
                self._say(chat.ChatDelta(reasoning_content=event.text, reasoning=event.text))
            case conversation_events.TextDelta():
                if event.text and self._spoke and not self._turn_spoke:
                    self._say(chat.ChatDelta(content=_BETWEEN_TURNS))
                self._turn_spoke = self._turn_spoke or bool(event.text)
                logprobs = chat.ChatLogprobs(event.logprobs) if event.logprobs else None
                self._say(chat.ChatDelta(content=event.text), logprobs)
            case conversation_events.CallStarted():
                self._begin()
            case conversation_events.TurnMeasured(counts=Progress() as counts):
                choice = chat.ChunkChoice(index=0, delta=chat.ChatDelta())
                self._ready.append(self._chunk((choice,), self._no_usage, prompt_progress=wire_progress(counts)))
            case conversation_events.TurnFinished():
                self._spoke, self._turn_spoke = self._spoke or self._turn_spoke, False

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            role = chat.ChunkChoice(index=0, delta=chat.ChatDelta(role="assistant", content=""))
            self._ready.append(self._chunk((role,), self._no_usage, **self._execution.labels))

    def _say(self, delta: chat.ChatDelta, logprobs: chat.ChatLogprobs | None = None) -> None:
        self._begin()
        self._add(chat.ChunkChoice(index=0, delta=delta, logprobs=logprobs))

    def _end(self) -> None:
        self._ended = True
        self._begin()
        state = self._execution.state
        self._add(
            chat.ChunkChoice(
                index=0,
                delta=chat.ChatDelta(),
                finish_reason=state.finish_reason,
                stop_reason=self._execution.turns.stop if state.limit is UNSET else None,
                mcp_calls=state.calls,
                mcp_limit=state.limit,
            )
        )
        if self._include_usage:
            self._ready.append(self._chunk((), usage=state.usage))

    def _add(self, choice: chat.ChunkChoice) -> None:
        self._ready.append(self._chunk((choice,), self._no_usage))

    def _chunk(self, choices: tuple[chat.ChunkChoice, ...], usage: Any, **more: Any) -> ChatCompletionChunk:
        head = self._execution.turns.head
        assert head is not None
        return ChatCompletionChunk(**head._asdict(), **more, choices=choices, usage=usage)
