# SPDX-License-Identifier: MIT
"""Messages of a task -> the dictionaries that chat templates expect (step 3), and what a template takes of them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from candle_vllm.core.errors import RequestError
from candle_vllm.core.text.template_needs import TemplateNeeds, fit
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.task import Call, ImagePart, Message, Paths, Task, TextPart


def template_messages(messages: Sequence[Message], needs: TemplateNeeds | None = None) -> list[dict[str, Any]]:
    """One dictionary per message: texts joined to one string, beside images in parts; call arguments as objects.

    A tool message gets the name of the function that it answers, which templates may want and clients leave out.
    Arguments that are not one JSON object stay text, and all do for a template that `needs` texts; ids become short
    ones for a template that refuses others.
    """
    names = {call.id: call.name for message in messages for call in message.calls}
    rendered = [_template_message(message, names) for message in messages]
    if needs is not None:
        fit(rendered, needs)
    return rendered


def text_of(message: Message) -> str:
    """What a message says; parts stand on lines of their own."""
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def images_of(messages: Sequence[Message]) -> list[ImagePart]:
    """The images of a conversation, in order."""
    return [part for message in messages for part in message.parts if isinstance(part, ImagePart)]


def _content(message: Message) -> str | list[dict[str, str]]:
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return text_of(message)
    return [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.parts
    ]


def _template_message(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
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


_ANSWER = Message(role="assistant", parts=(TextPart("Yes."),))
_CALLED = [
    Message(role="assistant", calls=(Call("abcdefghi", "f", "{}"),)),
    Message(role="tool", parts=(TextPart("1"),), call_id="abcdefghi"),
]


Count = Callable[[Callable[[], Task]], Awaitable[int]]


class TemplateHabits(NamedTuple):
    """What a template takes.

    Attributes:
        system_anywhere: system messages behind others; where not, they become text of the user's turn, in tags.
        user_behind_results: user messages right behind tool results; where not, their text is added to the last result.
    """

    system_anywhere: bool = True
    user_behind_results: bool = True


async def template_habits(count: Count) -> TemplateHabits:
    """Renders small conversations; `count` tells how many tokens the prompt of a task has."""

    def said(text: str) -> list[Message]:
        return [_user("Hi"), *_CALLED, _user(text)]

    def instructed(place: int, text: str) -> list[Message]:
        first, late, last = (_system(text if number == place else "b") for number in range(3))
        return [first, _user("Hi"), late, _ANSWER, _user("So?"), last]

    # Some templates write the last of several system messages only, so each of them is tried.
    anywhere = [await _writes(count, functools.partial(instructed, place)) for place in range(3)]
    return TemplateHabits(all(anywhere), await _writes(count, said))


def _user(text: str) -> Message:
    return Message(role="user", parts=(TextPart(text),))


def _system(text: str) -> Message:
    return Message(role="system", parts=(TextPart(text),))


async def _writes(count: Count, conversation: Callable[[str], Sequence[Message]]) -> bool:
    """Whether the template takes the conversation, and what is said in it makes a difference to the prompt's length."""

    def task(text: str) -> Task:
        return Task(messages=tuple(conversation(text)), paths=Paths({}))

    try:
        short = await count(lambda: task("a"))
        return await count(lambda: task("a b c d e f g h")) > short
    except RequestError:
        return False
