# SPDX-License-Identifier: MIT
"""Writers of calls: of functions, of custom tools, and of MCP tools, which this server runs and which have a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from msgspec import UNSET

from candle_vllm.openai.protocol.custom_tools import custom_input
from candle_vllm.openai.task import Part, TextPart
from candle_vllm.responses.api.call_results import NOT_RUN
from candle_vllm.responses.api.item_writers import Emit, ItemWriter
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol import response
from candle_vllm.responses.tools.tool import ToolResult

_TIMED_OUT, _UNAVAILABLE, _REFUSED = -32001, -32000, -32602  # JSON-RPC's error codes, as MCP uses them
_CODES = {"timed_out": _TIMED_OUT, "unavailable": _UNAVAILABLE}


class CallWriter(ItemWriter):
    """A call whose arguments arrive in deltas."""

    def __init__(self, emit: Emit, index: int, prefix: str) -> None:
        super().__init__(emit, index, prefix)
        self._arguments: list[str] = []

    @property
    def arguments(self) -> str:
        """The arguments so far."""
        return "".join(self._arguments)

    def add(self, delta: str) -> None:
        """Add a delta of the arguments."""
        self._arguments.append(delta)


class _ClientCallWriter(CallWriter):
    """A call that the client runs; its item's id begins with `prefix`."""

    prefix: ClassVar[str]

    def __init__(self, emit: Emit, index: int, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(emit, index, self.prefix)
        self._given: dict[str, Any] = {"call_id": call_id, "name": name, "namespace": namespace or UNSET}


class FunctionWriter(_ClientCallWriter):
    """A call of a function."""

    prefix = "fc"

    def add(self, delta: str) -> None:
        super().add(delta)
        self._emit(wire.FunctionArgumentsDelta, delta=delta)

    def item(self, status: str) -> response.FunctionCallOut:
        return response.FunctionCallOut(id=self.id, status=status, arguments=self.arguments, **self._given)

    def _end_content(self) -> None:
        self._emit(wire.FunctionArgumentsDone, name=self._given["name"], arguments=self.arguments)


class CustomWriter(_ClientCallWriter):
    """A call of a custom tool; its input, which is read from the JSON of the arguments, is sent at the call's end."""

    prefix = "ctc"
    _input = ""

    def item(self, status: str) -> response.CustomToolCallOut:
        return response.CustomToolCallOut(id=self.id, status=status, input=self._input, **self._given)

    def _end_content(self) -> None:
        self._input = custom_input(self.arguments)
        if self._input:
            self._emit(wire.CustomInputDelta, delta=self._input)
        self._emit(wire.CustomInputDone, input=self._input)


class McpCallWriter(CallWriter):
    """A call of an MCP server's tool, which this server runs."""

    def __init__(self, emit: Emit, index: int, server: str, name: str, approval: str | None = None) -> None:
        super().__init__(emit, index, "mcp")
        self._server, self._name, self._approval = server, name, approval
        self._arguments_ended = False
        self._result: ToolResult | None = None
        self._shown: Sequence[Part] = ()

    def begin(self) -> None:
        super().begin()
        self._emit(wire.McpCallInProgress)

    def add(self, delta: str) -> None:
        super().add(delta)
        self._emit(wire.McpArgumentsDelta, delta=delta)

    def end_arguments(self) -> None:
        """Send the event that the arguments are complete; repeated calls have no effect."""
        if not self._arguments_ended:
            self._arguments_ended = True
            self._emit(wire.McpArgumentsDone, arguments=self.arguments)

    def finish(self, result: ToolResult, shown: Sequence[Part] = ()) -> None:
        """Send the last events, with the result; `shown` are its parts in the prompt, if it has images."""
        self._result, self._shown = result, shown
        self.end("completed" if result.status == "completed" else "failed")

    def item(self, status: str) -> response.McpCallOut:
        result = self._result
        return response.McpCallOut(
            id=self.id,
            status=status,
            server_label=self._server,
            name=self._name,
            arguments=self.arguments,
            output=result.text if result is not None and result.status == "completed" else None,
            content=tuple(map(_shown, self._shown)) or UNSET,
            error=None if result is None or result.status == "completed" else _failure(result),
            approval_request_id=self._approval,
        )

    def _end_content(self) -> None:
        self.end_arguments()
        failed = self._result is None or self._result.status != "completed"
        self._emit(wire.McpCallFailed if failed else wire.McpCallCompleted)


def _shown(part: Part) -> response.ShownText | response.ShownImage:
    return (
        response.ShownText(text=part.text) if isinstance(part, TextPart) else response.ShownImage(image_url=part.source)
    )


def _failure(result: ToolResult) -> response.ToolFailure | response.ProtocolFailure:
    if result.status == "failed":
        return response.ToolFailure(content=({"type": "text", "text": result.text},))
    return response.ProtocolFailure(code=_CODES.get(result.status, _REFUSED), message=result.text or NOT_RUN)
