"""What a caller of the library may pass as prompts (step 1 of a request's life)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from candle_vllm.core.errors import InvalidParameterError

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_MEDIA = ("image", "video", "audio", "file")
_WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")


def as_token_ids(prompt: Any) -> list[int]:
    """A prompt of token ids as a list; anything with whole numbers in it will do, a numpy array as well."""
    try:
        if isinstance(prompt, (bytes, Mapping)) or any(isinstance(token, bool) for token in prompt):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise InvalidParameterError("a prompt is a text or a list of token ids", "prompt") from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InvalidParameterError("prompts are texts or lists of token ids", "prompts")
    items = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items  # type: ignore[list-item]


def as_conversations(messages: Any) -> tuple[list[list[Message]], bool]:
    """Conversations whose messages were looked at, and whether a list of them was given rather than one.

    Raises:
        InvalidParameterError: a message is wrong; the error begins with its place, `messages[2].content`.
    """
    items = _list_of("messages", messages, "messages")
    if not items:
        raise _wrong("messages", "must hold at least one message")
    if isinstance(items[0], (str, bytes, Mapping)) or not isinstance(items[0], Iterable):
        return [_conversation("messages", items)], False
    return [
        _conversation(f"messages[{place}]", _list_of(f"messages[{place}]", each, "messages"))
        for place, each in enumerate(items)
    ], True


def _conversation(place: str, messages: list[Any]) -> list[Message]:
    if not messages:
        raise _wrong(place, "must hold at least one message")
    for number, message in enumerate(messages):
        _check_message(f"{place}[{number}]", message)
    return messages


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise _wrong(place, f"must be an object with role and content, not {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        said = f"must be a text, not {_kind(role)}" if role else "is missing"
        raise _wrong(f"{place}.role", f"{said}: system, user, assistant or tool")
    if content is None:
        if not any(message.get(name) for name in _WITHOUT_CONTENT):
            raise _wrong(f"{place}.content", "is missing, and there are no tool_calls either")
    elif not isinstance(content, str):
        for number, part in enumerate(_list_of(f"{place}.content", content, "parts, or a text")):
            _check_part(f"{place}.content[{number}]", part)
    for number, call in enumerate(_list_of(f"{place}.tool_calls", message.get("tool_calls") or (), "calls")):
        if not isinstance(call, Mapping):
            raise _wrong(f"{place}.tool_calls[{number}]", f"must be an object, not {_kind(call)}")


def _check_part(place: str, part: Any) -> None:
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping):
        raise _wrong(place, f"must be an object with type and text, not {_kind(part)}")
    kind = part.get("type", "text")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise _wrong(f"{place}.text", f"must be a text, not {_kind(part.get('text'))}")
    if isinstance(kind, str) and kind.removeprefix("input_").startswith(_MEDIA):
        raise _wrong(place, f"is of type {kind[:40]!r}, and models read text alone here")


def _list_of(place: str, value: Any, what: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(place, f"must be a list of {what}, not {_kind(value)}")
    return list(value)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _wrong(place: str, said: str) -> InvalidParameterError:
    return InvalidParameterError(f"{place}: {said}", place)
