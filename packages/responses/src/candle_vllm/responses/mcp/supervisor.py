# SPDX-License-Identifier: MIT
"""Supervisor: opens the connection to an MCP server, follows changes of the tools, and reconnects when it is lost.

A program that ends at the first request of the newer protocol, as servers of the Rust SDK do, is started once more for
the older one. The delay before an attempt grows from about 0.5 to 30 seconds with each failure; a call of a tool
ends it, after at least 0.25 seconds. After `MAX_ATTEMPTS` failures in a row, only such a call starts an attempt, unless
no tools of the server are known.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Literal

import anyio
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from candle_vllm.responses.mcp.connection import McpConnection
from candle_vllm.responses.mcp.peer import Peer
from candle_vllm.responses.mcp.processes import to_the_end
from candle_vllm.responses.mcp.tool_list import ToolList, ToolWatch
from candle_vllm.responses.mcp.transports import NO_SUCH_TRANSPORT, Kind, kinds

logger = logging.getLogger(__name__)

LinkState = Literal["connecting", "ready", "failed", "closed", "disabled"]

FIRST_DELAY, LAST_DELAY = 0.5, 30.0  # seconds between attempts to connect
MAX_ATTEMPTS = 12  # failures in a row; after that, only a call of one of the server's known tools starts an attempt
STEADY = 5.0  # seconds after which a connection counts as a success, and the delays are reset


class Supervisor:
    """Connects to one server, and reconnects when a connection ends.

    Attributes:
        state, error, connections: values that a link reports: the state, the last error, and the number of connections.
        connection: current connection, or None.
        transports: transports to try, in order; after a success, only the one that connected.
        settled: set after each attempt, and at the end.

    Args:
        changed: called when the list of tools has changed.
    """

    def __init__(self, peer: Peer, *, changed: Callable[[ToolList], None]) -> None:
        self._peer = peer
        self._mode = "auto"  # how the protocol version is negotiated
        self.state: LinkState = "closed" if peer.config.enabled else "disabled"
        self.error: str | None = None
        self.connection: McpConnection | None = None
        self.transports: tuple[Kind, ...] = kinds(peer.config)
        self.connections = 0
        self.settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._logged: dict[Kind, str] = {}  # last failure of each transport, "" after a connection
        self._wanted = False
        self._wake = asyncio.Event()
        self._watch = ToolWatch(peer, changed=changed, wake=self._wake)

    @property
    def listed(self) -> ToolList | None:
        """The tools of the last connection."""
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
        """End the connection and all attempts."""
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
