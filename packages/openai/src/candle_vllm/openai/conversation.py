"""Chat messages -> the dictionaries that chat templates expect, in transformers' form (step 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from candle_vllm.openai.protocol.messages import AssistantMessage, Content, Message, SystemMessage, ToolMessage


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """One dictionary per message: texts joined to one string, call arguments as objects, role developer as system."""
    return [_template_message(message) for message in messages]


def text_of(content: Content | None) -> str:
    """The content as one string; parts stand on lines of their own."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _template_message(message: Message) -> dict[str, Any]:
    role = "system" if isinstance(message, SystemMessage) else message.role
    rendered: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        rendered["name"] = message.name
    if isinstance(message, ToolMessage):
        rendered["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        rendered.update(_assistant_extras(message))
    return rendered


def _assistant_extras(message: AssistantMessage) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if message.thoughts is not None:
        extras["reasoning_content"] = message.thoughts
    if message.tool_calls:
        extras["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": call.function.parsed},
            }
            for call in message.tool_calls
        ]
    return extras
