# SPDX-License-Identifier: MIT
"""Ollama's answers: events -> lines of a stream, and lines -> the whole answer (step 10 of a request's life).

A whole answer is joined from the lines of a stream, so the two cannot differ. Durations are in nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.openai.answers import Writer
from candle_vllm.openai.anthropic.tool_input import ToolInput, parsed_input
from candle_vllm.openai.events import Begun, CallBegun, CallText, Ended, Event, Progress, Text, Thought, Usage
from candle_vllm.openai.logprobs import chat_logprobs
from candle_vllm.openai.protocol.chat import ChatTokenLogprob

_MS = 1_000_000  # nanoseconds in a millisecond


class FunctionCalled(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model calls; `index` counts the calls of an answer from 0."""

    index: int
    name: str
    arguments: dict[str, Any]


class CallMade(msgspec.Struct, frozen=True, kw_only=True):
    """A call; its arguments are incomplete if the answer was truncated in it."""

    id: str
    function: FunctionCalled


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the model, or a delta of it."""

    role: str = "assistant"
    content: str = ""
    thinking: str | UnsetType = UNSET
    tool_calls: tuple[CallMade, ...] | UnsetType = UNSET


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every line; only the last line has the counts and durations.

    Attributes:
        created_at: time as RFC 3339.
        done: true in the last line.
        done_reason: stop, length, load or unload.
        total_duration: time since the request arrived.
        load_duration: part of `total_duration` until the model was loaded and available.
        prompt_eval_count: tokens of the prompt.
        prompt_eval_duration: time from the first work on the prompt to the first token.
        eval_count: tokens of the answer.
        eval_duration: time from the first token of the answer to the last.
    """

    model: str
    created_at: str
    done: bool = False
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: tuple[ChatTokenLogprob, ...] | UnsetType = UNSET


class ChatLine(Line, frozen=True, kw_only=True):
    """One line of a chat stream, or the whole answer."""

    message: Said


class GenerateLine(Line, frozen=True, kw_only=True):
    """One line of a generate stream, or the whole answer; `context` continues the conversation."""

    response: str
    thinking: str | UnsetType = UNSET
    context: tuple[int, ...] | UnsetType = UNSET


class Vectors(msgspec.Struct, frozen=True, kw_only=True):
    """Embeddings of texts, in their order."""

    model: str
    embeddings: tuple[list[float], ...]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class Vector(msgspec.Struct, frozen=True):
    """Embedding of one text."""

    embedding: list[float]


class Failure(msgspec.Struct, frozen=True):
    """Body of a failed request, and the last line of a failed stream."""

    error: str


class Times(NamedTuple):
    """`time.perf_counter_ns()` when a request arrived, and when its model was loaded and available."""

    received: int
    loaded: int

    def durations(self) -> dict[str, Any]:
        """Return the durations until now."""
        return {
            "total_duration": time.perf_counter_ns() - self.received,
            "load_duration": self.loaded - self.received,
        }


