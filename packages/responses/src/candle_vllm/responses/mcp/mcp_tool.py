"""A tool of an MCP server, for the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from candle_vllm.responses.tools.names import tool_name
from candle_vllm.responses.tools.tool import Report, ToolDefinition, ToolOutput

if TYPE_CHECKING:
    import mcp_types as types

    from candle_vllm.responses.mcp.link import McpLink


class McpTool:
    """One of a server's tools.

    Args:
        link: to the server.
        tool: as the server lists it.
    """

    def __init__(self, link: McpLink, tool: types.Tool) -> None:
        self._link = link
        self.definition = definition_of(link.name, tool)
        self.timeout: float | None = link.config.timeout
        """Seconds for one call, by the server's configuration."""

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        """Calls it once; see `McpLink.call`."""
        return await self._link.call(self.definition.original_name, arguments, report=report)


def definition_of(server: str, tool: types.Tool) -> ToolDefinition:
    """What a model sees of a server's tool."""
    schema = dict(tool.input_schema)
    schema.setdefault("type", "object")
    return ToolDefinition(
        name=tool_name(server, tool.name),
        description=tool.description or tool.title or "",
        parameters=schema,
        server=server,
        original_name=tool.name,
        read_only=bool(tool.annotations and tool.annotations.read_only_hint),
    )
