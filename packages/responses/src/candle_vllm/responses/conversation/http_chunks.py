# SPDX-License-Identifier: MIT
"""Convert the JSON chunks of a chat stream to events, and tolerate the differences of OpenAI-compatible servers.

The reader accepts: `reasoning` for `reasoning_content`, content as a list of parts or as `refusal`, names and ids of
calls in one chunk or in every chunk, whole calls in one chunk, several calls with one index, calls without index, id or
name, usage without details. A missing value gets a neutral default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from candle_vllm.core.engine.outputs import FinishReason, PositionLogprobs, TokenLogprob
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.sampling.params import MAX_SEQUENCES
from candle_vllm.openai.events import Begun, CallBegun, CallText, Ended, Event, Head, Text, Thought, Usage
from candle_vllm.openai.protocol.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from candle_vllm.openai.protocol.fields import MAX_TOOL_CALLS
from candle_vllm.responses.conversation.turn_reader import MAX_CHARS

_FAILURES = ("error", "abort", "content_filter")  # OpenRouter, vLLM, OpenAI and Azure


class _Call:
    def __init__(self, given_id: str) -> None:
        self.given_id, self.name = given_id, ""
        self.begun = False
        self.held: list[str] = []  # arguments that came before the name


class ChunkReader:
    """Reads the chunks of one stream."""

    def __init__(self) -> None:
        self._head: Head | None = None
        self._choices: dict[int, _Choice] = {}

    @property
    def finished(self) -> bool:
        """Whether every answer has a finish reason."""
        return bool(self._choices) and all(choice.reason for choice in self._choices.values())

    @property
    def failure(self) -> str:
        """The finish reason of an answer that the server did not finish, or ""."""
        return next((choice.reason for choice in self._choices.values() if choice.reason in _FAILURES), "")

    def read(self, data: Mapping[str, Any]) -> list[Event]:
        """Return the events of one chunk; raises `CandleVllmError` for an answer that exceeds the limits."""
        events: list[Event] = []
        if self._head is None:
            self._head = Head(
                id=_text(data, "id") or "",
                created=_count(data, "created"),
                model=_text(data, "model") or "",
                system_fingerprint=_text(data, "system_fingerprint") or "",
            )
            events += self._begin(0, self._head)
        choices = _list(data, "choices")
        for choice in choices:
            if isinstance(choice, dict):
                number = _count(choice, "index")
                if number not in self._choices:
                    events += self._begin(number, self._head)
                events += self._choices[number].read(choice)
        usage = data.get("usage")
        if isinstance(usage, dict):
            events.append(_usage(usage, final=not choices))
        return events

    def end(self) -> list[Event]:
        """Return the last events of all answers."""
        return [event for choice in (self._choices or {0: _Choice(0)}).values() for event in choice.end()]

    def _begin(self, number: int, head: Head) -> list[Event]:
        if len(self._choices) >= MAX_SEQUENCES:
            raise CandleVllmError(f"The model server sent more than {MAX_SEQUENCES} answers to one request.")
        self._choices[number] = _Choice(number)
        return [Begun(number, head)]


class _Choice:
    """One answer of a stream; `reason` is the finish reason as the server spelled it."""

    def __init__(self, number: int) -> None:
        self.reason = ""
        self._number = number
        self._next_index = 0
        self._calls: list[_Call] = []
        self._indices: dict[int, int] = {}  # index of a call in the chunks -> index in `_calls`
        self._held = 0

    def end(self) -> list[Event]:
        """Return the last events: calls whose name never came, and the finish reason.

        Servers have many finish reasons for a natural end (`eos_token`, `complete`, or no reason). If there are calls,
        the last of which may be incomplete, an unknown reason counts as LENGTH.
        """
        unknown = FinishReason.LENGTH if self._calls and self.reason else FinishReason.STOP
        nameless = [number for number, call in enumerate(self._calls) if not call.begun]
        events = [event for number in nameless for event in self._name(number, "")]
        return [*events, Ended(self._number, FinishReason.read(self.reason) or unknown)]

    def read(self, choice: dict[str, Any]) -> list[Event]:
        """Return the events of this answer's part of a chunk."""
        self.reason = _text(choice, "finish_reason") or self.reason  # some servers write "" for no reason
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        events: list[Event] = []
        if thoughts := _text(delta, "reasoning_content") or _text(delta, "reasoning"):
            events.append(Thought(self._number, thoughts))
        content, logprobs = _content(delta.get("content")), _logprobs(choice.get("logprobs"))
        content = content or _text(delta, "refusal") or ""
        if content or logprobs:
            events.append(Text(self._number, content, None, logprobs))
        for call in _list(delta, "tool_calls"):
            if isinstance(call, dict):
                events += self._call(call)
        return events

    def _call(self, call: dict[str, Any]) -> list[Event]:
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments = _text(function, "name") or "", function.get("arguments")
        if isinstance(arguments, str):
            arguments = _whole(arguments)
        elif arguments is not None:
            arguments = json.dumps(arguments)  # some servers send the object itself
        number = self._index_of(call, name)
        known = self._calls[number]
        events = self._name(number, name) if name and not known.begun else []
        if arguments and known.begun:
            events.append(CallText(self._number, number, arguments))
        elif arguments:
            self._held += len(arguments)
            if self._held > MAX_CHARS:
                raise CandleVllmError(f"The model's answer has more than {MAX_CHARS} characters.")
            known.held.append(arguments)
        return events

    def _name(self, number: int, name: str) -> list[Event]:
        """Return the beginning of a call, with the arguments that came before its name."""
        call = self._calls[number]
        call.begun, call.name = True, name
        events: list[Event] = [CallBegun(self._number, number, call.given_id, name)]
        return [*events, CallText(self._number, number, "".join(call.held))] if call.held else events

    def _index_of(self, call: dict[str, Any], name: str) -> int:
        """Return the index in `_calls` for a delta; a name with another id under a known index begins a new call."""
        index, given = call.get("index"), _text(call, "id") or ""
        if not isinstance(index, int):  # an id continues the last call that has it; otherwise a name begins a call
            begun = ((at, self._calls[number]) for at, number in reversed(self._indices.items()) if given)
            same = (at for at, one in begun if one.given_id == given and (not name or one.name in ("", name)))
            index = next(same, self._next_index if name else max(self._next_index - 1, 0))
        self._next_index = max(self._next_index, index + 1)
        known = self._indices.get(index)
        if known is not None and not (name and given and given != self._calls[known].given_id):
            return known
        if len(self._calls) >= MAX_TOOL_CALLS:
            raise CandleVllmError(f"The model asked for more than {MAX_TOOL_CALLS} calls in one turn.")
        self._indices[index] = len(self._calls)
        self._calls.append(_Call(given))
        return self._indices[index]


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    return _whole(value) if isinstance(value, str) else None