def rfc3339(seconds: float) -> str:
    """Format Unix seconds as Ollama does."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def loaded_line(model: str, times: Times, reason: str, *, chat: bool) -> ChatLine | GenerateLine:
    """Return the answer to a request that only loads or unloads a model."""
    known: dict[str, Any] = {"model": model, "created_at": rfc3339(time.time()), "done": True, "done_reason": reason}
    known |= times.durations()
    return ChatLine(message=Said(), **known) if chat else GenerateLine(response="", **known)


class LineWriter(Writer[Line]):
    """Writes the lines of one answer, as `chat` lines or generate lines.

    `ends` are the end-of-sequence tokens, which have no log-probabilities in Ollama's API. With `context`, the prompt's
    tokens, the last line has a `context`: the tokens of prompt and answer.
    """

    def __init__(
        self, times: Times, *, chat: bool, ends: Sequence[int] = (), context: Sequence[int] | None = None
    ) -> None:
        self._times, self._chat, self._ends = times, chat, ends
        self._context = None if context is None else list(context)
        self._model = ""
        self._call: CallBegun | None = None
        self._input = ToolInput()
        self._parts: list[str] = []
        self._ended: Ended | None = None

    def write(self, events: Sequence[Event]) -> list[Line]:
        return [line for event in events for line in self._written(event)]

    def _written(self, event: Event) -> list[Line]:
        logprobs: Any = UNSET
        if isinstance(event, (Text, Thought, CallBegun, CallText)):
            if self._context is not None:
                self._context += event.ids or ()
            if shown := [one for one in event.logprobs or () if one.chosen.token_id not in self._ends]:
                logprobs = chat_logprobs(shown).content
        match event:
            case Begun():
                self._model = event.head.model
                return []
            case Text():
                return self._say(logprobs, text=event.text)
            case Thought():
                return self._say(logprobs, thought=event.text)
            case CallBegun():
                lines = self._called(cut=False)
                self._call, self._input, self._parts = event, ToolInput(), []
                return [*lines, *self._say(logprobs)]
            case CallText():
                self._parts.append(self._input.feed(event.text))
                return self._say(logprobs)
            case Ended():
                self._ended = event
                return self._called(cut=event.reason is not FinishReason.TOOL_CALLS)
            case Usage(final=True):
                assert self._ended is not None
                more: dict[str, Any] = {} if self._context is None else {"context": tuple(self._context)}
                more |= self._times.durations()
                line = self._line(
                    done=True,
                    done_reason=self._ended.reason.ollama,
                    prompt_eval_count=event.prompt_tokens,
                    prompt_eval_duration=round((event.prompt_ms or 0) * _MS),
                    eval_count=event.completion_tokens,
                    eval_duration=round((event.completion_ms or 0) * _MS),
                    **more,
                )
                return [line]
            case Usage() | Progress():
                return []  # no request of this API asks for progress

    def _say(self, logprobs: Any, text: str = "", thought: str = "") -> list[Line]:
        if not text and not thought and logprobs is UNSET:
            return []
        return [self._line(text, thought or UNSET, logprobs=logprobs)]

    def _line(self, text: str = "", thought: Any = UNSET, calls: Any = UNSET, **more: Any) -> Line:
        known: dict[str, Any] = {"model": self._model, "created_at": rfc3339(time.time()), **more}
        if self._chat:
            return ChatLine(message=Said(content=text, thinking=thought, tool_calls=calls), **known)
        return GenerateLine(response=text, thinking=thought, **known)

    def _called(self, *, cut: bool) -> list[Line]:
        """Return a line with the pending call, if there is one; `cut` means that the answer was truncated in it."""
        call, self._call = self._call, None
        if call is None:
            return []
        arguments = parsed_input("".join([*self._parts, self._input.finish(cut=cut)]))
        function = FunctionCalled(index=call.call, name=call.name, arguments=arguments)
        return [self._line(calls=(CallMade(id=call.id, function=function),))]


def join_lines(lines: Sequence[Line]) -> Line:
    """Join the lines of a stream to the whole answer."""
    logprobs = tuple(entry for line in lines if line.logprobs is not UNSET for entry in line.logprobs)
    last = replace(lines[-1], logprobs=logprobs or UNSET)
    if isinstance(last, ChatLine):
        said = [line.message for line in lines if isinstance(line, ChatLine)]
        calls = tuple(call for one in said if one.tool_calls is not UNSET for call in one.tool_calls)
        text, thinking = "".join(one.content for one in said), _thoughts(said)
        return replace(last, message=Said(content=text, thinking=thinking, tool_calls=calls or UNSET))
    texts = [line for line in lines if isinstance(line, GenerateLine)]
    return replace(last, response="".join(line.response for line in texts), thinking=_thoughts(texts))


def _thoughts(lines: Sequence[Said] | Sequence[GenerateLine]) -> str | UnsetType:
    return "".join(line.thinking for line in lines if line.thinking is not UNSET) or UNSET
