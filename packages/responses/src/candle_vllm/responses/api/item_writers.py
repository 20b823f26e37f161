"""Output items while they grow: each writes its own events, from `output_item.added` to `output_item.done`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.responses.api.call_results import NOT_RUN
from candle_vllm.responses.api.messages import CUSTOM_INPUT, encode_thoughts
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.output import (
    CustomToolCallOut,
    FunctionCallOut,
    McpCallOut,
    MessageOut,
    OutputItem,
    OutputText,
    ProtocolFailure,
    ReasoningOut,
    ReasoningText,
    ToolFailure,
)
from candle_vllm.responses.tools.tool import ToolResult

Emit = Callable[..., None]
"""Adds an event: `emit(kind, **fields)`; the number is added to it."""

_TIMED_OUT, _UNAVAILABLE, _REFUSED = -32001, -32000, -32602  # JSON-RPC's codes, as MCP uses them
_CODES = {"timed_out": _TIMED_OUT, "unavailable": _UNAVAILABLE}


def new_id(prefix: str) -> str:
    """An id of an item or of a response."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ItemWriter:
    """An item at its place in the output.

    Args:
        emit: takes the events.
        index: its place.
        prefix: of its id.
    """

    def __init__(self, emit: Emit, index: int, prefix: str) -> None:
        self._emit_any = emit
        self.index = index
        self.id = new_id(prefix)
        self.final: OutputItem | None = None  # as it stays; None while it grows

    def begin(self) -> None:
        """The first event."""
        self._emit_any(wire.OutputItemAdded, output_index=self.index, item=self.item("in_progress"))

    def end(self, status: str = "completed") -> None:
        """The last events; `status` is "completed" or "incomplete"."""
        self._end_content()
        self.final = self.item(status)
        self._emit_any(wire.OutputItemDone, output_index=self.index, item=self.final)

    def item(self, status: str) -> OutputItem:
        """The item as it stands."""
        raise NotImplementedError

    def _end_content(self) -> None:
        """What stands before `output_item.done`."""

    def _emit(self, kind: type[wire.StreamEvent], **fields: Any) -> None:
        self._emit_any(kind, item_id=self.id, output_index=self.index, **fields)


class MessageWriter(ItemWriter):
    """A message of one text."""

    def __init__(self, emit: Emit, index: int) -> None:
        super().__init__(emit, index, "msg")
        self._text: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []

    def begin(self) -> None:
        super().begin()
        self._emit(wire.ContentPartAdded, content_index=0, part=OutputText(text=""))

    def add(self, text: str, logprobs: tuple[ChatTokenLogprob, ...]) -> None:
        """More text."""
        self._text.append(text)
        self._logprobs += logprobs
        self._emit(wire.OutputTextDelta, content_index=0, delta=text, logprobs=logprobs)

    def item(self, status: str) -> MessageOut:
        return MessageOut(id=self.id, status=status, content=() if status == "in_progress" else (self._part(),))

    def _end_content(self) -> None:
        part = self._part()
        self._emit(wire.OutputTextDone, content_index=0, text=part.text, logprobs=part.logprobs)
        self._emit(wire.ContentPartDone, content_index=0, part=part)

    def _part(self) -> OutputText:
        return OutputText(text="".join(self._text), logprobs=tuple(self._logprobs))


class ReasoningWriter(ItemWriter):
    """Thoughts; `encoded` adds them in the form that is sent back."""

    def __init__(self, emit: Emit, index: int, *, encoded: bool) -> None:
        super().__init__(emit, index, "rs")
        self._encoded = encoded
        self._text: list[str] = []

    def begin(self) -> None:
        super().begin()
        self._emit(wire.ContentPartAdded, content_index=0, part=ReasoningText(text=""))

    def add(self, text: str) -> None:
        """More thoughts."""
        self._text.append(text)
        self._emit(wire.ReasoningTextDelta, content_index=0, delta=text)

    def item(self, status: str) -> ReasoningOut:
        if status == "in_progress":
            return ReasoningOut(id=self.id, status=status, content=())
        text = "".join(self._text)
        encoded = encode_thoughts(text) if self._encoded else None
        return ReasoningOut(id=self.id, status=status, content=(ReasoningText(text=text),), encrypted_content=encoded)

    def _end_content(self) -> None:
        text = "".join(self._text)
        self._emit(wire.ReasoningTextDone, content_index=0, text=text)
        self._emit(wire.ContentPartDone, content_index=0, part=ReasoningText(text=text))


