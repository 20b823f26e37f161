"""TurnReader: the chunks of one answer -> events while they come, and the whole message at the end.

It takes what OpenAI-compatible servers send: names and ids once or in every piece, whole calls in one piece, several
calls under one index, ids that were used in an earlier turn (which get new ones), no ids at all.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from msgspec import UNSET

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai.protocol.chat import ChatCompletionChunk, ChunkChoice, ToolCallDelta
from candle_vllm.openai.protocol.fields import MAX_NAME, MAX_TOOL_CALLS
from candle_vllm.openai.protocol.usage import Usage
from candle_vllm.responses.conversation.events import (
    CallArgumentsDelta,
    CallStarted,
    Event,
    ReasoningDelta,
    TextDelta,
    TurnFinished,
)
from candle_vllm.responses.conversation.options import ConversationUsage

MAX_CHARS = 16 << 20  # of one turn: text, thoughts and arguments together
_UNNAMED = "unnamed"


class _Call:
    def __init__(self, given_id: str, call_id: str) -> None:
        self.given_id = given_id
        self.id = call_id
        self.name = ""
        self.arguments: list[str] = []


class TurnReader:
    """Reads one answer.

    Args:
        number: of the turn.
        used_ids: ids of earlier calls, which no new call may have.
    """

    def __init__(self, number: int, used_ids: Collection[str] = ()) -> None:
        self._number = number
        self._used = set(used_ids)
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[_Call] = []
        self._at: dict[int, int] = {}  # index in the chunks -> our own
        self._size = 0
        self._finish = ""
        self._usage = ConversationUsage()

    def read(self, chunk: ChatCompletionChunk) -> list[Event]:
        """What is new; raises `CandleVllmError` for an answer beyond all bounds."""
        if isinstance(chunk.usage, Usage):
            self._usage = _usage(chunk.usage)
        events: list[Event] = []
        for choice in chunk.choices:
            if choice.index == 0:
                events += self._read_choice(choice)
        return events

    def end(self) -> list[Event]:
        """What is left to say: the whole turn, and before it the calls that never got a name."""
        late = [event for index, call in enumerate(self._calls) if not call.name for event in self._name(index, "")]
        return [*late, self._finished()]

    def _finished(self) -> TurnFinished:
        """The turn; an answer that ended neither by itself nor with calls counts as cut."""
        reason = self._finish or "stop"
        if reason in ("stop", "tool_calls", "function_call"):
            reason = "tool_calls" if self._calls else "stop"
        else:
            reason = "length"
        return TurnFinished(number=self._number, message=self._message(), finish_reason=reason, usage=self._usage)

    def _read_choice(self, choice: ChunkChoice) -> list[Event]:
        events: list[Event] = []
        delta = choice.delta
        if delta.reasoning_content:
            self._grow(delta.reasoning_content, self._thoughts)
            events.append(ReasoningDelta(text=delta.reasoning_content))
        logprobs = choice.logprobs.content if choice.logprobs is not None else ()
        if delta.content or logprobs:
            self._grow(delta.content or "", self._text)
            events.append(TextDelta(text=delta.content or "", logprobs=logprobs))
        for call in delta.tool_calls or ():
            events += self._read_call(call)
        self._finish = choice.finish_reason or self._finish
        return events

    def _read_call(self, delta: ToolCallDelta) -> list[Event]:
        index = self._slot(delta)
        call = self._calls[index]
        function = delta.function
        if function is None:
            return []
        events = self._name(index, function.name) if function.name and not call.name else []
        if function.arguments:
            self._grow(function.arguments, call.arguments)
            if call.name:
                events.append(CallArgumentsDelta(index=index, call_id=call.id, delta=function.arguments))
        return events

    def _name(self, index: int, name: str) -> list[Event]:
        """The beginning of a call, with the arguments that came before its name."""
        call = self._calls[index]
        call.name = name[:MAX_NAME] or _UNNAMED
        events: list[Event] = [CallStarted(index=index, call_id=call.id, name=call.name)]
        if call.arguments:
            events.append(CallArgumentsDelta(index=index, call_id=call.id, delta="".join(call.arguments)))
        return events

    def _slot(self, delta: ToolCallDelta) -> int:
        """Our index of the call that a piece belongs to; another id and a name under the same index begin another."""
        known = self._at.get(delta.index)
        given = delta.id or ""
        named = delta.function is not None and delta.function.name
        if known is not None and not (named and given and given != self._calls[known].given_id):
            return known
        if len(self._calls) >= MAX_TOOL_CALLS:
            raise CandleVllmError(f"The model asked for more than {MAX_TOOL_CALLS} calls in one turn.")
        call_id = given if given and len(given) <= MAX_NAME and given not in self._used else f"call_{uuid.uuid4().hex}"
        self._used.add(call_id)
        self._at[delta.index] = len(self._calls)
        self._calls.append(_Call(given, call_id))
        return self._at[delta.index]

    def _grow(self, text: str, parts: list[str]) -> None:
        self._size += len(text)
        if self._size > MAX_CHARS:
            raise CandleVllmError(f"The model's answer has more than {MAX_CHARS} characters.")
        parts.append(text)

    def _message(self) -> dict[str, Any]:
        text, thoughts = "".join(self._text), "".join(self._thoughts)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts:
            message["reasoning_content"] = thoughts
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(call.arguments)},
                }
                for call in self._calls
            ]
        if not text and (thoughts or self._calls):
            message["content"] = None
        return message


def _usage(usage: Usage) -> ConversationUsage:
    details = usage.completion_tokens_details
    return ConversationUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        reasoning_tokens=0 if details is UNSET else details.reasoning_tokens,
    )
