# SPDX-License-Identifier: MIT
"""The MCP servers that requests to `/v1/responses` may name (step 2 of a request's life)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.api.mcp_source import McpServers, McpSource, OpenServer
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolDefinition
from candle_vllm.server.settings.table import ToolOptions

if TYPE_CHECKING:
    from candle_vllm.server.mcp.service import McpService


def response_servers(service: McpService | None, settings: ToolOptions, *, keys: bool) -> McpSource | None:
    """Return the operator's servers and allowed URLs, None without either; `keys` as in `ConfiguredServers`."""
    urls = settings.mcp_allow_urls
    if service is None:
        return McpServers(ToolRegistry(), allowed_urls=urls) if urls else None
    servers = McpServers(service.registry, service.errors, allowed_urls=urls)
    return ConfiguredServers(servers, keys=keys, approved=service.auto_approves if settings.mcp_execute else None)


class ConfiguredServers:
    """Gives clients access to the operator's servers.

    With API keys, a client may use all tools, because its request sets which calls need approval. Without keys, it may
    use only the tools that mcp.json approves, and only with `--mcp-execute`.

    Args:
        servers: the operator's servers, and allowed URLs.
        keys: whether clients need an API key.
        approved: returns whether mcp.json approves a tool; None without `--mcp-execute`.
    """

    def __init__(self, servers: McpServers, *, keys: bool, approved: Callable[[ToolDefinition], bool] | None) -> None:
        self._servers = servers
        self._keys = keys
        self._approved = approved

    def check(self, tool: McpTool, path: str) -> None:
        """See `McpSource.check`."""
        if tool.server_url is None and not self._keys and self._approved is None:
            field = f"{path}.server_label"
            raise UnsupportedParameterError(
                f"{field} is not supported: this server runs tools of its MCP servers for clients with a key "
                "(--api-key), or those that mcp.json approves (--mcp-execute)",
                field,
            )
        self._servers.check(tool, path)

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncGenerator[OpenServer]:
        """See `McpSource.open`."""
        async with self._servers.open(tool) as server:
            yield self._approved_part(server) if tool.server_url is None and not self._keys else server

    def _approved_part(self, server: OpenServer) -> OpenServer:
        approved = self._approved
        tools = [tool for tool in server.tools if approved is not None and approved(tool.definition)]
        if server.tools and not tools:
            return server._replace(tools=(), error="mcp.json approves none of its tools, and there is no API key")
        return server._replace(tools=tools)
