# SPDX-License-Identifier: MIT
"""Events -> chunks of a chat answer, and chunks -> the whole answer (step 10 of a request's life).

A whole answer is joined from the chunks of a stream, so the two cannot differ.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from candle_vllm.openai.events import Begun, CallBegun, CallText, Ended, Event, Progress, Text, Thought, Usage
from candle_vllm.openai.logprobs import chat_logprobs, prompt_logprobs
from candle_vllm.openai.protocol import chat
from candle_vllm.openai.protocol import usage as wire
from candle_vllm.openai.protocol.completions import CompletionChoice
from candle_vllm.openai.protocol.custom_tools import custom_input
from candle_vllm.openai.protocol.generation import GenerationFields

Chunk = TypeVar("Chunk")


class Told(NamedTuple):
    """Whether the final usage also counts the tokens of a predicted answer, and draft tokens."""

    predicted: bool = False
    drafts: bool = False


class AnswerWriter(ABC, Generic[Chunk]):
    """Base of the writers of chat and completion chunks; it adds the answer's head and the token counts.

    Args:
        make: creates a chunk from its fields.
        request: the request, which selects the fields of chunks.
        whole: whether the last chunk always has the counts, for a whole answer.
    """

    repeats = True
    _empty: ClassVar[Any]  # a choice without text
    _timings: RunningTimings | None = None

    def __init__(self, make: Callable[..., Chunk], request: GenerationFields, *, whole: bool) -> None:
        self._make = make
        self._no_ids = () if request.return_token_ids else UNSET
        self._usage_last = whole or request.include_usage
        self._usage_beside = request.continuous_usage
        self._told = told_of(request)
        self._fields: dict[str, Any] = {"usage": None} if request.include_usage else {}  # of chunks without progress

    def write(self, events: Sequence[Event]) -> list[Chunk]:
        return list(filter(None, map(self._written, events)))

    @abstractmethod
    def _written(self, event: Event) -> Chunk | None: ...

    def _counts(self, usage: Usage | Progress) -> Chunk | None:
        """Return a chunk for progress or for the requested final usage; keep other counts, which later chunks carry."""
        if isinstance(usage, Progress):
            beside = {} if self._timings is None else {"timings": wire_timings(usage.usage)}
            choice = replace(self._empty, index=usage.choice)
            return self._make(**usage.head._asdict(), choices=(choice,), prompt_progress=wire_progress(usage), **beside)
        if self._usage_beside or (usage.final and self._usage_last):
            self._fields["usage"] = wire_usage(usage, self._told)
        if self._timings is not None:
            self._fields["timings"] = self._timings.of(usage)
        shown = usage.final and (self._usage_last or self._timings is not None)
        return self._make(**self._fields, choices=()) if shown else None

    def _ended(self, event: Ended) -> Chunk:
        end: dict[str, Any] = {"finish_reason": event.reason.openai, "stop_reason": event.stop}
        return self._chunk(replace(self._empty, index=event.choice, token_ids=self._no_ids, **end))

    def _chunk(self, choice: object, **extras: Any) -> Chunk:
        return self._make(**{**self._fields, "choices": (choice,), **extras})


class ChatWriter(AnswerWriter[chat.ChatCompletionChunk]):
    """Writes the chunks of one chat answer.

    Each choice begins with its role, and ends with a chunk that has its finish reason and no text.

    Args:
        prompt_token_ids: tokens of the prompt, returned if the request asks for token ids.
        prompt: the rendered prompt, returned if the request is `verbose`.
        calls: whether choices may have tool calls.
    """

    _empty = chat.ChunkChoice(index=0, delta=chat.ChatDelta())

    def __init__(
        self,
        request: chat.ChatCompletionRequest,
        prompt_token_ids: Sequence[int],
        prompt: str = "",
        *,
        calls: bool = False,
        whole: bool = False,
    ) -> None:
        super().__init__(chat.ChatCompletionChunk, request, whole=whole)
        self._request = request
        # OpenAI's client adds deltas up: a message that has only calls must have null content, not an empty text.
        self._no_content = None if calls else ""
        self._by_id = bool(request.return_tokens_as_token_ids)
        self._extras: dict[str, Any] = request.labels  # of the first chunk
        if request.timings_per_token:
            self._timings = RunningTimings()
        if request.verbose:
            self._extras["verbose"] = wire.ShownPrompt(prompt)
        if request.return_token_ids:
            self._extras["prompt_token_ids"] = tuple(prompt_token_ids)

    def _written(self, event: Event) -> chat.ChatCompletionChunk | None:
        if isinstance(event, Text):
            return self._news(event, chat.ChatDelta(content=event.text or self._no_content))
        if isinstance(event, Thought):
            return self._news(event, chat.ChatDelta(reasoning_content=event.text, reasoning=event.text))
        if isinstance(event, CallText):
            call = chat.ToolCallDelta(index=event.call, function=chat.FunctionCallDelta(arguments=event.text))
            return self._news(event, chat.ChatDelta(tool_calls=(call,)))
        if isinstance(event, CallBegun):
            function = chat.FunctionCallDelta(name=event.name, arguments="")
            call = chat.ToolCallDelta(index=event.call, id=event.id, type="function", function=function)
            return self._news(event, chat.ChatDelta(tool_calls=(call,)))
        if isinstance(event, Begun):
            return self._first(event)
        if isinstance(event, Ended):
            return self._ended(event)
        return self._counts(event)

    def _news(self, event: Text | Thought | CallBegun | CallText, delta: chat.ChatDelta) -> chat.ChatCompletionChunk:
        logprobs = None if event.logprobs is None else chat_logprobs(event.logprobs, by_id=self._by_id)
        ids = UNSET if event.ids is None else event.ids
        return self._chunk(chat.ChunkChoice(index=event.choice, delta=delta, logprobs=logprobs, token_ids=ids))

    def _first(self, event: Begun) -> chat.ChatCompletionChunk:
        extras, self._extras = self._extras, {}
        self._fields |= event.head._asdict()
        if event.prompt_logprobs is not None and self._request.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(event.prompt_logprobs, self._request.prompt_logprobs)
        role = chat.ChunkChoice(index=event.choice, delta=chat.ChatDelta(role="assistant", content=self._no_content))
        return self._chunk(role, timings=UNSET, **extras)


class CustomCallWriter(ChatWriter):
    """`ChatWriter` of a request with custom tools: the input of a custom call follows when the call is complete."""

    def __init__(self, request: chat.ChatCompletionRequest, *arguments: Any, **options: Any) -> None:
        super().__init__(request, *arguments, **options)
        self._custom = request.custom_tools
        self._inputs: dict[int, tuple[int, list[str]]] = {}  # choice -> index and arguments of its pending custom call

    def write(self, events: Sequence[Event]) -> list[chat.ChatCompletionChunk]:
        chunks: list[chat.ChatCompletionChunk] = []
        for event in events:
            # a `Text` without text only has the token ids and log-probabilities of an output, also within a call
            empty = isinstance(event, Text) and not event.text
            if not empty and not isinstance(event, (CallText, Usage)) and event.choice in self._inputs:
                number, parts = self._inputs.pop(event.choice)
                custom = chat.CustomCallDelta(input=custom_input("".join(parts)))
                delta = chat.ChatDelta(tool_calls=(chat.ToolCallDelta(index=number, custom=custom),))
                chunks.append(self._chunk(chat.ChunkChoice(index=event.choice, delta=delta, token_ids=self._no_ids)))
            chunks += super().write([event])
        return chunks

    def _written(self, event: Event) -> chat.ChatCompletionChunk | None:
        if isinstance(event, CallText) and event.choice in self._inputs:
            number, parts = self._inputs[event.choice]
            parts.append(event.text)
            if event.ids is None and event.logprobs is None:  # else they are reported at once
                return None
            call = chat.ToolCallDelta(index=number, custom=chat.CustomCallDelta(input=""))
            return self._news(event, chat.ChatDelta(tool_calls=(call,)))
        if isinstance(event, CallBegun) and event.name in self._custom:
            self._inputs[event.choice] = event.call, []
            custom = chat.CustomCallDelta(name=event.name, input="")
            call = chat.ToolCallDelta(index=event.call, id=event.id, type="custom", custom=custom)
            return self._news(event, chat.ChatDelta(tool_calls=(call,)))
        return super()._written(event)


def told_of(request: GenerationFields) -> Told:
    """Return the extra counts that a request selects."""
    predicted = isinstance(request, chat.ChatCompletionRequest) and request.prediction is not None
    return Told(predicted, bool(request.return_draft_counts))


def wire_usage(usage: Usage, told: Told = Told()) -> wire.Usage:  # noqa: B008  # it is immutable
    """Convert token counts to OpenAI's form."""
    more: dict[str, int] = {}
    if told.predicted and usage.final:
        more["accepted_prediction_tokens"] = usage.accepted_predicted_tokens
        more["rejected_prediction_tokens"] = usage.predicted_tokens - usage.accepted_predicted_tokens
    if told.drafts and usage.final:
        more |= {"draft_tokens": usage.draft_tokens, "accepted_draft_tokens": usage.accepted_draft_tokens}
    details: wire.CompletionTokensDetails | UnsetType = UNSET
    if more or usage.reasoning_tokens is not None:
        details = wire.CompletionTokensDetails(usage.reasoning_tokens or 0, **more)
    return wire.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=wire.PromptTokensDetails(usage.cached_tokens),
        completion_tokens_details=details,
        prompt_time_costs=UNSET if usage.prompt_ms is None else round(usage.prompt_ms),
        completion_time_costs=UNSET if usage.completion_ms is None else round(usage.completion_ms),
    )


