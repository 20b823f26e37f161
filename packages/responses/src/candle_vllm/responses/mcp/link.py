# SPDX-License-Identifier: MIT
"""McpLink: a connection to an MCP server that is restored when it is lost; LinkTool: one of the server's tools.

A supervisor maintains the connection; calls use the current one. A call that was running when the connection was lost
is not repeated, because it may have had its effects. A call that an HTTP server refuses because it no longer knows the
session has not run; it is repeated once, in a new session.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
from mcp import Client, MCPError
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from candle_vllm.responses.mcp.connection import ConnectionLostError, McpConnection
from candle_vllm.responses.mcp.http import http_auth
from candle_vllm.responses.mcp.peer import McpServerError, Peer
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.supervisor import LinkState, Supervisor, ToolList
from candle_vllm.responses.tools.names import tool_name
from candle_vllm.responses.tools.schemas import MAX_SCHEMA, ArgumentsChecker
from candle_vllm.responses.tools.tool import (
    ContentPart,
    Report,
    ToolArgumentsError,
    ToolDefinition,
    ToolError,
    ToolOutput,
    ToolProgress,
    ToolTimedOutError,
    ToolUnavailableError,
    allowed_seconds,
)

if TYPE_CHECKING:
    from mcp_types import CallToolResult, Implementation, Tool

MAX_CALLS = 64  # concurrent calls; further calls wait
CALL_WAIT = 5.0  # seconds that a call waits for a connection
MAX_PARTS = 1000  # of an output
_MESSAGE_CHARS = 2000  # characters of a server's message that a model sees


class McpLink:
    """The connection to one server; it belongs to the event loop in which it was started.

    Args:
        server: an `mcp` server object of this process, used instead of the configuration's command or URL.
        public_only: whether only hosts with public addresses are allowed. An untrusted user who names the address could
            otherwise reach this machine's network.
        on_tools_changed: called when the list of tools has changed, also after the first connection.
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
        self._on_tools_changed = on_tools_changed or (lambda _: None)
        self._peer = Peer(config, server, auth=http_auth(config), public_only=public_only)
        self._checks = OutputChecks()
        self._supervisor = Supervisor(self._peer, changed=self._tools_changed)
        self._calls = asyncio.Semaphore(MAX_CALLS)

    @property
    def state(self) -> LinkState:
        """State: "ready" accepts calls; "failed" is tried again, at the latest by a call, unless `start` gave up."""
        return self._supervisor.state

    @property
    def error(self) -> str | None:
        """Why there is no connection, or why the last one ended."""
        return self._supervisor.error

    @property
    def transport(self) -> str:
        """Transport that the connection uses, or would try first."""
        return "in process" if self._peer.server is not None else self._supervisor.transports[0]

    @property
    def tools(self) -> dict[str, Tool]:
        """Tools by the server's names for them; without a connection, the tools of the last connection."""
        return dict(self._supervisor.listed.tools) if self._supervisor.listed else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Texts that say what was left out of the server's list of tools, and why."""
        return self._supervisor.listed.notes if self._supervisor.listed else ()

    @property
    def reconnects(self) -> int:
        """Number of connections after the first one."""
        return max(0, self._supervisor.connections - 1)

    @property
    def protocol_version(self) -> str | None:
        """The negotiated version of MCP; None without a connection."""
        return self._client.protocol_version if self._client else None

    @property
    def server_info(self) -> Implementation | None:
        """Name and version of the server, if it reports them."""
        return self._client.server_info if self._client else None

    @property
    def instructions(self) -> str | None:
        """Instructions for the use of the server: the configuration's, or else the server's own."""
        if self.config.instructions is not None:
            return self.config.instructions
        return self._client.instructions if self._client else None

    def log_lines(self) -> list[str]:
        """Return the last lines of the log: standard error of a stdio server, and events of the connection."""
        return self._peer.log_lines()

    async def start(self, *, keep_trying: bool = False) -> None:
        """Connect, and list the tools; does nothing for a disabled server, or if the link is started already.

        If the connection fails, McpServerError is raised; with `keep_trying`, further attempts follow in the
        background.
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
        """End all calls, the connection, and the server's program. Idempotent."""
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
        """Call a tool. Failures that the tool reports and invalid outputs are results with `is_error`.

        Cancelling the coroutine notifies the server. `timeout` is for the whole call; None uses the configuration's.
        `report` receives the progress that the server reports.

        Raises:
            ToolUnavailableError: there is no connection, it was lost during the call, or too many calls run.
            ToolTimedOutError: the timeout has expired; the server was notified.
            ToolArgumentsError: the arguments are not JSON.
            ToolError: the tool does not exist, or the server refused the call or violated the protocol.
        """
        try:
            sent = to_jsonable_python(dict(arguments), inf_nan_mode="constants")
            json.dumps(sent, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolArgumentsError(f"the arguments must be JSON: {error!s:.200}") from None
        seconds = self.config.timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + seconds
        repeated = False
        while True:
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
                if connection.is_down:  # it ended while the call waited for its turn
                    continue
                left = max(0.001, deadline - asyncio.get_running_loop().time())
                result = await connection.run(
                    connection.client.call_tool(name, dict(arguments), progress_callback=_progress(report)), left
                )
                break
            except TimeoutError:
                raise ToolTimedOutError(f"the tool did not answer within {seconds:g} seconds") from None
            except ConnectionLostError as error:
                raise ToolUnavailableError(
                    f"the connection to the MCP server {self.name!r} was lost during the call ({error}); whether the "
                    "tool did its work is not known"
                ) from None
            except (MCPError, ValidationError, RuntimeError, ExceptionGroup) as error:
                if repeated or not (isinstance(error, MCPError) and await connection.has_lost_session()):
                    raise ToolError(self._refusal(error)) from None
                repeated = True
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
        self._on_tools_changed(self)

    async def _connected(self, seconds: float) -> McpConnection:
        """Return the current connection; without one, request one and wait for it."""
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
    if report is None:
        return None

    async def tell(progress: float, total: float | None, message: str | None) -> None:
        report(ToolProgress(progress=progress, total=total, message=message[:1000] if message else message))

    return tell


class LinkTool:
    """One of a server's tools, as `Tool` of a registry."""

    def __init__(self, link: McpLink, tool: Tool) -> None:
        self._link = link
        schema = dict(tool.input_schema)
        schema.setdefault("type", "object")
        self.definition = ToolDefinition(
            name=tool_name(link.name, tool.name),
            description=tool.description or tool.title or "",
            parameters=schema,
            server=link.name,
            original_name=tool.name,
            read_only=bool(tool.annotations and tool.annotations.read_only_hint),
        )
        self.timeout: float | None = link.config.timeout

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        name, seconds = self.definition.original_name, allowed_seconds.get()  # replaces the configuration's timeout
        return await self._link.call(name, arguments, timeout=seconds, report=report)


# ---- outputs of tools ------------------------------------------------------------------------------------------------


def tool_output(result: CallToolResult, *, fault: str | None = None) -> ToolOutput:
    """Convert a call's result; every kind of content in MCP is supported.

    `fault` is an error in a result that the server reports as a success; it becomes the first text.
    """
    parts = [_part(block) for block in result.content[:MAX_PARTS]]
    if len(result.content) > MAX_PARTS:
        parts.append(ContentPart(kind="text", text=f"[{len(result.content) - MAX_PARTS} more parts are left out]"))
    if fault is not None:
        parts.insert(0, ContentPart(kind="text", text=fault))
    return ToolOutput(
        content=tuple(parts), structured=result.structured_content, is_error=bool(result.is_error) or fault is not None
    )


def _part(block: Any) -> ContentPart:
    match block.type:
        case "text":
            return ContentPart(kind="text", text=block.text)
        case "image" | "audio":
            return ContentPart(kind=block.type, data=block.data, mime_type=block.mime_type)
        case "resource_link":
            return ContentPart(
                kind="resource_link", uri=str(block.uri), name=block.name, mime_type=block.mime_type,
                text=block.description,
            )  # fmt: skip
        case "resource":
            inner = block.resource
            return ContentPart(
                kind="resource", uri=str(inner.uri), mime_type=inner.mime_type,
                text=getattr(inner, "text", None), data=getattr(inner, "blob", None),
            )  # fmt: skip
    return ContentPart(kind="text", text=f"[content of the kind {str(block.type)[:50]!r}, which is not understood]")


class OutputChecks:
    """Checks outputs against their schemas. A checker is made at its first use, and kept until its schema changes."""

    def __init__(self) -> None:
        self._checkers: dict[str, tuple[Any, ArgumentsChecker]] = {}

    def keep(self, names: set[str]) -> None:
        """Drop the checkers of all tools except `names`."""
        self._checkers = {name: kept for name, kept in self._checkers.items() if name in names}

    async def fault(self, tool: Tool, result: CallToolResult) -> str | None:
        """Return the errors of an output that its server reports as a success, as a text for a model, or None."""
        schema = tool.output_schema
        if schema is None or result.is_error:
            return None
        if result.structured_content is None and "structured_content" not in result.model_fields_set:
            return "The tool ran, but gave no structured output, though its server declares a schema for it."
        structured: Any = result.structured_content
        known = self._checkers.get(tool.name)
        if known is None or known[0] != schema:
            if len(msgspec.json.encode(schema)) > MAX_SCHEMA:
                return None  # a schema of that size is not used
            known = self._checkers[tool.name] = (schema, ArgumentsChecker(schema, tool.name))
        told = "; ".join(await asyncio.to_thread(known[1].faults, structured))
        sentence = "The tool ran, but its output does not fit the schema that its server declares"
        return f"{sentence}: {told}" if told else None
