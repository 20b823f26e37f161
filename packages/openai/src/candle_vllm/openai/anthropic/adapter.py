# SPDX-License-Identifier: MIT
"""MessagesAdapter: Anthropic's Messages API, answered by an `OpenAIAdapter`, whole or streamed, without HTTP.

Requests become tasks, and the events of the answer become Anthropic's events (steps 2 and 10 of a request's life). A
whole message is joined from the events of a stream, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError, RequestError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.answers import AnswerStream, ChunkStream, Writer
from candle_vllm.openai.anthropic import answers
from candle_vllm.openai.anthropic.answers import Message, MessageEvent, TokenCount
from candle_vllm.openai.anthropic.request import (
    CountTokensRequest,
    MessagesRequest,
    ThinkingOff,
    ThinkingOn,
    Tool,
    ToolNameChoice,
    parse_count_tokens_request,
    parse_messages_request,
)
from candle_vllm.openai.anthropic.tool_input import ToolInput, parsed_input
from candle_vllm.openai.anthropic.turns import read_turns
from candle_vllm.openai.events import Begun, CallBegun, CallText, Ended, Event, Head, Progress, Text, Thought, Usage
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.json_body import rules_below
from candle_vllm.openai.protocol.generation import sampling_values
from candle_vllm.openai.protocol.structured import constraint
from candle_vllm.openai.protocol.tools import function_of, unknown_tool
from candle_vllm.openai.task import Choice, Paths, Task, ThinkingLimit, ToolUse

Fields = Mapping[str, Any]  # a request as a plain object, which is validated when it is used
_FORM = "output_config.format.schema"
_CHOICES = {
    "auto": Choice(),
    "any": Choice("required"),
    "tool": Choice("required"),
    "none": Choice("none"),
}
_PREFILL = "continue_final_message"  # core's name of the field by which the last message begins the answer


class MessagesAdapter:
    """Answers Anthropic's requests.

    Requests are plain objects, or come from `parse_messages_request` and `parse_count_tokens_request`. Every method
    raises what `OpenAIAdapter` raises; `to_anthropic_error` converts it to a response.
    """

    def __init__(self, adapter: OpenAIAdapter, *, sampling_defaults: Fields | None = None) -> None:
        """`sampling_defaults` are by name in `SamplingParams`, and take precedence over the model's own."""
        self._adapter = adapter
        self._sampling_defaults = dict(sampling_defaults or {})

    async def create(self, request: MessagesRequest | Fields) -> Message:
        """Return the whole answer; the request's `stream` is ignored. Cancelling this coroutine aborts the request."""
        return await (await self.create_stream(request)).whole(join_message)

    async def create_stream(self, request: MessagesRequest | Fields) -> MessageStream:
        """Submit the request and stream its events; close the stream to abort the request."""
        parsed = parse_messages_request(request)
        reading = await self._read(parsed)
        with reading.worded():
            try:
                answer, bound = await self._adapter.answer(lambda: reading.task), False
            except PromptTooLongError as error:
                if error.param != "max_tokens":
                    raise
                # As at Anthropic, the answer then continues to the end of the context, and its stop reason says so.
                answer, bound = await self._unbound(reading.task), True
        shown = not (isinstance(parsed.thinking, ThinkingOn) and parsed.thinking.display == "omitted")
        writer = EventWriter(show_thinking=shown, context_bound=bound)
        counts = Usage(prompt_tokens=len(answer.prompt), completion_tokens=0)
        return MessageStream(answer, writer, reading.worded, writer.start(answer.head, counts))

    async def count_tokens(self, request: CountTokensRequest | Fields) -> TokenCount:
        """Count the prompt tokens that `create` would submit, cached or not; nothing is generated."""
        reading = await self._read(parse_count_tokens_request(request))
        with reading.worded():
            return TokenCount(await self._adapter.count_tokens(lambda: reading.task))

    async def _unbound(self, task: Task) -> AnswerStream:
        try:
            return await self._adapter.answer(task.unlimited)
        except PromptTooLongError as error:
            error.param = "messages"
            raise

    async def _read(self, request: MessagesRequest | CountTokensRequest) -> Reading:
        """Convert a request in another thread, because conversations may be long."""
        return await apart(read_messages, request, self._sampling_defaults)


class MessageStream(ChunkStream[MessageEvent]):
    """Events of one answer. Close it (`aclose`) if the client disconnects: this aborts the request."""