def wire_timings(usage: Usage, prompt_ms: float | None = None, predicted_ms: float | None = None) -> wire.Timings:
    """Convert counts and times to llama.cpp's form; a time of None uses the one in `usage`."""
    prompt, predicted = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    prompt_ms = usage.prompt_ms or 0 if prompt_ms is None else prompt_ms
    predicted_ms = usage.completion_ms or 0 if predicted_ms is None else predicted_ms
    return wire.Timings(
        cache_n=usage.cached_tokens,
        prompt_n=prompt,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=prompt_ms / max(prompt, 1),
        prompt_per_second=1000 * prompt / max(prompt_ms, 1),
        predicted_n=predicted,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=predicted_ms / max(predicted, 1),
        predicted_per_second=1000 * predicted / max(predicted_ms, 1),
        draft_n=usage.draft_tokens or UNSET,
        draft_n_accepted=usage.accepted_draft_tokens if usage.draft_tokens else UNSET,
    )


def wire_progress(event: Progress) -> wire.PromptProgress:
    """Convert a report of progress to llama.cpp's form."""
    counts = event.usage
    return wire.PromptProgress(
        total=event.total,
        cache=counts.cached_tokens,
        processed=counts.prompt_tokens,
        time_ms=round(counts.prompt_ms or 0),
    )


