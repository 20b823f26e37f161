"""The tools that a server lists: all pages, within limits, those that the configuration lets in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, NamedTuple

from candle_vllm.responses.mcp.connection import McpConnection

if TYPE_CHECKING:
    from mcp_types import Tool

    from candle_vllm.responses.mcp.server_config import McpServerConfig

MAX_PAGES = 100
MAX_TOOLS = 1000
MAX_BYTES = 4 * 1024 * 1024  # of all definitions together, as JSON


class ToolList(NamedTuple):
    """What a server offers.

    Attributes:
        tools: by name, in the server's order.
        notes: what was left out and why, sentences.
    """

    tools: dict[str, Tool]
    notes: tuple[str, ...]

    def same_as(self, other: ToolList | None) -> bool:
        """Whether both offer the same tools."""
        return other is not None and self.tools == other.tools


async def list_tools(connection: McpConnection, config: McpServerConfig, seconds: float) -> ToolList:
    """Asks for the list, page by page.

    Args:
        seconds: for each page.

    Raises:
        ConnectionLostError, TimeoutError, MCPError, ValidationError: a page could not be had.
    """
    tools: dict[str, Tool] = {}
    notes: list[str] = []
    size = 0
    async for tool in _all_tools(connection, seconds, notes):
        if not config.allows(tool.name):
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
            notes.append("its list of tools goes in a circle; what came until then counts")
            return
        seen.add(cursor)
    notes.append(f"its list of tools has more than {MAX_PAGES} pages; the rest is left out")
