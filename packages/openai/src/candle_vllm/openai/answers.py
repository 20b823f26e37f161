# SPDX-License-Identifier: MIT
"""Outputs of the engine -> events of a request's answers, parsed by a plan -> chunks (step 10 of a request's life).

`AnswerReader` converts outputs to events. `AnswerStream` and `ChunkStream` convert each output when it arrives.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, Generic, NoReturn, Protocol, TypeVar
from uuid import uuid4

from msgspec.structs import replace

from candle_vllm.core.engine.outputs import DRAFT_COUNTS, FinishReason, PositionLogprobs, TokenOutput
from candle_vllm.core.engine.step.stream import PushStream, Receiver
from candle_vllm.core.errors import RequestAbortedError, RequestError
from candle_vllm.openai.errors import GenerationFailedError
from candle_vllm.openai.events import Begun, CallBegun, CallText, Ended, Event, Head, Progress, Text, Thought, Usage
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.formats import events as found
from candle_vllm.openai.formats.layout import BoundLayout, SpecialText
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.json_body import to_json_bytes
from candle_vllm.openai.task import Paths, Task

ChunkT = TypeVar("ChunkT")
WholeT = TypeVar("WholeT")
_ChunkT_co = TypeVar("_ChunkT_co", covariant=True)

_MANY_EVENTS = 1000
_MARK = uuid4().hex  # a text that occurs nowhere else


@dataclasses.dataclass(frozen=True)
class AnswerPlan:
    """How the answers of one request are parsed.

    Attributes:
        bound: layout of the model's output; None if the text needs no parsing.
        tools, held, lazy, most_calls, in_reasoning, behind_reasoning: as in `OutputParser`.
        forced: whether the answer has only reasoning and calls; where it is cut, its last text is the begun call's.
        show_reasoning: whether the reasoning is part of the answer.
        show_special_tokens: whether the names of special tokens are part of the answer's text.
        special_tokens: whether the engine's text contains the names of special tokens.
    """

    bound: BoundLayout | None = None
    tools: Mapping[str, Mapping[str, Any]] | None = None
    held: bool = False
    lazy: bool = False
    forced: bool = False
    most_calls: int | None = None
    in_reasoning: bool = False
    behind_reasoning: bool = False
    show_reasoning: bool = True
    show_special_tokens: bool = False
    special_tokens: bool = False

    @property
    def reasons(self) -> bool:
        """Whether answers may have reasoning."""
        return self.bound is not None and self.bound.layout.reasoning is not None


class ChoiceReader:
    """Parses the outputs of one choice.

    Args:
        plan: how the choice is parsed.
        choice: index of the choice.
        tell_ids: whether events have the ids of their tokens.

    Attributes:
        reasoning_tokens: number of tokens that begin or end within the reasoning.
    """

    reasoning_tokens = 0
    _last_call_is_whole = False
    _parser: OutputParser | None = None
    _special: SpecialText | None = None

    def __init__(self, plan: AnswerPlan, choice: int = 0, *, tell_ids: bool = False) -> None:
        self._choice = choice
        self._tell_ids = tell_ids
        self._plan = plan
        if plan.bound is not None:
            self._parser = OutputParser(
                plan.bound.layout,
                tools=plan.tools,
                in_reasoning=plan.in_reasoning,
                behind_reasoning=plan.behind_reasoning,
                held=plan.held,
                lazy=plan.lazy,
                most_calls=plan.most_calls,
                names=plan.bound.shown,
                shown=plan.bound.shown if plan.show_special_tokens else None,
            )
            if plan.special_tokens:
                self._special = SpecialText(plan.bound, keep=plan.show_special_tokens)

    def read(self, output: TokenOutput) -> list[Event]:
        """Return the output's events; the first has its ids and log-probabilities, and may be an empty `Text`."""
        ids = output.token_ids if self._tell_ids else None
        logprobs, parser = output.logprobs, self._parser
        if parser is None:
            events: list[Event] = [Text(self._choice, output.text, ids, logprobs)] if output.text else []
        else:
            parsed = self._parsed(parser, output)
            thoughts = parser.thoughts
            if not any(thoughts) and any(getattr(one, "kind", "") == "reasoning" for one in parsed):
                thoughts = (True,) * len(thoughts)  # one token opened and closed it
            if len(thoughts) != len(output.token_ids):  # the text is not divided by tokens
                thoughts = (any(thoughts),) * len(output.token_ids)
            self.reasoning_tokens += sum(thoughts)
            if logprobs and any(thoughts) and not self._plan.show_reasoning:
                logprobs = tuple(one for one, thought in zip(logprobs, thoughts) if not thought) or None
            elif logprobs and len(set(thoughts)) > 1:
                return self._divided(parsed, ids, logprobs, thoughts)
            events = self._events(parsed, ids, logprobs)
        if not events and output.token_ids and (logprobs is not None or ids is not None):
            return [Text(self._choice, "", ids, logprobs)]
        return events

    def _divided(
        self,
        parsed: Sequence[found.Event],
        ids: tuple[int, ...] | None,
        logprobs: Sequence[PositionLogprobs],
        thoughts: Sequence[bool],
    ) -> list[Event]:
        """Return the events of an output with tokens of the reasoning and others, each with its own log-probabilities.

        Tokens without an event of their kind, such as those of a mark, have an empty `Text`.
        """
        events: list[Event] = []
        for thought, group in itertools.groupby(zip(thoughts, logprobs, strict=True), lambda pair: pair[0]):
            own = tuple(entry for _, entry in group)
            fits = bool(parsed) and (getattr(parsed[0], "kind", "") == "reasoning") is thought
            made = self._events(parsed[:1], ids, own) if fits else []
            events += made or [Text(self._choice, "", ids, own)]
            parsed, ids = parsed[fits:], None
        return events + self._events(parsed, None, None)

    def end(self, output: TokenOutput) -> Ended:
        """Return the end of the choice, whose last output is `output`.

        For an answer with calls, STOP becomes TOOL_CALLS, unless a stop string or token ended the last call early.
        """
        reason = output.finish_reason
        assert reason is not None
        called = self._parser is not None and self._parser.num_calls > 0
        if called and reason is FinishReason.STOP and (output.stop_reason is None or self._last_call_is_whole):
            reason = FinishReason.TOOL_CALLS
        return Ended(self._choice, reason, output.stop_reason)

    def _parsed(self, parser: OutputParser, output: TokenOutput) -> list[found.Event]:
        parts, special = _by_token(output) if self._plan.reasons else [output.text], self._special
        if special is not None:
            parts = [special.add(part, () if number else output.special_tokens) for number, part in enumerate(parts)]
            parts[-1] += special.finish() if output.finish_reason is not None else ""
        parsed = parser.feed(*parts)
        if output.finish_reason is not None:
            whole = output.finish_reason is FinishReason.STOP and output.stop_reason is None
            parsed += parser.finish(whole)
            if self._plan.forced and not whole:
                parsed = [one for one in parsed if getattr(one, "kind", "") != "content"]
        return parsed

    def _events(
        self,
        parsed: Sequence[found.Event],
        ids: tuple[int, ...] | None,
        logprobs: Sequence[PositionLogprobs] | None,
    ) -> list[Event]:
        events: list[Event] = []
        choice = self._choice
        for one in parsed:
            if isinstance(one, found.TextPiece):
                if one.kind == "content":
                    events.append(Text(choice, one.text, ids, logprobs))
                elif self._plan.show_reasoning:
                    events.append(Thought(choice, one.text, ids, logprobs))
                else:
                    continue
            elif isinstance(one, found.CallArguments):
                events.append(CallText(choice, one.index, one.text, ids, logprobs))
            elif isinstance(one, found.CallStart):
                events.append(CallBegun(choice, one.index, one.id, one.name, ids, logprobs))
            else:
                self._last_call_is_whole = one.whole
                continue
            ids = logprobs = None
        return events


