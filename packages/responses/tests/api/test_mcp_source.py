"""MCP servers of requests: the operator's own by their labels, and URLs that the operator allows."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.core.errors import RequestError
from candle_vllm.responses.api.mcp_source import McpServers, NoServers
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
    servers = McpServers(registry, {"s": None, "down": "nobody answers"})
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
    with pytest.raises(RequestError):
        NoServers().check(tool(), "tools.0")


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
        ("http://[::1]:8000/mcp", "*"),
    ],
)
def test_urls_that_are_allowed(url: str, pattern: str) -> None:
    McpServers(ToolRegistry(), allowed_urls=(pattern,)).check(tool(server_url=url), "tools.0")


async def test_a_url_where_nobody_answers() -> None:
    servers = McpServers(ToolRegistry(), allowed_urls=("*",), connect_timeout=2)
    asked = tool(server_url="http://127.0.0.1:9/mcp?token=hush", authorization="hush")
    async with servers.open(asked) as opened:
        assert opened.error
        assert not opened.tools
        assert "hush" not in opened.error
