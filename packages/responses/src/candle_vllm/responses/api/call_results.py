# SPDX-License-Identifier: MIT
"""Results of a conversation's calls, and which calls are approved or wait for an approval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.task import Message, Part, TextPart
from candle_vllm.responses.protocol.items import (
    CallOutputItem,
    CustomCallItem,
    FunctionCallItem,
    InputItem,
    McpApprovalRequestItem,
    McpApprovalResponseItem,
    McpCallItem,
    MessageItem,
    ReasoningItem,
    images_in,
    parts_of,
)

NOT_APPROVED = "Nobody agreed to this call, so it was not run."
DENIED = "The user refused this call, so it was not run."
NOT_RUN = "This call was not run."


class Placed(NamedTuple):
    """An item, and its path in the request: `input.3`, or the field that refers to the history."""

    item: InputItem
    path: str


class CallResults:
    """Results of the calls by their ids, and the approved calls.

    `max_images` is the maximum number of images in the prompt. The result of an `mcp_call` item whose images would
    exceed it is only its text; with 0, no result of an `mcp_call` has images.
    """

    def __init__(self, items: Sequence[Placed], max_images: int = 0) -> None:
        self._shown = _shown(items, max_images)
        self.parts: dict[str, tuple[Part, ...]] = {}
        self._earlier: dict[str, list[tuple[Part, ...]]] = {}  # results of calls whose ids occur again later
        self.approved: dict[str, str] = {}  # id of the call -> path of the approval
        self.call_paths: dict[str, str] = {}
        self.run_by_approval: set[str] = set()
        self._requests: set[str] = set()
        self._left: list[str] = []  # approved calls without a result after the last approved call that ran
        for item, path in items:
            if isinstance(item, McpApprovalRequestItem):
                self._claim(item.id, f"{path}.id")
                self._requests.add(item.id)
            elif isinstance(item, (FunctionCallItem, CustomCallItem)):
                self._claim(item.call_id, f"{path}.call_id")
            elif isinstance(item, CallOutputItem):
                if item.call_id not in self.call_paths:
                    _refuse(f"{path}.call_id", f"{item.call_id!r:.80} does not match an earlier call")
                if item.call_id in self.parts:
                    _refuse(f"{path}.call_id", f"{item.call_id!r:.80} has an output already")
                self.parts[item.call_id] = parts_of(item.output, f"{path}.output")
            elif isinstance(item, McpCallItem):
                self._ran(item, path)
            elif isinstance(item, McpApprovalResponseItem):
                self._decided(item, path)
            elif isinstance(item, (ReasoningItem, MessageItem)):
                asked = isinstance(item, MessageItem) and item.role != "assistant"
                passed = self._left if asked else [*self.approved]  # the conversation went on without these calls
                self.parts |= dict.fromkeys(passed, (TextPart(NOT_RUN),))
                self.approved = {call: path for call, path in self.approved.items() if call not in passed}
        for request in self._requests:
            if request not in self.approved:
                self.parts.setdefault(request, (TextPart(NOT_APPROVED),))

    def check_all(self, messages: Sequence[Message]) -> None:
        """Refuse calls without results, and approvals of calls that are not at the end of the conversation."""
        for call_id, path in self.call_paths.items():
            if call_id not in self.parts and call_id not in self.approved:
                _refuse(path, f"{call_id!r:.80} has no output: send it as a function_call_output")
        last = next((one for one in reversed(messages) if one.role != "tool"), None)
        open_calls = set() if last is None else {call.id for call in last.calls}
        for call_id, path in self.approved.items():
            if call_id not in open_calls:
                _refuse(path, "approves a call that other messages follow: send them after the call has run")

    def take(self, call_id: str) -> tuple[Part, ...] | None:
        """Return the result of a call; must be called once for each call, in the calls' order."""
        earlier = self._earlier.get(call_id)
        return earlier.pop(0) if earlier else self.parts.get(call_id)

    def _claim(self, call_id: str, path: str) -> None:
        if call_id in self.parts:
            self._earlier.setdefault(call_id, []).append(self.parts.pop(call_id))
        elif call_id in self.call_paths:
            _refuse(path, f"{call_id!r:.80} is already the id of another call")
        self.call_paths[call_id] = path

    def _ran(self, item: McpCallItem, path: str) -> None:
        request = item.approval_request_id
        if request is not None and request in self._requests:
            self.approved.pop(request, None)
            self.run_by_approval.add(item.id)
            self._left = [*self.approved]
        else:
            request = item.id
            self._claim(request, f"{path}.id")
        shown = item.id in self._shown
        self.parts[request] = parts_of(item.content, f"{path}.content") if shown else (TextPart(_outcome(item)),)

    def _decided(self, item: McpApprovalResponseItem, path: str) -> None:
        request = item.approval_request_id
        if request not in self._requests:
            _refuse(f"{path}.approval_request_id", f"{request!r:.80} is not an earlier mcp_approval_request")
        if request in self.approved or request in self.parts:
            _refuse(f"{path}.approval_request_id", f"{request!r:.80} has been answered already")
        if item.approve:
            self.approved[request] = f"{path}.approval_request_id"
        else:
            self.parts[request] = (TextPart(f"{DENIED} {item.reason}" if item.reason else DENIED),)


def _shown(items: Sequence[Placed], room: int) -> set[str]:
    """Return the ids of the latest `mcp_call` items whose images fit beside those of messages and call outputs."""
    shown = set[str]()
    if room:
        for item, _ in items:
            if isinstance(item, (MessageItem, CallOutputItem)):
                room -= images_in(item.content if isinstance(item, MessageItem) else item.output)
        for item, _ in reversed(items):
            if isinstance(item, McpCallItem) and 0 < (images := images_in(item.content)) <= room:
                room -= images
                shown.add(item.id)
    return shown


def _outcome(item: McpCallItem) -> str:
    if item.output is not None:
        return item.output
    match item.error:
        case None:
            return NOT_RUN
        case str(text) | {"content": [{"text": str(text)}]} | {"message": str(text)}:  # the text that the model saw
            return text
    return json.dumps(item.error, ensure_ascii=False)


def _refuse(path: str, text: str) -> None:
    raise InvalidParameterError(f"{path}: {text}", path)
