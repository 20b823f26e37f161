# SPDX-License-Identifier: MIT
"""What the routes of `/v1/mcp` take and give."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import MAX_TOOL_NAME, WireModel
from candle_vllm.responses.tools.tool import ContentPart


class McpCallRequest(WireModel):
    """A tool to be called once.

    Attributes:
        name: as `/v1/mcp/tools` has it.
        arguments: by the tool's schema.
        approved: true: somebody has agreed to this call.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME)]
    arguments: dict[str, Any] | None = None
    approved: bool | None = None


class McpServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An MCP server as it is now.

    Attributes:
        name: in mcp.json.
        transport: stdio, http or sse.
        state: connecting, ready, failed (it is tried again), closed or disabled.
        error: why there is no connection, or null.
        protocol_version: that both sides agreed on, or null.
        tools_count: how many tools it has.
        reconnects: connections after the first.
        log: the last lines of its log.
    """

    name: str
    transport: str
    state: str
    error: str | None
    protocol_version: str | None
    tools_count: int
    reconnects: int
    log: tuple[str, ...]


class McpFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a chat request has it; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class McpToolInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of an MCP server.

    Attributes:
        function: what a model is shown.
        server: its name in mcp.json.
        original_name: the tool's name there.
        read_only: its server says that it changes nothing.
        auto_approve: mcp.json lets it run without anybody's agreement.
    """

    type: str = "function"
    function: McpFunction
    server: str
    original_name: str
    read_only: bool
    auto_approve: bool


class McpCallResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call.

    Attributes:
        status: completed; failed where the tool says so; invalid_arguments, timed_out or unavailable.
        content: the pieces of the output.
        structured: a JSON value beside them, or null.
        is_error: the tool failed, or did not run.
        text: the output as a model would see it.
        seconds: how long it ran.
    """

    status: str
    content: tuple[ContentPart, ...]
    structured: Any
    is_error: bool
    text: str
    seconds: float
