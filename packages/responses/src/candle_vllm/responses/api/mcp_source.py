"""Where the MCP servers of a request come from: the operator's own, and URLs that the operator allows."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.tools.names import matches
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Tool


class OpenServer(NamedTuple):
    """An MCP server as a request sees it; `error` says why there are no tools."""

    label: str
    tools: Sequence[Tool] = ()
    error: str | None = None


class McpSource(Protocol):
    """Gives the tools of servers that requests name."""

    def check(self, tool: McpTool, path: str) -> None:
        """Raises `RequestError` where there is no such server, or it must not be dialled; `path` is the tool's."""
        ...

    def open(self, tool: McpTool) -> AbstractAsyncContextManager[OpenServer]:
        """The server while a response is made; one that cannot be reached has an error instead of tools."""
        ...


class NoServers:
    """There are none."""

    def check(self, tool: McpTool, path: str) -> None:  # noqa: ARG002
        """Refuses every tool."""
        field = f"{path}.server_label"
        raise UnsupportedParameterError(f"{field} is not supported: this server has no MCP servers", field)

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncGenerator[OpenServer]:
        """Never reached."""
        yield OpenServer(tool.server_label, error="there are no MCP servers")


class McpServers:
    """The servers of a registry, by their labels, and URLs that fit a pattern.

    Args:
        registry: of the operator's servers, as an `McpFleet` fills it.
        errors: why an operator's server has no tools now, by its label; None where it is not configured.
        allowed_urls: patterns with "*" of the URLs that requests may name. Plain http is for loopback alone.
        connect_timeout: seconds for a URL.
    """

    def __init__(
        self,
        registry: ToolRegistry,
        errors: Mapping[str, str | None] | None = None,
        *,
        allowed_urls: Sequence[str] = (),
        connect_timeout: float = 30.0,
    ) -> None:
        self._registry = registry
        self._errors = errors if errors is not None else {}
        self._allowed_urls = tuple(allowed_urls)
        self._connect_timeout = connect_timeout

    def check(self, tool: McpTool, path: str) -> None:
        """Raises `RequestError` that names the label or the URL."""
        if tool.server_url is not None:
            _check_url(tool.server_url, self._allowed_urls, f"{path}.server_url")
        elif not self._tools(tool.server_label) and tool.server_label not in self._errors:
            field = f"{path}.server_label"
            raise InvalidParameterError(
                f"{field} must be the name of one of this server's MCP servers where there is no server_url, not "
                f"{tool.server_label!r:.80}",
                field,
            )

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncGenerator[OpenServer]:
        """The server's tools now, or a connection of its own to a URL."""
        label = tool.server_label
        if tool.server_url is None:
            tools = self._tools(label)
            error = None if tools else self._errors.get(label) or "the server has no tools now"
            yield OpenServer(label, tools, error)
            return
        from candle_vllm.responses.mcp.config import McpServerConfig  # the `mcp` package is slow to import
        from candle_vllm.responses.mcp.link import McpLink
        from candle_vllm.responses.mcp.mcp_tool import McpTool as LinkTool

        config = McpServerConfig(
            name=label,
            url=tool.server_url,
            headers=tool.headers or {},
            auth=tool.authorization,
            connect_timeout=self._connect_timeout,
        )
        link = McpLink(config)
        try:
            error = None
            try:
                await link.start()
            except CandleVllmError as failure:
                error = str(failure)
            tools = [] if error else [LinkTool(link, one) for one in link.tools.values()]
            yield OpenServer(label, tools, error)
        finally:
            await link.aclose()

    def _tools(self, label: str) -> list[Tool]:
        return [tool for tool in self._registry if tool.definition.server == label]


def _check_url(url: str, patterns: Sequence[str], field: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is none raises
    except ValueError:
        host, parts = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise InvalidParameterError(f"{field} must be an https URL without a user name", field)
    if parts.scheme == "http" and not _is_loopback(host):
        raise InvalidParameterError(f"{field} must be an https URL: what is sent to it may be secret", field)
    if not matches(patterns, url):
        raise UnsupportedParameterError(
            f"{field} is not supported: this server dials no URL that a request names, unless the operator allows it "
            "with --mcp-allow-urls; name one of its own servers by server_label alone",
            field,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
