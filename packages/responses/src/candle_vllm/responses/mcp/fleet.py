# SPDX-License-Identifier: MIT
"""McpFleet: all MCP servers of a configuration, and their tools in one registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import msgspec

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.mcp.config import MAX_SERVERS
from candle_vllm.responses.mcp.link import LinkTool, McpLink
from candle_vllm.responses.mcp.peer import McpServerError
from candle_vllm.responses.mcp.processes import to_the_end
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.supervisor import LinkState
from candle_vllm.responses.tools.registry import ToolRegistry

logger = logging.getLogger(__name__)


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Status of an MCP server for a page or a log; nothing in it is secret.

    Attributes:
        name, state, error, protocol_version, instructions, notes, reconnects: as in `McpLink`.
        transport: "stdio", "http", "sse" or "in process".
        server: name and version that the server reports, or None.
        tools: names by which a model calls the tools of the last known list.
        log: last lines of the server's log.
    """

    name: str
    transport: str
    state: LinkState
    error: str | None
    server: str | None
    protocol_version: str | None
    instructions: str | None
    tools: tuple[str, ...]
    notes: tuple[str, ...]
    reconnects: int
    log: tuple[str, ...]


class McpFleet:
    """The servers of a configuration; as a context manager, it starts and ends them.

    Args:
        configs: at most 64 servers with different names; disabled ones have a status but are not started.
        registry: receives each server's tools, and its new list whenever its tools change.
        strict: whether a server that cannot be reached at the start is an error; otherwise it is tried again in the
            background, and its tools are added once it is connected.

    Raises ConfigError for too many servers, or two with one name.
    """

    def __init__(
        self, configs: Iterable[McpServerConfig], registry: ToolRegistry | None = None, *, strict: bool = False
    ) -> None:
        configs = tuple(configs)
        if len(configs) > MAX_SERVERS:
            raise ConfigError(f"{len(configs)} MCP servers; at most {MAX_SERVERS} are possible", "mcpServers")
        names = [config.name for config in configs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"two MCP servers are named {min(twice)!r}: give each a name of its own", "mcpServers")
        self.registry = registry if registry is not None else ToolRegistry()
        self._strict = strict
        self._starting = False
        self._links = {config.name: McpLink(config, on_tools_changed=self._register) for config in configs}

    @property
    def links(self) -> dict[str, McpLink]:
        return dict(self._links)

    async def start(self) -> None:
        """Start all servers concurrently, and wait until each is ready or has failed once.

        With `strict`, McpServerError is raised if a server cannot be reached, after all servers have been ended.
        """
        self._starting = True
        starts = [asyncio.create_task(self._begin(link)) for link in self._links.values()]
        try:
            outcomes = await asyncio.gather(*starts, return_exceptions=True)
        except asyncio.CancelledError:
            await to_the_end(self._end(starts))
            raise
        finally:
            self._starting = False
        for link in self._links.values():
            self._register(link)
        for failure in outcomes:
            if failure is not None:
                await self.aclose()
                raise failure

    async def _begin(self, link: McpLink) -> None:
        try:
            await link.start(keep_trying=not self._strict)
        except McpServerError as failure:
            if self._strict:
                raise
            logger.warning("%s; it is tried again in the background", failure)

    async def aclose(self) -> None:
        """End all servers concurrently, and remove their tools from the registry. Further calls have no effect."""
        await to_the_end(self._end(()))

    async def __aenter__(self) -> McpFleet:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def status(self) -> list[LinkStatus]:
        """Return the current status of each server, in the order of the configuration."""
        return [self._status(link) for link in self._links.values()]

    async def _end(self, starts: Iterable[asyncio.Task[None]]) -> None:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(link.aclose() for link in self._links.values()))
        for name in self._links:
            self.registry.replace(name, ())

    def _register(self, link: McpLink) -> None:
        """Put a server's tools into the registry; no effect during `start`, which registers all in order at its end.

        The tools are part of the prompt, whose prefix is cached, so their order must not depend on timing.
        """
        if not self._starting:
            self.registry.replace(link.name, [LinkTool(link, tool) for tool in link.tools.values()])

    def _status(self, link: McpLink) -> LinkStatus:
        info = link.server_info
        definitions = self.registry.definitions()
        return LinkStatus(
            name=link.name,
            transport=link.transport,
            state=link.state,
            error=link.error,
            server=f"{info.name} {info.version}".strip()[:200] if info else None,
            protocol_version=link.protocol_version,
            instructions=link.instructions,
            tools=tuple(definition.name for definition in definitions if definition.server == link.name),
            notes=link.notes,
            reconnects=link.reconnects,
            log=tuple(link.log_lines()),
        )