class RunningTimings:
    """Timings of a running answer, which this process measures; the engine measures the final timings."""

    def __init__(self) -> None:
        self._submitted = time.perf_counter()
        self._first: float | None = None

    def of(self, usage: Usage) -> wire.Timings:
        """Return the timings for the counts so far, or the final timings."""
        now = time.perf_counter()
        if usage.final:
            return wire_timings(usage)
        self._first = now if self._first is None else self._first
        return wire_timings(usage, round(1000 * (self._first - self._submitted)), round(1000 * (now - self._first)))


def join_chat(chunks: Sequence[chat.ChatCompletionChunk]) -> chat.ChatCompletion:
    """Join chunks, the last of which has the usage, to the whole answer."""
    head, usage = chunks[0], chunks[-1].usage
    assert isinstance(usage, wire.Usage)
    return chat.ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.system_fingerprint,
        choices=tuple(_join_choice(*parts) for parts in by_choice(chunk.choices for chunk in chunks)),
        usage=usage,
        prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs is not UNSET), None),
        prompt_token_ids=None if head.prompt_token_ids is UNSET else head.prompt_token_ids,
        conversation_id=head.conversation_id,
        resource_id=head.resource_id,
        timings=chunks[-1].timings,
        verbose=head.verbose,
    )


ChoicePart = TypeVar("ChoicePart", chat.ChunkChoice, CompletionChoice)


def by_choice(chunks: Iterable[Sequence[ChoicePart]]) -> list[tuple[int, list[ChoicePart]]]:
    """Group the parts by choice, in the order of the choices."""
    choices: dict[int, list[ChoicePart]] = {}
    for parts in chunks:
        for part in parts:
            choices.setdefault(part.index, []).append(part)
    return sorted(choices.items())


def _join_choice(index: int, parts: Sequence[chat.ChunkChoice]) -> chat.ChatChoice:
    last = parts[-1]
    assert last.finish_reason is not None
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return chat.ChatChoice(
        index=index,
        message=_join_message(parts),
        finish_reason=last.finish_reason,
        logprobs=chat.ChatLogprobs(tuple(entry for part in logprobs for entry in part.content)) if logprobs else None,
        stop_reason=None if last.stop_reason is UNSET else last.stop_reason,
        token_ids=join_token_ids([part.token_ids for part in parts]),
    )


def _join_message(parts: Sequence[chat.ChunkChoice]) -> chat.ChatMessage:
    """Join the message; its content is null if it is empty and there is reasoning or a call."""
    content = "".join(part.delta.content or "" for part in parts)
    thoughts = [part.delta.reasoning_content for part in parts if part.delta.reasoning_content is not None]
    calls = _join_calls(parts)
    return chat.ChatMessage(
        content=None if not content and (thoughts or calls) else content,
        reasoning_content="".join(thoughts) if thoughts else UNSET,
        reasoning="".join(thoughts) if thoughts else UNSET,
        tool_calls=calls or UNSET,
    )


def _join_calls(parts: Sequence[chat.ChunkChoice]) -> tuple[chat.ToolCallOut | chat.CustomToolCallOut, ...]:
    calls: list[tuple[chat.ToolCallDelta, list[str]]] = []
    for call in (call for part in parts for call in part.delta.tool_calls or ()):
        if call.id is not None:
            calls.append((call, []))
        news = call.custom.input if call.custom is not None else call.function and call.function.arguments
        calls[call.index][1].append(news or "")
    return tuple(_joined(call, "".join(texts)) for call, texts in calls)


def _joined(first: chat.ToolCallDelta, text: str) -> chat.ToolCallOut | chat.CustomToolCallOut:
    call_id, function, custom = first.id or "", first.function, first.custom
    if custom is not None:
        return chat.CustomToolCallOut(id=call_id, custom=chat.CustomCallOut(custom.name or "", text))
    return chat.ToolCallOut(id=call_id, function=chat.FunctionCallOut((function and function.name) or "", text))


def join_token_ids(parts: Sequence[tuple[int, ...] | UnsetType]) -> tuple[int, ...] | UnsetType:
    """Join the token ids of the parts that have ids; absent if no part has them."""
    known = [ids for ids in parts if ids is not UNSET]
    return tuple(token for ids in known for token in ids) if known else UNSET