class CallWriter(ItemWriter):
    """A call whose arguments come in pieces."""

    def __init__(self, emit: Emit, index: int, prefix: str) -> None:
        super().__init__(emit, index, prefix)
        self._arguments: list[str] = []

    @property
    def arguments(self) -> str:
        """So far."""
        return "".join(self._arguments)

    def add(self, delta: str) -> None:
        """More of them."""
        self._arguments.append(delta)


class FunctionWriter(CallWriter):
    """A call of a function of the caller's."""

    def __init__(self, emit: Emit, index: int, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(emit, index, "fc")
        self._call_id, self._name, self._namespace = call_id, name, namespace

    def add(self, delta: str) -> None:
        super().add(delta)
        self._emit(wire.FunctionArgumentsDelta, delta=delta)

    def item(self, status: str) -> FunctionCallOut:
        return FunctionCallOut(
            id=self.id,
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments=self.arguments,
            namespace=self._namespace or UNSET,
        )

    def _end_content(self) -> None:
        self._emit(wire.FunctionArgumentsDone, name=self._name, arguments=self.arguments)


class CustomWriter(CallWriter):
    """A call of a custom tool; its input is told when the JSON that it comes in is complete."""

    def __init__(self, emit: Emit, index: int, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(emit, index, "ctc")
        self._call_id, self._name, self._namespace = call_id, name, namespace
        self._input = ""

    def item(self, status: str) -> CustomToolCallOut:
        return CustomToolCallOut(
            id=self.id,
            status=status,
            call_id=self._call_id,
            name=self._name,
            input=self._input,
            namespace=self._namespace or UNSET,
        )

    def _end_content(self) -> None:
        self._input = custom_input(self.arguments)
        if self._input:
            self._emit(wire.CustomInputDelta, delta=self._input)
        self._emit(wire.CustomInputDone, input=self._input)


class McpCallWriter(CallWriter):
    """A call that runs here, on an MCP server."""

    def __init__(self, emit: Emit, index: int, server: str, name: str, approval: str | None = None) -> None:
        super().__init__(emit, index, "mcp")
        self._server, self._name, self._approval = server, name, approval
        self._told = False
        self._result: ToolResult | None = None

    def begin(self) -> None:
        super().begin()
        self._emit(wire.McpCallInProgress)

    def add(self, delta: str) -> None:
        super().add(delta)
        self._emit(wire.McpArgumentsDelta, delta=delta)

    def end_arguments(self) -> None:
        """They are complete; once."""
        if not self._told:
            self._told = True
            self._emit(wire.McpArgumentsDone, arguments=self.arguments)

    def finish(self, result: ToolResult) -> None:
        """The last events, with what came of the call."""
        self._result = result
        self.end("completed" if result.status == "completed" else "failed")

    def item(self, status: str) -> McpCallOut:
        result = self._result
        return McpCallOut(
            id=self.id,
            status=status,
            server_label=self._server,
            name=self._name,
            arguments=self.arguments,
            output=result.text if result is not None and result.status == "completed" else None,
            error=None if result is None or result.status == "completed" else _failure(result),
            approval_request_id=self._approval,
        )

    def _end_content(self) -> None:
        self.end_arguments()
        failed = self._result is None or self._result.status != "completed"
        self._emit(wire.McpCallFailed if failed else wire.McpCallCompleted)


def _failure(result: ToolResult) -> ToolFailure | ProtocolFailure:
    if result.status == "failed":
        return ToolFailure(content=({"type": "text", "text": result.text},))
    return ProtocolFailure(code=_CODES.get(result.status, _REFUSED), message=result.text or NOT_RUN)


def custom_input(arguments: str) -> str:
    """The text for a custom tool in the arguments of the function that stands for it.

    What is not of the form that was asked for, such as JSON that was cut, is given as it is.
    """
    try:
        value = decode_json(arguments)
    except InvalidBodyError:
        return arguments
    text = value.get(CUSTOM_INPUT) if isinstance(value, dict) and len(value) == 1 else None
    if text is None:
        return arguments
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
