# SPDX-License-Identifier: MIT
"""Sources of the MCP servers that requests name: the operator's servers, and URLs that the operator allows."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from candle_vllm.core.errors import CandleVllmError, ConfigError, InvalidParameterError
from candle_vllm.core.targets import PORTS, canonical, is_host, is_loopback
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.tools.names import matches
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Tool

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.server_config import McpServerConfig

ANY = "*"
SETTING = "mcp_allow_urls"


class _Parts(NamedTuple):
    scheme: str
    host: str  # in lower case, an IPv6 address without brackets
    port: str
    path: str  # with the query


class ServerUrls:
    """The operator's URL patterns: `https://host[:port]/path`, where "*" stands for any characters of the host or the
    path, or for any port; "*" alone allows every public https URL.

    The default port is the scheme's. If the host has a "*", the addresses of a matching host must be public. An invalid
    pattern is a ConfigError.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._any = ANY in patterns
        self._patterns: list[_Parts] = []
        for text in patterns:
            if text == ANY:
                continue
            if (pattern := _parts(text, pattern=True)) is None:
                raise ConfigError(
                    f"{SETTING} must be URLs like https://example.com/mcp or https://*.example.com/*, or * for every "
                    f"public one, not {text!r:.100}",
                    SETTING,
                )
            self._patterns.append(pattern)

    def check(self, url: str, field: str) -> bool:
        """Return whether a pattern names the host without "*"; if not, the caller connects to public addresses only.

        Raises:
            InvalidParameterError: the URL is invalid, or its scheme is http and its host is not loopback.
            UnsupportedParameterError: no pattern allows it; a "*" in the host, or alone, allows no loopback host.
        """
        parts = _parts(url)
        if parts is None:
            raise InvalidParameterError(
                f"{field} must be an https URL in ASCII without a user name, spaces, a fragment, or .. in its path",
                field,
            )
        if parts.scheme == "http" and not is_loopback(parts.host):
            raise InvalidParameterError(f"{field} must be an https URL: what is sent to it may be secret", field)
        fitting = [pattern for pattern in self._patterns if _fits(pattern, parts)]
        named = any(ANY not in pattern.host for pattern in fitting)
        if named or ((fitting or self._any) and not is_loopback(parts.host)):
            return named
        raise UnsupportedParameterError(
            f"{field} is not supported: the operator has not allowed the URL with --mcp-allow-urls; name one of this "
            "server's MCP servers by server_label alone",
            field,
        )


def _parts(url: str, *, pattern: bool = False) -> _Parts | None:
    """Return the normalized parts of a URL; None for an invalid URL, or one that parsers read differently."""
    if not url.isascii() or not url.isprintable() or any(char in url for char in ' \\"<>^`{|}#'):
        return None
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.netloc.rpartition("]")[2].partition(":")[2]
        if not (pattern and port == ANY):
            port = str(parts.port or PORTS[parts.scheme])  # raises for an invalid port
    except (ValueError, KeyError):
        return None
    if parts.scheme not in PORTS or "@" in parts.netloc or not is_host(host.replace(ANY, "x") if pattern else host):
        return None
    if {".", ".."} & {each.partition(";")[0] for each in re.split(r"[/\\]", unquote(parts.path))}:
        return None
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Parts(parts.scheme, canonical(host), port, path)


def _fits(pattern: _Parts, given: _Parts) -> bool:
    same = pattern.scheme == given.scheme and pattern.port in (given.port, ANY)
    return same and matches([pattern.host], given.host) and matches([pattern.path], given.path)


# Headers that the connection sets itself; a client that sets them could redirect the request or make it ambiguous.
_OWN_HEADERS = frozenset({
    "accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
    "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
_OWN_PREFIXES = ("mcp-", "proxy-")
_FIELDS = {"headers": "headers", "auth": "authorization", "url": "server_url"}  # key of a server's settings -> field


class OpenServer(NamedTuple):
    """A request's MCP server; `error`: why it has no tools; `unapproved`: tools that mcp.json does not approve."""

    label: str
    tools: Sequence[Tool] = ()
    error: str | None = None
    unapproved: Sequence[str] = ()


class McpSource(Protocol):
    """Provides the tools of the MCP servers that requests name."""

    def check(self, tool: McpTool, path: str) -> None:
        """Raise `RequestError` if the server does not exist or must not be used; `path` is the tool's path."""

    def open(self, tool: McpTool) -> AbstractAsyncContextManager[OpenServer]:
        """Open the server for the time of a response; an unreachable server has an error instead of tools."""


class McpServers:
    """The MCP servers of a registry, by their labels, and URLs that match a pattern.

    Args:
        registry: registry of the operator's servers, as an `McpFleet` fills it.
        errors: returns by label the reason why an operator's server has no tools now; None for a ready server.
        allowed_urls: patterns of `ServerUrls` for the URLs that requests may name.
        connect_timeout: timeout of a connection to a URL in seconds.
    """

    def __init__(
        self,
        registry: ToolRegistry,
        errors: Callable[[], Mapping[str, str | None]] = dict,
        *,
        allowed_urls: Sequence[str] = (),
        connect_timeout: float = 30.0,
    ) -> None:
        self._registry = registry
        self._errors = errors
        self._urls = ServerUrls(allowed_urls)
        self._connect_timeout = connect_timeout

    def check(self, tool: McpTool, path: str) -> None:
        if tool.server_url is not None:
            self._urls.check(tool.server_url, f"{path}.server_url")
            for name in tool.headers or ():
                if name.lower() in _OWN_HEADERS or name.lower().startswith(_OWN_PREFIXES):
                    field = f"{path}.headers"
                    raise InvalidParameterError(f"{field} must not have {name!r:.60}: the connection sets it", field)
            with _blaming(path):
                self._config(tool)
        elif not self._tools(tool.server_label) and tool.server_label not in self._errors():
            field = f"{path}.server_label"
            raise InvalidParameterError(
                f"{field} must be the name of one of this server's MCP servers where there is no server_url, not "
                f"{tool.server_label!r:.80}",
                field,
            )

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncGenerator[OpenServer]:
        """Yield an operator's server with its present tools, or a server at a URL, which is then disconnected."""
        label = tool.server_label
        if tool.server_url is None:
            tools = self._tools(label)
            error = None if tools else self._errors().get(label) or "the server has no tools now"
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
            yield OpenServer(label, [] if error else [LinkTool(link, one) for one in link.tools.values()], error)
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


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Report an invalid server setting as an error of the request's field."""
    try:
        yield
    except ConfigError as error:
        field = f"{path}.{_FIELDS.get((error.setting or '').partition('.')[0], 'server_label')}"
        raise InvalidParameterError(f"{field} cannot be used. {error}", field) from None
