# SPDX-License-Identifier: MIT
"""Converts input items to the messages of a task.

Adjacent items of one answer become one assistant message. The result of a call directly follows the message with the
call, wherever the result's item is. Items of tools that run here (`mcp_call`) are calls with results.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from msgspec.structs import replace

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.protocol.custom_tools import custom_arguments
from candle_vllm.openai.protocol.fields import MAX_TOOL_CALLS
from candle_vllm.openai.task import Call, Message, Part, TextPart
from candle_vllm.responses.api.call_results import CallResults, Placed
from candle_vllm.responses.protocol import items as wire_items
from candle_vllm.responses.tools.names import tool_name

_ENCODED = "candle-vllm-1."  # prefix of reasoning and summaries that this server encoded
_SUMMARY = "<summary of the conversation before>\n{}\n</summary of the conversation before>"


class ToolNames(Protocol):
    """Returns the name by which the model calls a tool of an MCP server."""

    def mcp_name(self, label: str, name: str) -> str: ...


class Translated(NamedTuple):
    """The conversation of a request.

    Attributes:
        approved: ids of approved calls that end the conversation, with their approvals' paths; these run first.
        listed: labels of the MCP servers whose tool lists are in the conversation already.
    """

    messages: tuple[Message, ...]
    approved: Mapping[str, str]
    listed: frozenset[str]


def encode_thoughts(text: str) -> str:
    """Encode reasoning as `encrypted_content`, without encryption."""
    return _ENCODED + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")


def translate(items: Sequence[Placed], instructions: str | None, names: ToolNames, max_images: int = 0) -> Translated:
    """Return the messages of a request, from history and input without references; `instructions` precede all messages.

    `max_images` is as in `CallResults`. Raises InvalidParameterError if calls do not match results or approvals, or an
    item or answer cannot become a message.
    """
    results = CallResults(items, max_images)
    body = _Body(names, results)
    if instructions:
        body.head.append(instructions)
    for placed in items:
        body.add(placed)
    messages = body.finish()
    results.check_all(messages)
    return Translated(messages, results.approved, frozenset(body.listed))


class _Body:
    def __init__(self, names: ToolNames, results: CallResults) -> None:
        self.head: list[str] = []
        self.listed: set[str] = set()
        self._names = names
        self._results = results
        self._messages: list[Message] = []
        self._answer: _Answer | None = None

    def add(self, placed: Placed) -> None:
        item, path = placed
        if isinstance(item, wire_items.MessageItem):
            self._message(item, path)
        elif isinstance(item, wire_items.ReasoningItem):
            if thoughts := _thoughts(item):
                self._open(path, after_results=True).thoughts.append(thoughts)
        elif isinstance(item, wire_items.CompactionItem):
            self._close()
            self._say(TextPart(_SUMMARY.format(_summary(item, path))))
        elif isinstance(item, wire_items.FunctionCallItem):
            self._call(path, item.call_id, _flat(item), item.arguments)
        elif isinstance(item, wire_items.CustomCallItem):
            self._call(path, item.call_id, _flat(item), custom_arguments(item.input))
        elif isinstance(item, (wire_items.McpCallItem, wire_items.McpApprovalRequestItem)):
            if item.id not in self._results.run_by_approval:
                self._call(path, item.id, self._names.mcp_name(item.server_label, item.name), item.arguments)
        elif isinstance(item, wire_items.McpListToolsItem):
            if not item.error:
                self.listed.add(item.server_label)
        elif isinstance(item, wire_items.CallOutputItem):
            self._close()
        else:
            assert not isinstance(item, wire_items.ItemReference)
        if self._answer is not None and isinstance(item, (wire_items.McpCallItem, wire_items.McpApprovalResponseItem)):
            self._answer.has_results = True

    def finish(self) -> tuple[Message, ...]:
        self._close()
        head = "\n".join(self.head)
        return tuple([_said("system", head), *self._messages] if head else self._messages)

    def _message(self, item: wire_items.MessageItem, path: str) -> None:
        text, path = wire_items.text_of(item.content), f"{path}.content"
        if item.role != "user" and not isinstance(item.content, str):
            image = next((n for n, part in enumerate(item.content) if isinstance(part, wire_items.ImagePart)), None)
            if image is not None:
                field = f"{path}.{image}.type"
                raise InvalidParameterError(
                    f"{field}: images can only be in user messages and in results of calls", field
                )
        if item.role == "assistant":
            self._open(path, after_results=True).texts.append(text)
            return
        self._close()
        if item.role == "user":
            self._say(*wire_items.parts_of(item.content, path))
        elif not self._messages:
            self.head += [text] if text else []
        else:
            self._messages.append(_said("system", text))

    def _say(self, *said: Part) -> None:
        """Add a user's message, merged with a user message before it, because templates want alternating roles."""
        last = self._messages[-1] if self._messages else None
        if last is not None and last.role == "user":
            parts = tuple(part for part in (*last.parts, *said) if part != TextPart(""))
            self._messages[-1] = replace(last, parts=parts)
        else:
            self._messages.append(Message(role="user", parts=said))

    def _call(self, path: str, call_id: str, name: str, arguments: str) -> None:
        self._open(path).calls.append(Call(call_id, name, arguments))

    def _open(self, path: str, *, after_results: bool = False) -> _Answer:
        if self._answer is not None and self._answer.has_results and after_results:
            self._close()
        if self._answer is None:
            self._answer = _Answer(path)
        return self._answer

    def _close(self) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        self._messages.append(answer.message())
        for call in answer.calls:
            if (parts := self._results.take(call.id)) is not None:
                self._messages.append(Message(role="tool", parts=parts, call_id=call.id))


class _Answer:
    """One answer of the model, from one or more items."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[Call] = []
        self.has_results = False

    def message(self) -> Message:
        if len(self.calls) > MAX_TOOL_CALLS:
            raise InvalidParameterError(
                f"{self.path}: an answer may have at most {MAX_TOOL_CALLS} calls, not {len(self.calls)}", self.path
            )
        parts = tuple(map(TextPart, filter(None, self.texts)))
        thoughts = "\n".join(self.thoughts) or None
        return Message(role="assistant", parts=parts, thoughts=thoughts, calls=tuple(self.calls))


def _said(role: Literal["system", "user"], text: str) -> Message:
    return Message(role=role, parts=(TextPart(text),))


def _flat(item: wire_items.FunctionCallItem | wire_items.CustomCallItem) -> str:
    return item.name if item.namespace is None else tool_name(item.namespace, item.name)


def _thoughts(item: wire_items.ReasoningItem) -> str:
    for parts in (item.content, item.summary):
        if parts:
            return "\n".join(part.text for part in parts)
        if parts is item.content and (decoded := _decoded(item.encrypted_content)):
            return decoded
    return ""


def _summary(item: wire_items.CompactionItem, path: str) -> str:
    if summary := _decoded(item.encrypted_content):
        return summary
    field = f"{path}.encrypted_content"
    raise InvalidParameterError(f"{field} is not a compaction that this server created; leave the item out", field)


def _decoded(encrypted: str | None) -> str:
    """Return the reasoning or summary that this server encoded; "" for any other text."""
    if not encrypted or not encrypted.startswith(_ENCODED):
        return ""
    try:
        return base64.b64decode(encrypted[len(_ENCODED) :], validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return ""
