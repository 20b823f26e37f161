# SPDX-License-Identifier: MIT
"""Anthropic's messages -> a task's messages; consecutive ones of one role are merged (step 2 of a request's life)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.anthropic import blocks
from candle_vllm.openai.anthropic.messages import AssistantMessage, Message, UserMessage
from candle_vllm.openai.protocol.fields import MAX_MESSAGES, MAX_TOOL_CALLS
from candle_vllm.openai.task import Call, Part, TextPart
from candle_vllm.openai.task import Message as TaskMessage

_BILLING = "x-anthropic-billing-header"  # beginning of a line that Claude Code changes with every request
_ERROR_WORDS = ("error", "<error", "<tool_use_error")  # beginnings of tool results that already name an error


class Turn(NamedTuple):
    """A message of a task, and the path of the first request message that it was made from."""

    message: TaskMessage
    source: str


def read_turns(system: blocks.SystemContent | None, messages: Sequence[Message]) -> tuple[list[Turn], bool]:
    """Return the conversation, and whether its last message is the beginning of the answer (prefill).

    Raises:
        InvalidParameterError: the conversation is empty, or exceeds `MAX_MESSAGES` or, in one answer, `MAX_TOOL_CALLS`.
    """
    body = _Turns()
    last_user = max((index for index, one in enumerate(messages) if isinstance(one, UserMessage)), default=-1)
    head = [] if system is None else _system_texts(system)
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            body.assistant(message, index)
        elif isinstance(message, UserMessage):
            body.user(message.content, index)
        elif message.content and not (message.clear_at == "next_user_message" and index < last_user):
            texts = _system_texts(message.content)
            if body.begun:
                body.system("\n".join(texts), index)
            else:
                head += texts
    turns = body.finish()
    prefilled = isinstance(messages[-1], AssistantMessage)
    if prefilled and not (turns[-1].message.parts or turns[-1].message.thoughts):
        turns.pop()
        prefilled = False
    text = "\n".join(filter(None, head))
    if text:
        turns.insert(0, Turn(TaskMessage(role="system", parts=(TextPart(text),)), "system"))
    if not turns:
        raise InvalidParameterError("messages must not be empty", "messages")
    if len(turns) > MAX_MESSAGES:
        raise InvalidParameterError(
            f"messages must have at most {MAX_MESSAGES} entries, not a list of {len(turns)}", "messages"
        )
    return turns, prefilled


class _Turns:
    """Collects answers and the messages between them; tool results precede the other messages."""

    def __init__(self) -> None:
        self.begun = False
        self._turns: list[Turn] = []
        self._results: list[Turn] = []
        self._inputs: list[tuple[Literal["system", "user"], list[Part], str]] = []  # role, parts, source
        self._answer: _Answer | None = None

    def user(self, content: blocks.UserContent, index: int) -> None:
        self._end_answer()
        source = f"messages.{index}"
        if isinstance(content, str):
            self._add("user", TextPart(content), source)
            return
        for number, block in enumerate(content):
            path = f"{source}.content.{number}"
            if isinstance(block, blocks.ImageBlock):
                self._add("user", block.image(path), source)
            elif isinstance(block, blocks.ToolResultBlock):
                parts = tuple(_result_parts(block, path))
                self._results.append(Turn(TaskMessage(role="tool", parts=parts, call_id=block.tool_use_id), source))
            else:
                self._add("user", TextPart(block.text), source)

    def system(self, text: str, index: int) -> None:
        if not text:
            return
        self._end_answer()
        self._add("system", TextPart(text), f"messages.{index}")

    def assistant(self, message: AssistantMessage, index: int) -> None:
        self.begun = True
        if self._answer is None:
            self._end_inputs()
            self._answer = _Answer(f"messages.{index}")
        self._answer.add(message)

    def finish(self) -> list[Turn]:
        self._end_answer()
        self._end_inputs()
        return self._turns

    def _add(self, role: Literal["system", "user"], part: Part, source: str) -> None:
        self.begun = True
        if self._inputs and self._inputs[-1][0] == role:
            self._inputs[-1][1].append(part)
        else:
            self._inputs.append((role, [part], source))

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._turns.append(self._answer.turn())
            self._answer = None

    def _end_inputs(self) -> None:
        self._turns += self._results
        for role, parts, source in self._inputs:
            self._turns.append(Turn(TaskMessage(role=role, parts=tuple(parts)), source))
        self._results, self._inputs = [], []


class _Answer:
    """One answer, from one or more assistant messages."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Call] = []

    def add(self, message: AssistantMessage) -> None:
        if isinstance(message.content, str):
            self._texts.append(message.content)
            return
        for block in message.content:
            if isinstance(block, blocks.TextBlock):
                self._texts.append(block.text)
            elif isinstance(block, blocks.ThinkingBlock):
                self._thoughts.append(block.thinking)
            elif isinstance(block, blocks.ToolUseBlock):
                self._calls.append(Call(block.id, block.name, json.dumps(block.input, ensure_ascii=False)))

    def turn(self) -> Turn:
        if len(self._calls) > MAX_TOOL_CALLS:
            field = f"{self._source}.content"
            raise InvalidParameterError(
                f"{field} must have at most {MAX_TOOL_CALLS} entries, not a list of {len(self._calls)}", field
            )
        parts = tuple(map(TextPart, filter(None, self._texts)))
        thoughts = "\n".join(filter(None, self._thoughts)) or None
        message = TaskMessage(role="assistant", parts=parts, thoughts=thoughts, calls=tuple(self._calls))
        return Turn(message, self._source)


def _system_texts(content: blocks.SystemContent) -> list[str]:
    """Return the texts without `_BILLING`'s line, because no text after it could hit the prefix cache."""
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    shown = (text.partition("\n")[2] if text.startswith(_BILLING) else text for text in texts)
    return [text for text in shown if text]


def _result_parts(block: blocks.ToolResultBlock, path: str) -> list[Part]:
    """Return the parts of a result, in order; a task cannot mark errors, so unmarked errors get the prefix "Error"."""
    parts: list[Part] = [TextPart(block.content)] if isinstance(block.content, str) else []
    for index, one in enumerate(() if isinstance(block.content, str) else block.content or ()):
        is_image = isinstance(one, blocks.ImageBlock)
        parts.append(one.image(f"{path}.content.{index}") if is_image else TextPart(one.text))
    first = [part.text for part in parts[:1] if isinstance(part, TextPart)]
    text = "".join(first)
    if block.is_error and not text.lstrip().lower().startswith(_ERROR_WORDS):
        parts[: len(first)] = [TextPart(f"Error: {text}" if text else "Error")]
    return parts
