# SPDX-License-Identifier: MIT
"""McpLink: a server that is there, or comes back, and LinkTool: one of its tools for the registry.

A supervisor keeps the connection; calls go through the one of the moment. A call is never made a second time by itself:
one that was under way when the connection was lost may have done its work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from mcp import Client, MCPError
from pydantic import ValidationError

from candle_vllm.responses.mcp.connection import ConnectionLostError, McpConnection
from candle_vllm.responses.mcp.http import http_auth
from candle_vllm.responses.mcp.peer import McpServerError, Peer
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.supervisor import LinkState, Supervisor
from candle_vllm.responses.mcp.tool_list import ToolList
from candle_vllm.responses.mcp.tool_output import OutputChecks, tool_output
from candle_vllm.responses.tools.names import tool_name
from candle_vllm.responses.tools.tool import (
    Report,
    ToolDefinition,
    ToolError,
    ToolOutput,
    ToolProgress,
    ToolTimedOutError,
    ToolUnavailableError,
)

if TYPE_CHECKING:
    from mcp_types import Implementation, Tool

MAX_CALLS = 64  # at the same time; more wait
CALL_WAIT = 5.0  # seconds that a call waits for a connection
_MESSAGE_CHARS = 2000  # of a server's words that a model sees


class McpLink:
    """One server, by its configuration.

    It belongs to the event loop in which it was started.

    Args:
        config: of the server.
        server: an `mcp` server object of this process, in the place of what the configuration would open.
        public_only: its address was named by somebody whom it could lead into this network: a host whose addresses are
            not public is not reached.
        on_tools_changed: called after the list of tools has changed, also by the first connection.
    """

    def __init__(
        self,
        config: McpServerConfig,
        *,
        server: Any = None,
        public_only: bool = False,
        on_tools_changed: Callable[[McpLink], None] | None = None,
    ) -> None:
        self.config = config
        self.name = config.name
        self._on_tools_changed = on_tools_changed
        self._peer = Peer(config, server, auth=http_auth(config), public_only=public_only)
        self._checks = OutputChecks()
        self._supervisor = Supervisor(self._peer, changed=self._tools_changed)
        self._calls = asyncio.Semaphore(MAX_CALLS)

    @property
    def state(self) -> LinkState:
        """ "ready" takes calls; "failed" will be tried again, by itself or by the next call."""
        return self._supervisor.state

    @property
    def error(self) -> str | None:
        """Why there is no connection, or why the last one ended."""
        return self._supervisor.error

    @property
    def transport(self) -> str:
        """What the connection uses, or would."""
        return "in process" if self._peer.server is not None else self._supervisor.transports[0]

    @property
    def tools(self) -> dict[str, Tool]:
        """The server's tools by their names there; those of the last connection while there is no connection."""
        return dict(self._supervisor.listed.tools) if self._supervisor.listed else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the server's list of tools, and why."""
        return self._supervisor.listed.notes if self._supervisor.listed else ()

    @property
    def reconnects(self) -> int:
        """Connections after the first."""
        return max(0, self._supervisor.connections - 1)

    @property
    def protocol_version(self) -> str | None:
        """The version that both sides agreed on."""
        return self._client.protocol_version if self._client else None

    @property
    def server_info(self) -> Implementation | None:
        """Name and version, where the server gives them."""
        return self._client.server_info if self._client else None

    @property
    def instructions(self) -> str | None:
        """Words on how to use it: the configuration's, or else the server's."""
        if self.config.instructions is not None:
            return self.config.instructions
        return self._client.instructions if self._client else None

    def log_lines(self) -> list[str]:
        """The last lines of its log: standard error of a stdio server, and what happened to the connection."""
        return self._peer.log_lines()

    async def start(self, *, keep_trying: bool = False) -> None:
        """Connects and lists the tools. A disabled server is left alone.

        Args:
            keep_trying: after a failure, which is raised all the same, go on trying in the background.

        Raises:
            McpServerError: it could not be reached or talked to. Without `keep_trying` nothing of it is left.
        """
        if self.state == "disabled" or self._supervisor.runs:
            return
        self._supervisor.start()
        try:
            await self._supervisor.settled.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if self.state != "ready":
            why = self.error or "it could not be reached"
            if not keep_trying:
                await self.aclose()
                self._supervisor.state = "failed"
            raise McpServerError(self.name, why)

    async def aclose(self) -> None:
        """Ends the connection, the server's program and all calls. Idempotent."""
        await self._supervisor.stop()

    async def __aenter__(self) -> McpLink:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def call(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        timeout: float | None = None,
        report: Report | None = None,
    ) -> ToolOutput:
        """Calls a tool once.

        Cancelling tells the server so. What the server calls an error, and an output that does not fit the schema that
        it declares for it, are results with `is_error`.

        Args:
            name: the tool's name on the server.
            timeout: seconds for all; None is the configuration's.
            report: gets the progress that the server tells.

        Raises:
            ToolUnavailableError: there is no connection, or it was lost meanwhile.
            ToolTimedOutError: the time is over; the server was told.
            ToolError: there is no such tool, or the server refused the call or answered against the protocol.
        """
        seconds = self.config.timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + seconds
        connection = await self._connected(min(CALL_WAIT, seconds))
        tool = self.tools.get(name)
        if tool is None:
            raise ToolError(f"the MCP server {self.name!r} has no tool {name[:100]!r}")
        try:
            async with asyncio.timeout_at(deadline):
                await self._calls.acquire()
        except TimeoutError:
            raise ToolUnavailableError(f"{MAX_CALLS} calls of the MCP server {self.name!r} run already") from None
        try:
            left = max(0.001, deadline - asyncio.get_running_loop().time())
            result = await connection.run(
                connection.client.call_tool(name, dict(arguments), progress_callback=_progress(report)), left
            )
        except TimeoutError:
            raise ToolTimedOutError(f"the tool did not answer within {seconds:g} seconds") from None
        except ConnectionLostError as error:
            raise ToolUnavailableError(
                f"the connection to the MCP server {self.name!r} was lost during the call ({error}); whether the tool "
                "did its work is not known"
            ) from None
        except (MCPError, ValidationError, RuntimeError, ExceptionGroup) as error:
            raise ToolError(self._refusal(error)) from None
        finally:
            self._calls.release()
        return tool_output(result, fault=await self._checks.fault(tool, result))

    def _refusal(self, error: Exception) -> str:
        if isinstance(error, MCPError):
            return self._peer.redact(f"the MCP server {self.name!r} refused the call: {error.message[:_MESSAGE_CHARS]}")
        return f"the MCP server {self.name!r}: {self._peer.sentence(error)}"

    @property
    def _client(self) -> Client | None:
        connection = self._supervisor.connection
        return connection.client if connection is not None and self._supervisor.is_ready else None

    def _tools_changed(self, listed: ToolList) -> None:
        self._checks.keep(set(listed.tools))
        if self._on_tools_changed is not None:
            self._on_tools_changed(self)

    async def _connected(self, seconds: float) -> McpConnection:
        """The connection of the moment; waits a little for one that is being made."""
        supervisor = self._supervisor
        if supervisor.runs and not supervisor.is_ready:
            supervisor.want()
            with anyio.move_on_after(seconds):
                await supervisor.settled.wait()
        if supervisor.connection is None or not supervisor.is_ready:
            why = f": {self.error}" if self.error else ""
            raise ToolUnavailableError(f"the MCP server {self.name!r} is not available now ({self.state}{why})")
        return supervisor.connection


def _progress(report: Report | None) -> Any:
    """The SDK's callback for progress."""
    if report is None:
        return None

    async def tell(progress: float, total: float | None, message: str | None) -> None:
        report(ToolProgress(progress=progress, total=total, message=message[:1000] if message else message))

    return tell


class LinkTool:
    """One of a server's tools.

    Args:
        link: to the server.
        tool: as the server lists it.
    """

    def __init__(self, link: McpLink, tool: Tool) -> None:
        self._link = link
        self.definition = definition_of(link.name, tool)
        self.timeout: float | None = link.config.timeout
        """Seconds for one call, by the server's configuration."""

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        """Calls it once; see `McpLink.call`."""
        return await self._link.call(self.definition.original_name, arguments, report=report)


def definition_of(server: str, tool: Tool) -> ToolDefinition:
    """What a model sees of a server's tool."""
    schema = dict(tool.input_schema)
    schema.setdefault("type", "object")
    return ToolDefinition(
        name=tool_name(server, tool.name),
        description=tool.description or tool.title or "",
        parameters=schema,
        server=server,
        original_name=tool.name,
        read_only=bool(tool.annotations and tool.annotations.read_only_hint),
    )
