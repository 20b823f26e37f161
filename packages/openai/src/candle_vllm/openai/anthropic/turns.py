"""Anthropic's messages -> OpenAI's, in dictionaries (step 2).

Consecutive messages of one role become one. Texts of one message stand on lines of their own, as parts do in OpenAI's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from candle_vllm.openai.anthropic.blocks import (
    SystemContent,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserContent,
)
from candle_vllm.openai.anthropic.habits import TemplateHabits
from candle_vllm.openai.anthropic.messages import AssistantMessage, Message, SystemMessage, UserMessage

_BILLING = "x-anthropic-billing-header"  # how a line begins that Claude Code changes with every request
_SAYS_SO = ("error", "<error", "<tool_use_error")  # how results begin that call themselves errors


class Turn(NamedTuple):
    """A message of OpenAI's, and the path of the message that it begins with."""

    message: dict[str, Any]
    source: str


def openai_turns(
    system: SystemContent | None, messages: Sequence[Message], habits: TemplateHabits
) -> tuple[list[Turn], bool]:
    """The conversation as the model's template takes it, and whether its last message begins the answer."""
    body = _Turns(habits)
    last_user = max((place for place, one in enumerate(messages) if isinstance(one, UserMessage)), default=-1)
    head = [] if system is None else _system_texts(system)
    for place, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            body.assistant(message, place)
        elif isinstance(message, UserMessage):
            body.user(message.content, place)
        elif message.content and not (message.clear_at == "next_user_message" and place < last_user):
            texts = _system_texts(message.content)
            if body.begun:
                body.system("\n".join(texts), place)
            else:
                head += texts
    turns = body.finish()
    prefilled = isinstance(messages[-1], AssistantMessage) and _fill(turns)
    text = "\n".join(filter(None, head))
    return [Turn({"role": "system", "content": text}, "system"), *turns] if text else turns, prefilled


def needs_habits(messages: Sequence[Message]) -> bool:
    """Whether there are tool results, or a system message behind one of another role: not every template takes them."""
    kinds = [isinstance(message, SystemMessage) for message in messages]
    return (False in kinds and True in kinds[kinds.index(False) :]) or any(
        isinstance(block, ToolResultBlock)
        for message in messages
        if isinstance(message, UserMessage) and not isinstance(message.content, str)
        for block in message.content
    )


def _fill(turns: list[Turn]) -> bool:
    """An empty last answer is none: it is taken away."""
    message = turns[-1].message
    if message["content"] or "reasoning_content" in message:
        return True
    turns.pop()
    return False


class _Turns:
    """Collects messages between answers, whose results must come first, and answers."""

    def __init__(self, habits: TemplateHabits) -> None:
        self.begun = False
        self._habits = habits
        self._turns: list[Turn] = []
        self._results: list[Turn] = []
        self._said: list[tuple[str, list[str], str]] = []  # role, texts, source
        self._answer: _Answer | None = None

    def user(self, content: UserContent, place: int) -> None:
        self._end_answer()
        source = f"messages.{place}"
        if isinstance(content, str):
            self._say("user", content, source)
            return
        for block in content:
            if isinstance(block, ToolResultBlock):
                result = {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block)}
                self._results.append(Turn(result, source))
            else:
                self._say("user", block.text, source)

    def system(self, text: str, place: int) -> None:
        if not text:
            return
        self._end_answer()
        if self._habits.system_anywhere:
            self._say("system", text, f"messages.{place}")
        else:
            self._say("user", f"<system>\n{text}\n</system>", f"messages.{place}")

    def assistant(self, message: AssistantMessage, place: int) -> None:
        self.begun = True
        if self._answer is None:
            self._end_said()
            self._answer = _Answer(f"messages.{place}")
        self._answer.add(message)

    def finish(self) -> list[Turn]:
        self._end_answer()
        self._end_said()
        return self._turns

    def _say(self, role: str, text: str, source: str) -> None:
        self.begun = True
        if self._said and self._said[-1][0] == role:
            self._said[-1][1].append(text)
        else:
            self._said.append((role, [text], source))

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._turns.append(self._answer.turn())
            self._answer = None

    def _end_said(self) -> None:
        if self._results and self._said and not self._habits.user_behind_results and self._said[0][0] == "user":
            result, texts = self._results[-1].message, self._said.pop(0)[1]
            result["content"] = "\n".join(filter(None, (result["content"], *texts)))
        self._turns += self._results
        self._turns += [Turn({"role": role, "content": "\n".join(texts)}, source) for role, texts, source in self._said]
        self._results, self._said = [], []


class _Answer:
    """One answer, of one assistant message or more."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, message: AssistantMessage) -> None:
        if isinstance(message.content, str):
            self._texts.append(message.content)
            return
        for block in message.content:
            if isinstance(block, TextBlock):
                self._texts.append(block.text)
            elif isinstance(block, ThinkingBlock):
                self._thoughts.append(block.thinking)
            elif isinstance(block, ToolUseBlock):
                arguments = json.dumps(block.input, ensure_ascii=False)
                function = {"name": block.name, "arguments": arguments}
                self._calls.append({"id": block.id, "type": "function", "function": function})

    def turn(self) -> Turn:
        text, thoughts = "\n".join(filter(None, self._texts)), "\n".join(filter(None, self._thoughts))
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not self._calls else None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if self._calls:
            message["tool_calls"] = self._calls
        return Turn(message, self._source)


def _system_texts(content: SystemContent) -> list[str]:
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    return [text for text in map(_without_billing, texts) if text]


def _without_billing(text: str) -> str:
    """A line that changes with every request would keep the prefix cache from finding anything behind it."""
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _result_text(block: ToolResultBlock) -> str:
    """The result; OpenAI's has no mark for errors, so one that does not say that it is an error is made to."""
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    if not block.is_error or text.lstrip().lower().startswith(_SAYS_SO):
        return text
    return f"Error: {text}" if text else "Error"
