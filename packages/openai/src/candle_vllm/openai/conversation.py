"""Messages of a task -> the dictionaries that chat templates expect, in transformers' form (step 3)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.openai.errors import InvalidBodyError, UnsupportedParameterError
from candle_vllm.openai.formats.template_needs import TemplateNeeds
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.task import Call, Message, TextPart

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def template_messages(messages: Sequence[Message], needs: TemplateNeeds | None = None) -> list[dict[str, Any]]:
    """One dictionary per message: texts joined to one string, call arguments as objects.

    A tool message gets the name of the function that it answers, which templates may want and clients leave out.
    Arguments that are not one JSON object stay text, and all do for a template that `needs` texts; ids become short
    ones for a template that refuses others.
    """
    names = {call.id: call.name for message in messages for call in message.calls}
    rendered = [_template_message(message, names) for message in messages]
    if needs is not None:
        _fit(rendered, needs)
    return rendered


def text_of(message: Message) -> str:
    """What a message says; parts stand on lines of their own.

    Raises:
        UnsupportedParameterError: there is more than text in it.
    """
    if any(not isinstance(part, TextPart) for part in message.parts):
        raise UnsupportedParameterError(
            "messages have an image, which cannot be read: the server takes text only", "messages"
        )
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _template_message(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    rendered: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    name = message.name
    if message.call_id is not None:
        rendered["tool_call_id"] = message.call_id
        name = name or names.get(message.call_id)
    if name is not None:
        rendered["name"] = name
    if message.thoughts is not None:
        rendered["reasoning_content"] = message.thoughts
    if message.calls:
        rendered["tool_calls"] = [_template_call(call) for call in message.calls]
    return rendered


def _template_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}


def _arguments(text: str) -> dict[str, Any] | str:
    """The arguments as an object, or the text as it stands where it holds none; empty and null mean none."""
    try:
        value = decode_json(text.strip() or "{}")
    except InvalidBodyError:
        return text
    if value is None:
        return {}
    return value if isinstance(value, dict) else text


def _fit(rendered: list[dict[str, Any]], needs: TemplateNeeds) -> None:
    for message in rendered:
        if needs.content_forbidden and "tool_calls" in message and not message["content"]:
            message["content"] = None
        if needs.short_ids and "tool_call_id" in message:
            message["tool_call_id"] = short_id(message["tool_call_id"])
        for call in message.get("tool_calls", ()):
            if needs.short_ids:
                call["id"] = short_id(call["id"])
            arguments = call["function"]["arguments"]
            if needs.arguments_as_text and not isinstance(arguments, str):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)


def short_id(given: str) -> str:
    """Nine letters and digits for an id: itself where it is so already, else always the same ones."""
    if _SHORT_ID.fullmatch(given):
        return given
    return hashlib.blake2s(given.encode(), digest_size=8).hexdigest()[:9]