def _by_token(output: TokenOutput) -> list[str]:
    """Divide an output's text by its tokens, if it is known where; text behind the last token is the last token's."""
    ends = [0, *itertools.accumulate(output.text_sizes[:-1])]
    return [output.text[start:end] for start, end in zip(ends, [*ends[1:], None])]


@dataclasses.dataclass(slots=True)
class TokenCounts:
    """Sums the usage of a request whose prompts are numbered from 0; `completion` counts the generated tokens."""

    completion: int = 0
    _prompts: dict[int, int] = dataclasses.field(default_factory=dict[int, int])
    _cached: dict[int, int] = dataclasses.field(default_factory=dict[int, int])
    _prompt_ms: float | None = None
    _completion_ms: float | None = None
    _drafts: Counter[str] = dataclasses.field(default_factory=Counter[str])

    def add(self, prompt: int, output: TokenOutput, new_tokens: int) -> None:
        """Add the counts of one output."""
        self._prompts[prompt] = output.num_prompt_tokens
        if output.index == 0:  # the prompt's other sequences find it in the cache
            self._cached.setdefault(prompt, output.num_cached_tokens)
        self.completion += new_tokens
        if (times := output.metrics) is not None:
            self._prompt_ms = _longer(self._prompt_ms, times.first_scheduled_time, times.first_token_time)
            self._completion_ms = _longer(self._completion_ms, times.first_token_time, times.finished_time)
            self._drafts.update({name: getattr(times, name) for name in DRAFT_COUNTS})

    def usage(self, *, final: bool, reasoning: int | None = None) -> Usage:
        """Return the counts so far; if `final`, also the times and the counts of draft and predicted tokens."""
        last: dict[str, Any] = {"prompt_ms": self._prompt_ms, "completion_ms": self._completion_ms, **self._drafts}
        return Usage(
            prompt_tokens=sum(self._prompts.values()),
            completion_tokens=self.completion,
            cached_tokens=sum(self._cached.values()),
            reasoning_tokens=reasoning,
            final=final,
            **(last if final else {}),
        )


