"""Chat messages -> the dictionaries that chat templates expect, in transformers' form (step 3)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.openai.formats.template_needs import TemplateNeeds
from candle_vllm.openai.protocol.messages import (
    AssistantMessage,
    Content,
    Message,
    SpokenContent,
    SystemMessage,
    ToolCall,
    ToolMessage,
)

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def template_messages(messages: Sequence[Message], needs: TemplateNeeds | None = None) -> list[dict[str, Any]]:
    """One dictionary per message: texts joined to one string, call arguments as objects, role developer as system.

    A tool message gets the name of the function that it answers, which templates may want and clients leave out.
    Arguments that are not one JSON object stay text, and all do for a template that `needs` texts; ids become short
    ones for a template that refuses others.
    """
    names = {
        call.id: call.function.name
        for message in messages
        if isinstance(message, AssistantMessage)
        for call in message.tool_calls or ()
    }
    rendered = [_template_message(message, names) for message in messages]
    if needs is not None:
        _fit(rendered, needs)
    return rendered


def text_of(content: Content | SpokenContent | None) -> str:
    """The content as one string; parts stand on lines of their own."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def message_text(message: Message) -> str:
    """What a message says: its content, and after it the refusal of an assistant."""
    text = text_of(message.content)
    refusal = message.refusal if isinstance(message, AssistantMessage) else None
    return "\n".join(filter(None, (text, refusal))) if refusal else text


def _template_message(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    role = "system" if isinstance(message, SystemMessage) else message.role
    rendered: dict[str, Any] = {"role": role, "content": message_text(message)}
    name = message.name
    if isinstance(message, ToolMessage):
        rendered["tool_call_id"] = message.tool_call_id
        name = name or names.get(message.tool_call_id)
    if name is not None:
        rendered["name"] = name
    if isinstance(message, AssistantMessage):
        if message.thoughts is not None:
            rendered["reasoning_content"] = message.thoughts
        if message.tool_calls:
            rendered["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return rendered


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.template_arguments}
    return {"id": call.id, "type": call.type, "function": function}


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
