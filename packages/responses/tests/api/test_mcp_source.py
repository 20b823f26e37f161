# SPDX-License-Identifier: MIT
"""MCP servers of requests: the operator's own by their labels, and URLs that the operator allows."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from candle_vllm.core.errors import ConfigError, RequestError
from candle_vllm.responses.api.mcp_source import McpServers
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolDefinition


class Fake:
    definition = ToolDefinition(name="s__t", server="s", original_name="t")

    async def run(self, arguments: Any, report: Any) -> Any:
        raise AssertionError


def tool(**fields: Any) -> McpTool:
    return McpTool(type="mcp", server_label="s", **fields)


async def test_servers_of_the_operator() -> None:
    registry = ToolRegistry()
    registry.replace("s", [Fake()])
    servers = McpServers(registry, lambda: {"s": None, "down": "nobody answers"})
    servers.check(tool(), "tools.0")
    async with servers.open(tool()) as opened:
        assert [one.definition.name for one in opened.tools] == ["s__t"]
    down = McpTool(type="mcp", server_label="down")
    servers.check(down, "tools.0")
    async with servers.open(down) as opened:
        assert (list(opened.tools), opened.error) == ([], "nobody answers")
    with pytest.raises(RequestError) as refusal:
        servers.check(McpTool(type="mcp", server_label="other"), "tools.1")
    assert refusal.value.param == "tools.1.server_label"


@pytest.mark.parametrize(
    ("url", "patterns"),
    [
        ("https://example.com/mcp", ()),
        ("https://example.com.evil.org/mcp", ("https://example.com/*",)),
        ("http://example.com/mcp", ("*",)),
        ("http://10.0.0.1/mcp", ("*",)),
        ("http://localhost.evil.org/", ("*",)),
        ("https://user:pass@example.com/", ("*",)),
        ("https:///mcp", ("*",)),
        ("https://[::1/mcp", ("*",)),
        ("https://example.com:port/", ("*",)),
        ("file:///etc/passwd", ("*",)),
        ("stdio://x", ("*",)),
        ("example.com", ("*",)),
        ("https://evil.org/.example.com/mcp", ("https://*.example.com/*",)),
        ("https://evil.org?.example.com/mcp", ("https://*.example.com/*",)),
        ("https://evil.org#.example.com/mcp", ("https://*.example.com/*",)),
        ("https://evil.org\\.example.com/mcp", ("https://*.example.com/*",)),
        ("https://example.com:8443/mcp", ("https://example.com/*",)),
        ("https://example.com/open/../mcp", ("https://example.com/open/*",)),
        ("https://example.com/open/%2e%2e/mcp", ("https://example.com/open/*",)),
        ("https://example.com/open/..;x/mcp", ("https://example.com/open/*",)),
        ("https://example.com/open/..%5cmcp", ("https://example.com/open/*",)),
        ("https://example.com/mcp2", ("https://example.com/mcp",)),
        ("https://example.com.:443/mcp", ("https://example.com/*",)),
        ("https://@example.com/mcp", ("*",)),
        ("https://example.com/mcp#x", ("*",)),
        ("https://example.com/a b", ("*",)),
        ("https://ex\u00e4mple.com/", ("*",)),
        ("https://127.1/mcp", ("*",)),
        ("https://0x7f000001/mcp", ("*",)),
        ("https://2130706433/mcp", ("*",)),
        ("http://127.0.0.1:8000/mcp", ("*",)),
        ("https://127.0.0.1/mcp", ("*",)),
        ("https://localhost/mcp", ("https://*/*",)),
        ("http://[::1]:8001/mcp", ("http://[::1]:8000/*",)),
        ("https://[fe80::1%25eth0]/mcp", ("*",)),
        ("https://example.com:0443x/mcp", ("*",)),
    ],
)
def test_urls_that_are_not_dialled(url: str, patterns: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as refusal:
        McpServers(ToolRegistry(), allowed_urls=patterns).check(tool(server_url=url), "tools.0")
    assert refusal.value.param == "tools.0.server_url"
    assert "pass@" not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("https://example.com/mcp", "https://example.com/*"),
        ("https://example.com/mcp", "https://example.com/mcp"),
        ("http://127.0.0.1:8000/mcp", "http://127.0.0.1:8000/*"),
        ("http://localhost:8000/mcp", "http://localhost:8000/*"),
        ("http://[::1]:8000/mcp", "http://[0:0::1]:*/*"),
        ("https://8.8.8.8/mcp", "*"),
        ("https://example.com:443/mcp", "https://example.com/*"),
        ("HTTPS://Example.com:8443/a", "https://example.com:8443/*"),
        ("https://a.example.com/mcp?x=1", "https://*.example.com/*"),
        ("https://EXAMPLE.com", "https://example.com/"),
        ("https://example.com/", "https://example.com"),
    ],
)
def test_urls_that_are_allowed(url: str, pattern: str) -> None:
    McpServers(ToolRegistry(), allowed_urls=(pattern,)).check(tool(server_url=url), "tools.0")


@pytest.mark.parametrize(
    "pattern", ["", "example.com/*", "http*://example.com/", "https://", "ftp://a/*", "https://a b/"]
)
def test_patterns_that_nothing_could_fit(pattern: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        McpServers(ToolRegistry(), allowed_urls=("https://example.com/*", pattern))
    assert refusal.value.setting == "mcp_allow_urls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"headers": {"Host": "other.org"}}, "headers"),
        ({"headers": {"Mcp-Session-Id": "x"}}, "headers"),
        ({"headers": {"Proxy-Authorization": "x"}}, "headers"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "headers"),
        ({"headers": {"a": "hush\r\nHost: other.org"}}, "headers"),
        ({"headers": {"a\r\nb": "hush"}}, "headers"),
        ({"headers": {"a": "1", "A": "hush"}}, "headers"),
        ({"headers": {"a": "hush\u00e4"}}, "headers"),
        ({"authorization": "hush\nX: y"}, "authorization"),
        ({"authorization": "hush", "headers": {"Authorization": "hush"}}, "authorization"),
    ],
)
def test_headers_that_are_not_sent(fields: dict[str, Any], param: str) -> None:
    servers = McpServers(ToolRegistry(), allowed_urls=("https://example.com/*",))
    with pytest.raises(RequestError) as refusal:
        servers.check(tool(server_url="https://example.com/mcp", **fields), "tools.3")
    assert refusal.value.param == f"tools.3.{param}"
    assert "hush" not in str(refusal.value)


async def test_a_name_that_leads_into_this_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator has allowed names and not addresses: one that is private is not connected to."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", 443))])
    servers = McpServers(ToolRegistry(), allowed_urls=("https://*.example.com/*",), connect_timeout=60)
    async with servers.open(tool(server_url="https://inside.example.com/mcp")) as opened:
        assert "is not public" in (opened.error or "")


async def test_a_url_where_nobody_answers() -> None:
    servers = McpServers(ToolRegistry(), allowed_urls=("http://127.0.0.1:9/*",), connect_timeout=60)
    asked = tool(server_url="http://127.0.0.1:9/mcp?token=hush", authorization="hush")
    async with servers.open(asked) as opened:
        assert opened.error
        assert not opened.tools
        assert "hush" not in opened.error