def _whole(text: str) -> str:
    """Return the text with "?" for lone surrogates, which JSON can contain but a message cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 1 << 53 else 0


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    return value if isinstance(value, list) else []


def _content(value: Any) -> str:
    if isinstance(value, list):
        return "".join(_text(part, "text") or "" for part in value if isinstance(part, dict))
    return _whole(value) if isinstance(value, str) else ""


def _logprobs(value: Any) -> Sequence[PositionLogprobs] | None:
    """Convert OpenAI's logprobs to the engine's, without ids and ranks; None for another format."""
    if not isinstance(value, dict):
        return None
    try:
        given = msgspec.convert(_with_bytes(value), ChatLogprobs)
        return [PositionLogprobs(_token(one), tuple(map(_token, one.top_logprobs))) for one in given.content]
    except ValueError:  # the base of msgspec's error
        return None


def _token(entry: ChatTokenLogprob | TopLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=-1, logprob=entry.logprob, rank=0, text=entry.token, bytes=bytes(entry.bytes))


def _with_bytes(value: Any) -> Any:
    """Replace a null `bytes` by an empty list; servers send null for tokens that are not valid text."""
    if isinstance(value, dict):
        return {key: [] if key == "bytes" and item is None else _with_bytes(item) for key, item in value.items()}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value


def _usage(usage: dict[str, Any], *, final: bool) -> Usage:
    cached, reasoning = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return Usage(
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(cached, "cached_tokens") if isinstance(cached, dict) else 0,
        reasoning_tokens=_count(reasoning, "reasoning_tokens") if isinstance(reasoning, dict) else None,
        final=final,
    )
