"""Transcript: the messages of a conversation, which grow only by what really happened.

An assistant message with calls is *open* until every call has its tool message. A call that has begun is never open
afterwards: where its result is lost (a timeout, a cancellation), a tool message says so, because running it again could
do its work twice. A call that has not begun stays open and may run later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.tool import ToolCall, ToolResult

Message = dict[str, Any]
LOST = "The call was cut off before its result was known. It may have done some or all of its work."


class Transcript:
    """Messages in OpenAI's form, and which calls of the last turn have begun.

    Args:
        messages: what was said before; copied.

    Raises:
        InvalidParameterError: something is no message or no JSON, or the calls of the last turn cannot be read.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        check_is_list(messages)
        self._messages: list[Message] = [_checked_message(message, place) for place, message in enumerate(messages)]
        self._given = len(self._messages)
        self._results: dict[str, str] = {}
        self._begun: set[str] = set()
        self._calls = _last_calls(self._messages)

    @property
    def messages(self) -> list[Message]:
        """All of them, a copy."""
        return _copied(self._shown())

    @property
    def added(self) -> tuple[Message, ...]:
        """Those that came after the ones it was made with, a copy."""
        return tuple(_copied(self._shown()[self._given :]))

    @property
    def grew(self) -> bool:
        """Whether a turn or a result was added."""
        return len(self._shown()) > self._given

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last assistant message that have no result, in its order."""
        return tuple(call for call in self._calls if call.id not in self._results)

    @property
    def call_ids(self) -> set[str]:
        """Ids of all calls; none may be used again."""
        calls = (call for message in self._messages for call in _calls_of(message))
        return {call["id"] for call in calls if isinstance(call, Mapping) and isinstance(call.get("id"), str)}

    def add_turn(self, message: Message) -> None:
        """Adds what the model said; the calls before it have their results."""
        assert not self.open_calls, "the calls of the last turn are open"
        self._messages = [*self._shown(), _copied(message)]
        self._results, self._begun = {}, set()
        self._calls = _last_calls(self._messages)

    def begin(self, call: ToolCall) -> None:
        """Notes that a call runs from now on."""
        self._begun.add(call.id)

    def add_result(self, result: ToolResult) -> None:
        """Adds a result; results stand in the order of the calls, whenever they come."""
        assert result.call.id in {call.id for call in self.open_calls}, "the call is not open"
        self._results[result.call.id] = result.text

    def lost_calls(self) -> tuple[ToolCall, ...]:
        """Calls that have begun and have no result."""
        return tuple(call for call in self.open_calls if call.id in self._begun)

    def settle(self) -> None:
        """Answers the calls that have begun and have no result."""
        for call in self.lost_calls():
            self._results[call.id] = LOST

    def _shown(self) -> list[Message]:
        answered = (call.id for call in self._calls if call.id in self._results)
        return [*self._messages, *(tool_message(call_id, self._results[call_id]) for call_id in answered)]


def tool_message(call_id: str, text: str) -> Message:
    """A result in OpenAI's form."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def check_is_list(messages: object) -> None:
    """Raises `InvalidParameterError` for what cannot be a list of messages."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidParameterError(
            f"messages must be a list of objects with a role and content, not a {type(messages).__name__}", "messages"
        )


def _checked_message(message: Any, place: int) -> Message:
    """A copy of what somebody gave as a message."""
    where = f"messages.{place}"
    if not isinstance(message, Mapping):
        raise InvalidParameterError(
            f"{where} must be an object with a role and content, not a {type(message).__name__}", where
        )
    try:
        text = json.dumps(dict(message), ensure_ascii=False, allow_nan=False)
        text.encode()  # half of a surrogate pair is no text
        checked = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"{where} must be JSON: {error!s:.200}", where) from None
    call_id = checked.get("tool_call_id")
    if call_id is not None and not isinstance(call_id, str):
        raise InvalidParameterError(f"{where}.tool_call_id must be a text", f"{where}.tool_call_id")
    return checked


def _copied(value: Any) -> Any:
    """A copy of JSON; several times faster than `copy.deepcopy`, and it is made in every turn."""
    return json.loads(json.dumps(value, ensure_ascii=False))


def _last_calls(messages: Sequence[Message]) -> tuple[ToolCall, ...]:
    """The calls of the last assistant message that no tool message behind it answers, if only such follow it."""
    answered: set[object] = set()
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if message.get("role") != "tool":
            calls = _calls_of(message) if message.get("role") == "assistant" else ()
            read = [_call(call, place) for call in calls]
            ids = [call.id for call in read]
            if len(set(ids)) < len(ids):
                twice = next(one for one in ids if ids.count(one) > 1)
                where = f"messages.{place}.tool_calls"
                raise InvalidParameterError(f"{where}: {twice!r:.80} is the id of two calls", where)
            return tuple(call for call in read if call.id not in answered)
        answered.add(message.get("tool_call_id"))
    return ()


def _calls_of(message: Message) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else ()


def _call(call: Any, place: int) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not all(
        isinstance(text, str) for text in (call.get("id"), function.get("name"), function.get("arguments"))
    ):
        raise InvalidParameterError(
            f"messages.{place}.tool_calls must have an id and a function with a name and arguments, which are texts",
            f"messages.{place}.tool_calls",
        )
    return ToolCall(id=call["id"], name=function["name"], arguments=function["arguments"])