class Reading(NamedTuple):
    """A task, and the path of the first request message that became part of the task's last message."""

    task: Task
    last: str

    @contextmanager
    def worded(self) -> Iterator[None]:
        """Context manager that names the request's fields, and rewords errors about the prompt as clients expect."""
        try:
            with self.task.paths.blamed():
                yield
        except RequestError as error:
            text = str(error)
            if _PREFILL in text or error.param == _PREFILL:
                error.param = self.last
                text = (
                    f"{self.last} has role assistant, so the answer would begin with it, but the model's template does "
                    "not write it as it is: end with a user message"
                )
            if isinstance(error, PromptTooLongError) and error.param != "max_tokens":
                text = f"prompt is too long: {text}"  # clients recognise this wording and shorten the prompt
            error.args = (text, *error.args[1:])
            raise


def read_messages(request: MessagesRequest | CountTokensRequest, sampling_defaults: Mapping[str, Any]) -> Reading:
    """Convert a validated request to a task; raises `RequestError`.

    `sampling_defaults` are values, by name in `SamplingParams`, for fields that the request does not set.
    """
    turns, prefilled = read_turns(request.system, request.messages)
    form = _form(request)
    budget = getattr(request.thinking, "budget_tokens", None)
    thinks = None if request.thinking is None else not isinstance(request.thinking, ThinkingOff)
    task = Task(
        messages=tuple(turn.message for turn in turns),
        paths=Paths(
            {"prompt": "messages", "stop": "stop_sequences", "structured_outputs": "tools" if form is None else _FORM},
            [
                f"tools.{number}.input_schema"
                for number, tool in enumerate(request.tools or ())
                if isinstance(tool, Tool)
            ],
        ),
        tools=_tool_use(request),
        form=form,
        sampling=_sampling(request, sampling_defaults) if isinstance(request, MessagesRequest) else {},
        model=request.model,
        continued=prefilled,
        variables={} if thinks is None else {"thinking": thinks, "enable_thinking": thinks},
        # Clients send a budget to every model; it has no effect on a model whose thinking has no marks.
        thinking=None if budget is None else ThinkingLimit(budget, required=False),
        show_thoughts=thinks is not False,
    )
    return Reading(task, turns[-1].source)


