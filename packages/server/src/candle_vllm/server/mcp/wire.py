# SPDX-License-Identifier: MIT
"""Wire types of the routes of `/v1/mcp`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import MAX_TOOL_NAME, WireModel
from candle_vllm.responses.tools.tool import ContentPart


class McpCallRequest(WireModel):
    """A call of a tool.

    Attributes:
        name: the tool's name in `/v1/mcp/tools`.
        arguments: arguments that are valid by the tool's schema.
        approved: whether somebody has approved this call.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME)]
    arguments: dict[str, Any] | None = None
    approved: bool | None = None


class McpServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The current state of an MCP server.

    Attributes:
        name: its name in mcp.json.
        transport: stdio, http or sse.
        state: connecting, ready, failed (the connection is tried again), closed or disabled.
        error: why there is no connection, or null.
        protocol_version: the negotiated version, or null.
        tools_count: number of its tools.
        reconnects: number of connections after the first.
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
    """A tool in the form of a chat request; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class McpToolInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of an MCP server.

    Attributes:
        function: the function as models get it.
        server: name of its server in mcp.json.
        original_name: the tool's name at its server.
        read_only: whether its server declares it read-only.
        auto_approve: whether mcp.json lets it run without approval.
    """

    type: str = "function"
    function: McpFunction
    server: str
    original_name: str
    read_only: bool
    auto_approve: bool


class McpCallResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a call.

    Attributes:
        status: completed; failed if the tool reports an error; invalid_arguments, timed_out or unavailable.
        content: the parts of the output.
        structured: structured content, or null.
        is_error: whether the tool failed or did not run.
        text: the output as a model sees it.
        seconds: duration of the call.
    """

    status: str
    content: tuple[ContentPart, ...]
    structured: Any
    is_error: bool
    text: str
    seconds: float
