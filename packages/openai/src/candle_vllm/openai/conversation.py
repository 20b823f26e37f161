# SPDX-License-Identifier: MIT
"""Messages of a task -> the dictionaries that chat templates expect (step 3 of a request's life)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from candle_vllm.core.text.template_needs import TemplateNeeds, fit
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.formats.json_text import mended
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.task import Call, ImagePart, Message, TextPart

_MOST_MENDED = 1 << 16  # characters of call arguments repaired in one conversation; each takes microseconds
_Mend = Callable[[str], str | None]


def template_messages(messages: Sequence[Message], needs: TemplateNeeds | None = None) -> list[dict[str, Any]]:
    """Return one dictionary per message; call arguments become objects.

    The content is one string, or a list of parts if there are images. A tool message gets the name of its function:
    templates may need it, and clients omit it. `fit` adapts the messages to what the template `needs`.
    """
    left = 0 if needs is None or needs.arguments_as_text else _MOST_MENDED

    def mend(text: str) -> str | None:
        nonlocal left
        if len(text) > left:
            return None
        left -= len(text)
        return mended(text)

    names, rendered = dict[str, str](), list[dict[str, Any]]()
    for message in messages:
        names |= {call.id: call.name for call in message.calls}  # ids may be repeated in later turns
        rendered.append(_template_message(message, names, mend))
    if needs is not None:
        fit(rendered, needs)
    return rendered


def text_of(message: Message) -> str:
    """Return the text of a message; its parts are joined by line breaks."""
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def images_of(messages: Sequence[Message]) -> list[ImagePart]:
    """Return the images of a conversation, in order."""
    return [part for message in messages for part in message.parts if isinstance(part, ImagePart)]


def _content(message: Message) -> str | list[dict[str, str]]:
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return text_of(message)
    return [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.parts
    ]


def _template_message(message: Message, names: Mapping[str, str], mend: _Mend) -> dict[str, Any]:
    rendered: dict[str, Any] = {"role": message.role, "content": _content(message)}
    name = message.name
    if message.call_id is not None:
        rendered["tool_call_id"] = message.call_id
        name = name or names.get(message.call_id)
    if name is not None:
        rendered["name"] = name
    if message.thoughts is not None:
        rendered["reasoning_content"] = message.thoughts
    if message.calls:
        rendered["tool_calls"] = [_template_call(call, mend) for call in message.calls]
    return rendered


def _template_call(call: Call, mend: _Mend) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _arguments(call.arguments, mend)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(text: str, mend: _Mend) -> dict[str, Any] | str:
    """Return the arguments as an object, repaired if possible, else as text; empty and null mean no arguments."""
    try:
        value = decode_json(text.strip() or "{}")
    except InvalidBodyError:
        made = mend(text)
        value = text if made is None else json.loads(made)
    if value is None:
        return {}
    return value if isinstance(value, dict) else text