def _sampling(request: MessagesRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = sampling_values(request) | {"max_tokens": request.max_tokens}
    return {**defaults, **given, **({"stop": request.stop_sequences} if request.stop_sequences else {})}


def _form(request: MessagesRequest | CountTokensRequest) -> StructuredOutputsParams | None:
    if request.output_config is None or request.output_config.format is None:
        return None
    with rules_below(""):
        return constraint(_FORM, json=request.output_config.format.json_schema)


def _tool_use(request: MessagesRequest | CountTokensRequest) -> ToolUse:
    tools = [tool for tool in request.tools or () if isinstance(tool, Tool)]
    functions = [function_of(one.name, one.description, one.input_schema, one.strict) for one in tools]
    given = request.tool_choice
    if given is not None and given.type != "none" and request.tools is None:
        raise InvalidParameterError("tool_choice needs tools: there is nothing to choose from", "tool_choice")
    choice = _CHOICES["auto" if given is None else given.type]
    if isinstance(given, ToolNameChoice):
        choice = choice._replace(named=given.name)
        if functions and given.name not in (names := [function.name for function in functions]):
            raise InvalidParameterError(f"tool_choice.name {unknown_tool(given.name, names)}", "tool_choice.name")
    parallel = not getattr(given, "disable_parallel_tool_use", None)
    return choice.among(functions, [tool.shown() for tool in tools], parallel=parallel)


_Kind = Literal["text", "thinking"]


class EventWriter(Writer[answers.MessageEvent]):
    """Converts the events of one answer to Anthropic's events.

    One block is closed before the next begins. No block is blank, and only the first may begin with white space,
    because clients send blocks back in the next request, and Anthropic's API refuses blank text blocks.

    Args:
        show_thinking: whether thinking blocks have their text; otherwise they are empty.
        context_bound: whether the context limits the answer, because prompt and `max_tokens` together exceed it.
    """

    def __init__(self, *, show_thinking: bool = True, context_bound: bool = False) -> None:
        self._show_thinking = show_thinking
        self._context_bound = context_bound
        self._index = -1
        self._open: _Kind | ToolInput | None = None
        self._space: tuple[_Kind, str] | None = None  # white space that may begin a block
        self._stop: answers.StopDelta | None = None

    def start(self, head: Head, counts: Usage) -> list[answers.MessageEvent]:
        """Return the events before the first token, which tell clients that the request runs.

        The number of cached prompt tokens is not known yet; the final counts have it.
        """
        name = "msg_" + head.id.removeprefix("chatcmpl-")
        message = answers.Message(id=name, model=head.model, content=(), usage=answers.Usage.of(counts))
        return [answers.MessageStart(message=message), answers.Ping()]

    def write(self, events: Sequence[Event]) -> list[answers.MessageEvent]:
        return [made for event in events for made in self._written(event)]

    def _written(self, event: Event) -> list[answers.MessageEvent]:
        match event:
            case Text():
                return self._say("text", event.text) if event.text else []
            case Thought():
                return self._say("thinking", event.text)
            case CallText():
                assert isinstance(self._open, ToolInput)
                return self._json(self._open.feed(event.text))
            case CallBegun():
                block = answers.ToolUseBlock(id=event.id, name=event.name, input={})
                return [*self._close(), *self._begin(ToolInput(), block)]
            case Ended():
                bound = event.reason is FinishReason.LENGTH and self._context_bound
                self._stop = answers.StopDelta(
                    stop_reason="model_context_window_exceeded" if bound else event.reason.anthropic
                )
                if event.reason is FinishReason.STOP and isinstance(event.stop, str):
                    self._stop = answers.StopDelta(stop_reason="stop_sequence", stop_sequence=event.stop)
                return self._close(cut=event.reason is not FinishReason.TOOL_CALLS)
            case Usage(final=True):
                assert self._stop is not None
                return [answers.MessageDelta(delta=self._stop, usage=answers.Usage.of(event)), answers.MessageStop()]
            case Begun() | Usage() | Progress():
                return []  # `start` returns the beginning; no request of this API asks for progress

    def _say(self, kind: _Kind, text: str) -> list[answers.MessageEvent]:
        if self._open == kind:
            return self._words(kind, text)
        if self._space is not None and self._space[0] == kind:
            text = self._space[1] + text
        if not text.strip():
            self._space = kind, text
            return []
        block = answers.TextBlock(text="") if kind == "text" else answers.ThinkingBlock(thinking="", signature="")
        if self._index >= 0:
            text = text.lstrip()
        return [*self._close(), *self._begin(kind, block), *self._words(kind, text)]

    def _words(self, kind: _Kind, text: str) -> list[answers.MessageEvent]:
        if kind == "text":
            return self._delta(answers.TextDelta(text=text))
        return self._delta(answers.ThinkingDelta(thinking=text)) if self._show_thinking else []

    def _json(self, text: str) -> list[answers.MessageEvent]:
        return self._delta(answers.InputJsonDelta(partial_json=text)) if text else []

    def _delta(self, delta: Any) -> list[answers.MessageEvent]:
        return [answers.ContentBlockDelta(index=self._index, delta=delta)]

    def _begin(self, kind: _Kind | ToolInput, block: answers.ContentBlock) -> list[answers.MessageEvent]:
        self._index += 1
        self._open, self._space = kind, None
        return [answers.ContentBlockStart(index=self._index, content_block=block)]

    def _close(self, *, cut: bool = False) -> list[answers.MessageEvent]:
        """Close the open block; `cut` means that the answer ended here without completing a call."""
        kind, self._open, self._space = self._open, None, None
        if kind is None:
            return []
        events: list[answers.MessageEvent] = []
        if kind == "thinking":
            events += self._delta(answers.SignatureDelta(signature=answers.SIGNATURE))
        elif isinstance(kind, ToolInput):
            events += self._json(kind.finish(cut=cut))
        return [*events, answers.ContentBlockStop(index=self._index)]


def join_message(events: Sequence[answers.MessageEvent]) -> answers.Message:
    """Join `events` to the whole message."""
    start = events[0]
    assert isinstance(start, answers.MessageStart)
    message, blocks = start.message, list[answers.ContentBlock]()
    deltas: list[list[answers.ContentBlockDelta]] = []
    for event in events:
        if isinstance(event, answers.ContentBlockStart):
            blocks.append(event.content_block)
            deltas.append([])
        elif isinstance(event, answers.ContentBlockDelta):
            deltas[event.index].append(event)
        elif isinstance(event, answers.MessageDelta):
            message = replace(
                message,
                stop_reason=event.delta.stop_reason,
                stop_sequence=event.delta.stop_sequence,
                usage=event.usage,
            )
    return replace(message, content=tuple(_filled(block, news) for block, news in zip(blocks, deltas, strict=True)))


def _filled(block: answers.ContentBlock, news: Sequence[answers.ContentBlockDelta]) -> answers.ContentBlock:
    deltas = [one.delta for one in news]
    if isinstance(block, answers.TextBlock):
        return answers.TextBlock(text="".join(one.text for one in deltas if isinstance(one, answers.TextDelta)))
    if isinstance(block, answers.ThinkingBlock):
        thoughts = "".join(one.thinking for one in deltas if isinstance(one, answers.ThinkingDelta))
        return answers.ThinkingBlock(thinking=thoughts, signature=answers.SIGNATURE)
    text = "".join(one.partial_json for one in deltas if isinstance(one, answers.InputJsonDelta))
    return replace(block, input=parsed_input(text))