def _longer(known: float | None, start: float | None, end: float | None) -> float | None:
    if start is None or end is None:
        return known
    return max(round((end - start) * 1000, 3), known or 0)


class AnswerReader:
    """Converts the outputs of all choices of one request to events.

    Choice `i * task.choices + j` is sequence `j` of prompt `i`.

    Args:
        head: fields of the answer that are known in advance.
        plan: how choices are parsed.
        task: the task that is answered.
    """

    def __init__(self, head: Head, plan: AnswerPlan, task: Task) -> None:
        self.head = head
        self._task = task
        # Choices wait for the log-probabilities of their prompt, which arrive with its sequence 0.
        echoes = task.echo_prompts and task.sampling.get("logprobs") is not None
        self._awaited = set(range(len(task.prompts))) if echoes else set[int]()
        self._may_reason = plan.reasons
        count = max(len(task.prompts), 1) * task.choices
        self._readers = [ChoiceReader(plan, choice, tell_ids=task.tell_ids) for choice in range(count)]
        self._counts = TokenCounts()
        self._begun: set[int] = set()
        self._unfinished = len(self._readers)
        self._held: dict[int, list[TokenOutput]] = {}

    def add(self, prompt: int, output: TokenOutput) -> list[Event]:
        """Convert one output of prompt number `prompt` to events.

        Raises:
            RequestError: the engine aborted the sequence because of the request.
            GenerationFailedError, RequestAbortedError: the engine aborted the sequence.
        """
        if output.finish_reason is not None and not output.finish_reason.complete:
            _raise_failure(output, self._task.paths)
        choice = prompt * self._task.choices + output.index
        if (progress := output.progress) is not None:
            counts = Usage(
                prompt_tokens=progress.tokens,
                completion_tokens=0,
                cached_tokens=output.num_cached_tokens,
                prompt_ms=progress.seconds * 1000,
            )
            return [Progress(choice, self.head, output.num_prompt_tokens, counts)]
        if prompt in self._awaited:
            if output.prompt_logprobs is None:
                self._held.setdefault(prompt, []).append(output)
                return []
            self._awaited.remove(prompt)
        reader, task = self._readers[choice], self._task
        # To score a prompt, the engine must generate a token, which is not part of the answer.
        news = [] if task.scored_only else reader.read(output)
        new_tokens = 0 if task.scored_only else len(output.token_ids)
        if output.finish_reason is None and choice in self._begun and not task.tell_counts:
            self._counts.completion += new_tokens  # the only count that this output changes
            return news
        self._counts.add(prompt, output, new_tokens)
        events: list[Event] = [self._usage(final=False)] if task.tell_counts or not self._begun else []
        if choice not in self._begun:
            self._begun.add(choice)
            events.append(Begun(choice, self.head, prompt, output.prompt_logprobs))
            if task.echo:
                events.append(Text(choice, task.echo))
        events += news
        if output.finish_reason is not None:
            self._unfinished -= 1
            events.append(Ended(choice, FinishReason.LENGTH) if task.scored_only else reader.end(output))
        for held in self._held.pop(prompt, ()) if self._held else ():
            events += self.add(prompt, held)
        return events

    def end(self) -> list[Event]:
        """Return the final usage; raises `GenerationFailedError` if the outputs ended before their sequences did."""
        if self._unfinished:
            raise GenerationFailedError(f"the stream ended with {self._unfinished} sequences unfinished")
        return [self._usage(final=True)]

    def _usage(self, *, final: bool) -> Usage:
        reasoning = sum(one.reasoning_tokens for one in self._readers) if self._may_reason else None
        return self._counts.usage(final=final, reasoning=reasoning)


