# SPDX-License-Identifier: MIT
"""TurnReader: converts the events of one answer to the conversation's events, and at the end to the whole message.

Invalid ids of calls, and ids that an earlier call has, are replaced.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import Any

from candle_vllm.core.engine.outputs import DRAFT_COUNTS, FinishReason, PositionLogprobs
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import events as answer
from candle_vllm.openai.logprobs import chat_logprobs
from candle_vllm.openai.protocol.fields import MAX_NAME, MAX_TOOL_CALLS
from candle_vllm.openai.task import Call, Message, TextPart
from candle_vllm.responses.conversation import events
from candle_vllm.responses.conversation.chat_form import chat_message
from candle_vllm.responses.conversation.options import ConversationUsage

MAX_CHARS = 16 << 20  # characters of one turn: text, reasoning and arguments together
_UNNAMED = "unnamed"


class _Growing:
    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.arguments: list[str] = []


class TurnReader:
    """Reads one answer: turn `number`. `used_ids` are ids of earlier calls, which no new call may have.

    Each `Progress` gives a `TurnMeasured` event; with `measures`, each `Usage` does as well.
    """

    def __init__(self, number: int, used_ids: Collection[str] = (), *, measures: bool = False) -> None:
        self._measures = measures
        self._number = number
        self._used = set(used_ids)
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, _Growing] = {}
        self._size = 0
        self._ended = FinishReason.STOP
        self._usage = ConversationUsage()

    def read(self, event: answer.Event) -> list[events.Event]:
        """Return the new events of choice 0; raises `CandleVllmError` if the answer exceeds the limits."""
        if isinstance(event, answer.Usage):
            self._usage = _usage(event)
            return [events.TurnMeasured(counts=event)] if self._measures else []
        if isinstance(event, answer.Progress):
            return [events.TurnMeasured(counts=event)]
        return self._read(event) if event.choice == 0 else []

    def finish(self) -> events.TurnFinished:
        whole = FinishReason.TOOL_CALLS if self._calls else FinishReason.STOP
        return events.TurnFinished(
            number=self._number,
            message=chat_message(self.message()),
            finish_reason=self._ended if self._ended.cut else whole,
            usage=self._usage,
        )

    def _read(self, event: answer.Event) -> list[events.Event]:
        match event:
            case answer.Text():
                self._grow(event.text, self._text)
                entries = _entries(event.logprobs)
                return [events.TextDelta(text=event.text, logprobs=entries)] if event.text or entries else []
            case answer.Thought():
                self._grow(event.text, self._thoughts)
                return [events.ReasoningDelta(text=event.text), *_alone(event.logprobs)]
            case answer.CallText():
                call = self._calls[event.call]
                self._grow(event.text, call.arguments)
                delta = events.CallArgumentsDelta(index=event.call, call_id=call.id, delta=event.text)
                return [*_alone(event.logprobs), delta]
            case answer.CallBegun():
                return [*_alone(event.logprobs), self._begin(event)]
            case answer.Ended():
                self._ended = event.reason
        return []

    def _begin(self, event: answer.CallBegun) -> events.CallStarted:
        if len(self._calls) >= MAX_TOOL_CALLS:
            raise CandleVllmError(f"The model asked for more than {MAX_TOOL_CALLS} calls in one turn.")
        usable = 0 < len(event.id) <= MAX_NAME and event.id not in self._used
        call = _Growing(event.id if usable else f"call_{uuid.uuid4().hex}", event.name[:MAX_NAME] or _UNNAMED)
        self._used.add(call.id)
        self._calls[event.call] = call
        return events.CallStarted(index=event.call, call_id=call.id, name=call.name)

    def _grow(self, text: str, parts: list[str]) -> None:
        self._size += len(text)
        if self._size > MAX_CHARS:
            raise CandleVllmError(f"The model's answer has more than {MAX_CHARS} characters.")
        parts.append(text)

    def message(self) -> Message:
        """Return the message so far, as a message of a task."""
        calls = (call for _, call in sorted(self._calls.items()))
        return Message(
            role="assistant",
            parts=(TextPart("".join(self._text)),),
            thoughts="".join(self._thoughts) or None,
            calls=tuple(Call(call.id, call.name, "".join(call.arguments)) for call in calls),
        )


def _entries(logprobs: Sequence[PositionLogprobs] | None) -> tuple[Any, ...]:
    return () if logprobs is None else chat_logprobs(logprobs).content


def _alone(logprobs: Sequence[PositionLogprobs] | None) -> list[events.Event]:
    """Return the logprobs of tokens that are not part of the answer's text, as an event."""
    return [events.TextDelta(text="", logprobs=_entries(logprobs))] if logprobs else []


def _usage(usage: answer.Usage) -> ConversationUsage:
    return ConversationUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens or 0,
        **{name: getattr(usage, name) for name in DRAFT_COUNTS},
    )
