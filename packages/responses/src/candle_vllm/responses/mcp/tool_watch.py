"""ToolWatch: the tools of one server as they are now, listed again when they change, and its session in doubt asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
from mcp import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from candle_vllm.responses.mcp.connection import ConnectionLostError, McpConnection
from candle_vllm.responses.mcp.failures import Redactor, sentence
from candle_vllm.responses.mcp.listening import listen_for_changes
from candle_vllm.responses.mcp.tool_list import ToolList, list_tools

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.server_config import McpServerConfig

logger = logging.getLogger(__name__)

_DEBOUNCE = 0.2  # seconds after a notice that the tools changed
_MIN_BETWEEN_LISTS = 1.0
_PING_SECONDS = 5.0


class ToolWatch:
    """What one server offers, over all its connections.

    Args:
        config: of the server.
        redact: takes secrets out of texts.
        note: gets a line for the link's log.
        changed: called when the list of tools is another one.
        wake: set when a connection has news.

    Attributes:
        listed: of the last connection that there was.
    """

    def __init__(
        self,
        config: McpServerConfig,
        *,
        redact: Redactor,
        note: Callable[[str], None],
        changed: Callable[[ToolList], None],
        wake: asyncio.Event,
    ) -> None:
        self._config = config
        self._redact = redact
        self._note = note
        self._changed = changed
        self._wake = wake
        self._ended = False
        self.listed: ToolList | None = None

    def begin(self) -> None:
        """Connections are followed from now on."""
        self._ended = False

    def end(self) -> None:
        """No connection is followed any more."""
        self._ended = True
        self._wake.set()

    async def list(self, connection: McpConnection) -> str | None:
        """Lists the tools and tells of a change; a sentence where that fails."""
        connection.tools_changed = False
        try:
            found = await list_tools(connection, self._config, self._config.connect_timeout)
        except TimeoutError:
            return f"it did not list its tools within {self._config.connect_timeout:g} seconds (connect_timeout)"
        except ConnectionLostError as error:
            return self._redact(str(error))
        except (MCPError, ValidationError, RuntimeError, ExceptionGroup) as error:
            return f"its list of tools: {sentence(error, self._config, self._redact)}"
        changed = not found.same_as(self.listed)
        self.listed = found
        for note in found.notes:
            self._note(note)
        if changed:
            try:
                self._changed(found)
            except Exception:
                logger.exception("MCP server %.100r: whoever follows its tools failed", self._config.name)
        return None

    async def follow(self, connection: McpConnection) -> None:
        """Follows a connection to its end: lists the tools again when they change, and asks a session in doubt."""
        listener: asyncio.Task[None] | None = None
        capability = connection.client.server_capabilities.tools
        if capability and capability.list_changed and connection.client.protocol_version in MODERN_PROTOCOL_VERSIONS:
            listener = asyncio.create_task(listen_for_changes(connection, self._note))
        try:
            while not (connection.is_down or self._ended):
                await self._wake.wait()
                self._wake.clear()
                if connection.in_doubt and not connection.is_down:
                    await self._ask(connection)
                if connection.tools_changed and not connection.is_down:
                    await self._sleep(connection, _DEBOUNCE)
                    if why := await self.list(connection):
                        self._note(f"the tools could not be listed again: {why}")
                    await self._sleep(connection, _MIN_BETWEEN_LISTS)
        finally:
            if listener is not None:
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)

    async def _sleep(self, connection: McpConnection, seconds: float) -> None:
        """Sleeps, unless the connection ends or is to end; what woke it is looked at again."""
        deadline = asyncio.get_running_loop().time() + seconds
        with anyio.move_on_at(deadline):
            while not (connection.is_down or self._ended):
                await self._wake.wait()
                self._wake.clear()
        self._wake.set()

    async def _ask(self, connection: McpConnection) -> None:
        connection.in_doubt = False
        try:
            await connection.run(connection.client.session.send_ping(), _PING_SECONDS)
        except (MCPError, ValidationError, RuntimeError, TimeoutError, ConnectionLostError):
            connection.end("the server refuses the session")