def _raise_failure(output: TokenOutput, paths: Paths) -> NoReturn:
    """Raise the error of a sequence that the engine aborted: `RequestError` if the request itself is the cause."""
    if output.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError("The request was aborted before it finished.")
    if output.error_kind == "request":
        with paths.blamed():
            raise RequestError(output.error or "the request was aborted and cannot be continued", output.error_param)
    raise GenerationFailedError(output.error or "the engine gave no reason")


# --- stages -----------------------------------------------------------------------------------------------------------


class Writer(Protocol[_ChunkT_co]):
    """Writes events in the form of an API."""

    repeats: bool = False  # whether chunks of a choice's texts without ids that follow each other differ in text only

    def write(self, events: Sequence[Event]) -> Sequence[_ChunkT_co]: ...


@dataclasses.dataclass(eq=False, repr=False)
class AnswerStream(PushStream[Event]):
    """Events of one answer, from the outputs of one or more engine streams.

    Attributes:
        sources: one stream for each prompt.
        reader: converts outputs to events.
        prompt: tokens of the first prompt.
    """

    sources: Sequence[PushStream[TokenOutput]]
    reader: AnswerReader
    prompt: Sequence[int] = ()

    @property
    def head(self) -> Head:
        """Fields of the answer that are known in advance."""
        return self.reader.head

    def push(
        self,
        receiver: Receiver[Any],
        write: Callable[[Sequence[Event]], Sequence[Any]] = lambda events: events,
        worded: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Push what `write` makes of the events; see `ChunkStream` for `worded`."""
        unended = set(range(len(self.sources)))
        for number, source in enumerate(self.sources):
            source.push(_Stage(number, self.reader, write, worded, receiver, unended))

    def hold(self, held: bool) -> None:
        for source in self.sources:
            source.hold(held)

    def close(self) -> None:
        for source in self.sources:
            source.close()


@dataclasses.dataclass(eq=False, repr=False)
class ChunkStream(PushStream[ChunkT]):
    """An answer in the form of an API.

    Attributes:
        events: events of the answer.
        writer: converts events to chunks.
        worded: returns a context manager that rewords errors for the API.
        first: chunks to send before the first token.
    """

    events: AnswerStream
    writer: Writer[ChunkT]
    worded: Callable[[], AbstractContextManager[object]] = nullcontext
    first: Sequence[ChunkT] = ()

    def push(self, receiver: Receiver[ChunkT]) -> None:
        if self.first:
            receiver.put(self.first)
        self.events.push(receiver, self.writer.write, self.worded)

    def encoded(self, encode: Callable[[ChunkT], bytes]) -> ChunkStream[bytes]:
        """Return the stream of the encoded chunks, which takes the place of this one."""
        first = [encode(chunk) for chunk in self.first]
        return ChunkStream(self.events, _EncodingWriter(self.writer, encode), self.worded, first)

    def hold(self, held: bool) -> None:
        self.events.hold(held)

    def close(self) -> None:
        self.events.close()

    async def whole(self, join: Callable[[list[ChunkT]], WholeT]) -> WholeT:
        """Return the joined chunks at the end, instead of `push`; cancelling this coroutine aborts the request.

        Deltas are joined before they are written; in a thread if there are many, or log-probabilities.
        """
        gathered = _Gathered()
        async with aclosing(self):
            self.events.push(gathered, worded=self.worded)
            await gathered.ended
        if gathered.errors:
            raise gathered.errors.pop()  # its traceback refers to this frame

        def written() -> WholeT:
            with self.worded():
                return join([*self.first, *self.writer.write(_with_joined_deltas(gathered.events))])

        logprobs = (getattr(one, "logprobs", None) or getattr(one, "prompt_logprobs", None) for one in gathered.events)
        large = len(gathered.events) > _MANY_EVENTS or any(logprobs)
        return await apart(written) if large else written()


class _EncodingWriter(Writer[bytes], Generic[ChunkT]):
    """Writes encoded chunks. If only the text differs from the chunk before, it encodes only the text."""

    def __init__(self, writer: Writer[ChunkT], encode: Callable[[ChunkT], bytes]) -> None:
        self._writer, self._encode = writer, encode
        self._frames: dict[int, list[bytes]] = {}  # by choice: the bytes before and after the text

    def write(self, events: Sequence[Event]) -> Sequence[bytes]:
        event = events[0]
        if len(events) > 1 or not isinstance(event, Text) or not event.text or event.ids is not event.logprobs:
            self._frames.clear()  # ids and log-probabilities differ unless both are None
            return self._encoded(events)
        if (frame := self._frames.get(event.choice)) is not None:
            return (to_json_bytes(event.text).join(frame),)
        chunks = self._encoded(events)
        if self._writer.repeats:
            self._frames[event.choice] = self._encoded([Text(event.choice, _MARK)])[0].split(to_json_bytes(_MARK))
        return chunks

    def _encoded(self, events: Sequence[Event]) -> list[bytes]:
        return [self._encode(chunk) for chunk in self._writer.write(events)]


class _Gathered:
    """The last stage of a whole answer: one wake-up of its task, not one for each token."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.errors: list[Exception] = []
        self.ended = asyncio.get_running_loop().create_future()

    def put(self, items: Sequence[Event]) -> None:
        self.events += items

    def end(self, error: Exception | None = None) -> None:
        self.errors += [] if error is None else [error]
        if not self.ended.done():
            self.ended.set_result(None)


def _with_joined_deltas(events: Sequence[Event]) -> list[Event]:
    """Join deltas of the same kind that follow each other, unless they have token ids or log-probabilities."""

    def kind(event: Event) -> object:
        if not isinstance(event, (Text, Thought, CallText)) or event.ids is not None or event.logprobs is not None:
            return id(event)
        return type(event), event.choice, event.call if isinstance(event, CallText) else None

    runs: list[list[Any]] = [list(run) for _, run in itertools.groupby(events, kind)]
    return [replace(run[0], text="".join(one.text for one in run)) if len(run) > 1 else run[0] for run in runs]


@dataclasses.dataclass(eq=False, slots=True)
class _Stage(Generic[ChunkT]):
    """The stage that converts the outputs of one prompt to events, and these to chunks.

    Attributes:
        number: index of the prompt.
        reader: reader for all prompts.
        write: converts events to chunks.
        worded: see `ChunkStream`.
        receiver: receives the chunks of all prompts.
        unended: indices of the prompts whose engine stream has not ended; shared by all stages.
    """

    number: int
    reader: AnswerReader
    write: Callable[[Sequence[Event]], Sequence[ChunkT]]
    worded: Callable[[], AbstractContextManager[object]]
    receiver: Receiver[ChunkT]
    unended: set[int]

    def put(self, items: Sequence[TokenOutput]) -> None:
        if self.number not in self.unended:
            return
        try:
            for piece in items:
                if (events := self.reader.add(self.number, piece)) and (chunks := self.write(events)):
                    self.receiver.put(chunks)
        except Exception as failure:
            self.end(failure)

    def end(self, error: Exception | None = None) -> None:
        if self.number not in self.unended:
            return
        self.unended.discard(self.number)
        if error is None and self.unended:
            return
        self.unended.clear()
        try:
            with self.worded():
                if error is not None:
                    raise error
                if chunks := self.write(self.reader.end()):
                    self.receiver.put(chunks)
        except Exception as failure:
            error = failure
        self.receiver.end(error)
        del error  # its traceback keeps this frame alive
