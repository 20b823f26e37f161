"""Where the MCP servers of a request come from: the operator's own, and URLs that the operator allows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from candle_vllm.core.errors import CandleVllmError, ConfigError, InvalidParameterError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.api.server_urls import ServerUrls
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Tool

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.server_config import McpServerConfig

# What the connection says by itself; in other words it could be led elsewhere, or be understood in two ways.
_OWN_HEADERS = frozenset({
    "accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
    "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
_OWN_PREFIXES = ("mcp-", "proxy-")
_FIELDS = {"headers": "headers", "auth": "authorization", "url": "server_url"}  # of a configuration -> of a tool


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
        allowed_urls: patterns of the URLs that requests may name, see `ServerUrls`. Plain http is for loopback alone.
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
        self._urls = ServerUrls(allowed_urls)
        self._connect_timeout = connect_timeout

    def check(self, tool: McpTool, path: str) -> None:
        """Raises `RequestError` that names the label or the URL."""
        if tool.server_url is not None:
            self._urls.check(tool.server_url, f"{path}.server_url")
            _check_headers(tool.headers or {}, f"{path}.headers")
            with _blaming(path):
                self._config(tool)
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
        from candle_vllm.responses.mcp.link import LinkTool, McpLink  # the `mcp` package is slow to import

        named = self._urls.check(tool.server_url, "server_url")
        link = McpLink(self._config(tool), public_only=not named)
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

    def _config(self, tool: McpTool) -> McpServerConfig:
        from candle_vllm.responses.mcp.server_config import McpServerConfig

        return McpServerConfig(
            name=tool.server_label,
            url=tool.server_url,
            headers=tool.headers or {},
            auth=tool.authorization,
            connect_timeout=self._connect_timeout,
        )

    def _tools(self, label: str) -> list[Tool]:
        return [tool for tool in self._registry if tool.definition.server == label]


def _check_headers(headers: Mapping[str, str], path: str) -> None:
    for name in headers:
        if name.lower() in _OWN_HEADERS or name.lower().startswith(_OWN_PREFIXES):
            raise InvalidParameterError(f"{path} must not have {name!r:.60}: the connection says that itself", path)


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    """A setting of a server that cannot be is a field of the request's tool."""
    try:
        yield
    except ConfigError as error:
        field = f"{path}.{_FIELDS.get((error.setting or '').partition('.')[0], 'server_label')}"
        raise InvalidParameterError(f"{field} cannot be used. {error}", field) from None
