# SPDX-License-Identifier: MIT
"""Supervisor: opens the connection to an MCP server, follows changes of the tools, and reconnects when it is lost.

A program that ends at the first request of the newer protocol, as servers of the Rust SDK do, is started once more for
the older one. The delay before an attempt grows from about 0.5 to 30 seconds with each failure; a call of a tool
ends it, after at least 0.25 seconds. After `MAX_ATTEMPTS` failures in a row, only such a call starts an attempt, unless
no tools of the server are known.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio
from mcp import MCPError
from mcp.client.subscriptions import SubscriptionLost
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from candle_vllm.responses.mcp.connection import SESSION_LOST, ConnectionLostError, McpConnection
from candle_vllm.responses.mcp.peer import Peer
from candle_vllm.responses.mcp.processes import to_the_end
from candle_vllm.responses.mcp.server_config import McpServerConfig, Transport
from candle_vllm.responses.mcp.transports import NO_SUCH_TRANSPORT, kinds

if TYPE_CHECKING:
    from mcp_types import Tool

logger = logging.getLogger(__name__)

MAX_PAGES = 100
MAX_TOOLS = 1000
MAX_BYTES = 4 * 1024 * 1024  # bytes of all definitions as JSON
_DEBOUNCE = 0.2  # seconds between a notification that the tools changed and their listing
_MIN_BETWEEN_LISTS, _MAX_BETWEEN_LISTS = 1.0, 16.0  # seconds; doubled with each failure
_PING_SECONDS = 5.0
_FIRST_DELAY, _LAST_DELAY = 1.0, 60.0  # seconds before a lost subscription is opened again
_ACK_SECONDS = 10.0


class ToolList(NamedTuple):
    """The tools that a server offers, by name, in its order; `notes` are at most 20 sentences on tools left out."""

    tools: dict[str, Tool]
    notes: tuple[str, ...]


async def list_tools(connection: McpConnection, config: McpServerConfig) -> ToolList:
    """Request the list page by page, and return the allowed tools; each request may take `connect_timeout`.

    Raises ConnectionLostError, TimeoutError, MCPError, ValidationError or RuntimeError if a page cannot be fetched.
    """
    tools: dict[str, Tool] = {}
    notes: list[str] = []
    size = 0
    async for tool in _all_tools(connection, config.connect_timeout, notes):
        if not config.allows(tool.name):
            continue
        if tool.execution is not None and tool.execution.task_support == "required":
            notes.append(f"the tool {tool.name[:100]!r} is left out: it runs only as a task, which is not supported")
            continue
        if tool.name in tools:
            notes.append(f"it lists the tool {tool.name[:100]!r} twice; the second is left out")
            continue
        size += len(json.dumps(tool.model_dump(mode="json", by_alias=True, exclude_none=True)))
        if len(tools) >= MAX_TOOLS or size > MAX_BYTES:
            limit = f"{MAX_TOOLS} tools" if len(tools) >= MAX_TOOLS else f"{MAX_BYTES} bytes of definitions"
            notes.append(f"it lists more than {limit}; the tools after the first {len(tools)} are left out")
            break
        tools[tool.name] = tool
    return ToolList(tools, tuple(notes[:20]))


async def _all_tools(connection: McpConnection, seconds: float, notes: list[str]) -> AsyncIterator[Any]:
    if not connection.client.server_capabilities.tools:
        return
    cursor: str | None = None
    seen: set[str] = set()
    for _ in range(MAX_PAGES):
        page = await connection.run(connection.client.list_tools(cursor=cursor), seconds)
        for tool in page.tools:
            yield tool
        cursor = page.next_cursor
        if cursor is None:
            return
        if cursor in seen:
            notes.append("its list of tools repeats a cursor; later pages are left out")
            return
        seen.add(cursor)
    notes.append(f"its list of tools has more than {MAX_PAGES} pages; the rest is left out")


class ToolWatch:
    """Lists and watches the tools of one server; a new connection keeps the last list until it has its own.

    `changed` is called when the list has changed; `wake` is set when the state of a connection changes.
    """

    def __init__(self, peer: Peer, *, changed: Callable[[ToolList], None], wake: asyncio.Event) -> None:
        self._peer = peer
        self._changed = changed
        self._wake = wake
        self.listed: ToolList | None = None  # the last list; None before the first

    async def list(self, connection: McpConnection) -> str | None:
        """List the tools, and call `changed` if they changed; return a sentence if listing fails, or None."""
        connection.tools_changed = False
        try:
            found = await list_tools(connection, self._peer.config)
        except TimeoutError:
            seconds = self._peer.config.connect_timeout
            return f"it did not list its tools within {seconds:g} seconds (connect_timeout)"
        except ConnectionLostError as error:
            return self._peer.redact(str(error))
        except (MCPError, ValidationError, RuntimeError, ExceptionGroup) as error:
            return f"its list of tools: {self._peer.sentence(error)}"
        changed = self.listed is None or found.tools != self.listed.tools
        self.listed = found
        for note in found.notes:
            self._peer.note(note)
        if changed:
            try:
                self._changed(found)
            except Exception:
                logger.exception("MCP server %.100r: the callback for changed tools failed", self._peer.config.name)
        return None

    async def follow(self, connection: McpConnection) -> None:
        """Watch a connection until it ends: list changed tools, and ping if the session may no longer exist."""
        listener: asyncio.Task[None] | None = None
        pause = _MIN_BETWEEN_LISTS
        capability = connection.client.server_capabilities.tools
        if capability and capability.list_changed and connection.client.protocol_version in MODERN_PROTOCOL_VERSIONS:
            listener = asyncio.create_task(listen_for_changes(connection, self._peer.note))
        try:
            while not connection.is_down:
                await self._wake.wait()
                self._wake.clear()
                if connection.in_doubt and not connection.is_down:
                    await self._ping(connection)
                if connection.tools_changed and not connection.is_down:
                    await self._sleep(connection, _DEBOUNCE)
                    why = await self.list(connection)
                    if why is None:
                        pause = _MIN_BETWEEN_LISTS
                    else:
                        self._peer.note(f"the tools could not be listed again: {why}")
                        connection.tools_changed, pause = True, min(_MAX_BETWEEN_LISTS, 2 * pause)
                    await self._sleep(connection, pause)
        finally:
            if listener is not None:
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)

    async def _sleep(self, connection: McpConnection, seconds: float) -> None:
        """Sleep, at most until the connection ends or is in doubt; `wake` is set afterwards, so no change is missed."""
        with anyio.move_on_at(asyncio.get_running_loop().time() + seconds):
            while not (connection.is_down or connection.in_doubt):
                await self._wake.wait()
                self._wake.clear()
        self._wake.set()

    async def _ping(self, connection: McpConnection) -> None:
        try:
            await connection.run(connection.client.session.send_ping(), _PING_SECONDS)
        except (MCPError, ValidationError, RuntimeError, TimeoutError, ConnectionLostError):
            connection.end(SESSION_LOST)
        connection.in_doubt = False


async def listen_for_changes(connection: McpConnection, note: Callable[[str], None]) -> None:
    """Subscribe to changes of the tools until the connection ends, or the server refuses the subscription.

    The protocol does not repeat lost notifications, so the tools are listed again after a lost subscription.
    """
    delay = _FIRST_DELAY
    while not connection.is_down:
        began = asyncio.get_running_loop().time()
        try:
            async with (
                asyncio.timeout(_ACK_SECONDS) as limit,
                connection.client.listen(tools_list_changed=True) as events,
            ):
                limit.reschedule(None)
                async for _ in events:
                    connection.note_tools_changed()
        except (SubscriptionLost, TimeoutError) as error:
            note(f"the subscription to changes of tools was lost: {type(error).__name__}")
        except (MCPError, RuntimeError) as error:
            note(f"it refuses the subscription to changes of tools: {str(error)[:200]}")
            return
        if asyncio.get_running_loop().time() - began > _LAST_DELAY:
            delay = _FIRST_DELAY
        await asyncio.sleep(delay)
        delay = min(_LAST_DELAY, 2 * delay)
        connection.note_tools_changed()


LinkState = Literal["connecting", "ready", "failed", "closed", "disabled"]

FIRST_DELAY, LAST_DELAY = 0.5, 30.0  # seconds between attempts to connect
MAX_ATTEMPTS = 12  # failures in a row; after that, only a call of one of the server's known tools starts an attempt
STEADY = 5.0  # seconds after which a connection counts as a success, and the delays are reset


class Supervisor:
    """Connects to one server, and reconnects when a connection ends.

    Attributes:
        state, error, connections: values that a link reports: the state, the last error, and the number of connections.
        transports: transports to try, in order; after a success, only the one that connected.
        settled: set after each attempt, and at the end.
    """

    def __init__(self, peer: Peer, *, changed: Callable[[ToolList], None]) -> None:
        self._peer = peer
        self._mode = "auto"  # how the protocol version is negotiated
        self.state: LinkState = "closed" if peer.config.enabled else "disabled"
        self.error: str | None = None
        self.connection: McpConnection | None = None
        self.transports: tuple[Transport, ...] = kinds(peer.config)
        self.connections = 0
        self.settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._logged: dict[Transport, str] = {}  # last failure of each transport, "" after a connection
        self._wanted = False
        self._wake = asyncio.Event()
        self._watch = ToolWatch(peer, changed=changed, wake=self._wake)

    @property
    def listed(self) -> ToolList | None:
        return self._watch.listed

    @property
    def runs(self) -> bool:
        """Whether the server is connected, or attempts are being made."""
        return self._task is not None and not self._task.done()

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection that accepts calls."""
        return self.state == "ready" and self.connection is not None and not self.connection.is_down

    def start(self) -> None:
        """Start to connect; `settled` is set after the first attempt."""
        self._closing = False
        self.settled.clear()
        self._task = asyncio.create_task(self._supervise(), name=f"mcp {self._peer.config.name}")

    async def stop(self) -> None:
        self._closing = True
        self._wake.set()
        if self.connection is not None:
            self.connection.end("the connection was closed")
        if self._task is not None:
            await to_the_end(_join(self._task))
        if self.state != "disabled":
            self.state = "closed"

    def want(self) -> None:
        """Request a connection: an attempt is made now, and `settled` is set after it."""
        self._wanted = True
        self.settled.clear()
        self._wake.set()

    async def _supervise(self) -> None:
        failures = 0
        try:
            while not self._closing:
                began = asyncio.get_running_loop().time()
                connected = await self._connect()
                self.settled.set()
                if connected:
                    await self._watch.follow(connected)
                    self._peer.note(f"the connection ended: {connected.why}")
                    self.state = "failed"
                    await connected.close()
                    self.error = self._peer.redact(connected.why)
                lasted = asyncio.get_running_loop().time() - began
                failures = 1 if connected and lasted >= STEADY else failures + 1
                if not self._closing:
                    await self._pause(failures)
        except Exception as error:
            logger.exception("MCP server %.100r: its supervisor failed", self._peer.config.name)
            self.state, self.error = "failed", f"an internal failure: {type(error).__name__}"
        finally:
            if self.connection is not None:
                await self.connection.close(patience=0.0)
            self.connection = None
            self.settled.set()

    async def _connect(self) -> McpConnection | None:
        """Make one attempt: try the transports in order, until one of them connects and lists its tools."""
        self.state = "connecting"
        first_error: str | None = None
        kinds = [*self.transports]
        for kind in kinds:
            connection = self.connection = McpConnection(self._peer, kind, mode=self._mode, wake=self._wake.set)
            if await connection.open(self._peer.config.connect_timeout):
                why = await self._watch.list(connection)
            else:
                why = self._peer.redact(connection.why)
            if why is None:
                self.transports = (kind,)
                if connection.client.protocol_version not in MODERN_PROTOCOL_VERSIONS:
                    self._mode = "legacy"  # such a server leaves the requests of "auto" unanswered, which costs seconds
                self._logged[kind] = ""
                self.connections += 1
                self.error = None
                self.state = "ready"
                where = kind if self._peer.server is None else "this process"
                self._peer.note(f"connected over {where}, protocol {connection.client.protocol_version}")
                return connection
            status = connection.status
            await connection.close(patience=0.0)
            # The caller of the first attempt reports its failure, and the same failure is not logged again.
            line = f"could not connect over {kind}: {why}"
            (self._peer.log if self._logged.get(kind, line) == line else self._peer.note)(line)
            self._logged[kind] = line
            if kind == "stdio" and self._mode == "auto" and connection.was_refused and not self._closing:
                self._mode = "legacy"
                kinds.append(kind)
                continue
            first_error = first_error or why
            if status not in NO_SUCH_TRANSPORT or self._closing:
                break
        self._mode = "auto"  # the next attempt may reach a different server
        self.error = first_error
        self.state = "failed"
        return None

    async def _pause(self, failures: int) -> None:
        """Wait before the next attempt; a call of one of the server's tools ends the wait."""
        doubled = FIRST_DELAY * 2 ** min(failures - 1, MAX_ATTEMPTS)
        delay: float | None = min(LAST_DELAY, doubled) * random.uniform(0.75, 1.25)  # noqa: S311
        if failures >= MAX_ATTEMPTS and self.listed and self.listed.tools:
            delay = None
            self._peer.note(f"{failures} attempts failed; the next one is made when a tool is called")
        least = asyncio.get_running_loop().time() + FIRST_DELAY / 2
        with anyio.move_on_after(delay):
            while not (self._closing or self._wanted):
                await self._wake.wait()
                self._wake.clear()
        while not self._closing and (left := least - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left, 0.05))
        self._wanted = False


async def _join(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task}, timeout=20.0)
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=10.0)
