"""What a model's template takes of conversations that Anthropic's API allows, found out by trying (step 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from candle_vllm.core.errors import RequestError
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.task import Call, Message, Paths, Task, TextPart

_ANSWER = Message(role="assistant", parts=(TextPart("Yes."),))
_CALLED = [
    Message(role="assistant", calls=(Call("abcdefghi", "f", "{}"),)),
    Message(role="tool", parts=(TextPart("1"),), call_id="abcdefghi"),
]


class TemplateHabits(NamedTuple):
    """What a template takes.

    Attributes:
        system_anywhere: system messages behind others; where not, they become text of the user's turn, in tags.
        user_behind_results: user messages right behind tool results; where not, their text is added to the last result.
    """

    system_anywhere: bool = True
    user_behind_results: bool = True


async def template_habits(adapter: OpenAIAdapter) -> TemplateHabits:
    """Renders small conversations."""

    def said(text: str) -> list[Message]:
        return [_user("Hi"), *_CALLED, _user(text)]

    def instructed(place: int, text: str) -> list[Message]:
        first, late, last = (_system(text if number == place else "b") for number in range(3))
        return [first, _user("Hi"), late, _ANSWER, _user("So?"), last]

    # Some templates write the last of several system messages only, so each of them is tried.
    anywhere = [await _writes(adapter, functools.partial(instructed, place)) for place in range(3)]
    return TemplateHabits(all(anywhere), await _writes(adapter, said))


def _user(text: str) -> Message:
    return Message(role="user", parts=(TextPart(text),))


def _system(text: str) -> Message:
    return Message(role="system", parts=(TextPart(text),))


async def _writes(adapter: OpenAIAdapter, conversation: Callable[[str], Sequence[Message]]) -> bool:
    """Whether the template takes the conversation, and what is said in it makes a difference to the prompt's length."""

    def task(text: str) -> Task:
        return Task(messages=tuple(conversation(text)), paths=Paths({}))

    try:
        short = await adapter.count_tokens(lambda: task("a"))
        return await adapter.count_tokens(lambda: task("a b c d e f g h")) > short
    except RequestError:
        return False
