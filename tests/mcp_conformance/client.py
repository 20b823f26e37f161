# SPDX-License-Identifier: MIT
"""The client that the MCP conformance suite judges: `McpLink`, given a server's address as the last argument.

It connects, lists the tools, and calls what the scenario's server waits for.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from candle_vllm.responses.mcp.link import McpLink, definition_of
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient
from candle_vllm.responses.tools.tool import ToolError


def configuration(url: str, context: dict[str, Any]) -> McpServerConfig:
    """The server; with the credentials of an OAuth client where the scenario has them."""
    auth = None
    if "client_secret" in context:
        auth = OAuthClient(client_id=context["client_id"], client_secret=context["client_secret"])
    return McpServerConfig(name="conformance", url=url, auth=auth, timeout=20.0, connect_timeout=15.0)


def arguments_for(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments that fit a tool's schema: a value for everything that is required."""
    values: dict[str, Any] = {"string": "text", "number": 2, "integer": 2, "boolean": True, "array": [], "object": {}}
    required = schema.get("required", ())
    return {name: values.get(schema["properties"][name].get("type"), "text") for name in required}


def calls(link: McpLink, context: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The calls that the scenario asks for by name, or one of each tool."""
    if "toolCalls" in context:
        return [(call["name"], call["arguments"]) for call in context["toolCalls"]]
    if "json_schema_echo" in link.tools:  # wants to see what a model would see of the other tool
        seen = definition_of(link.name, link.tools["json_schema_2020_12_tool"]).parameters
        return [("json_schema_echo", {"schema": dict(seen)})]
    return [(name, arguments_for(tool.input_schema)) for name, tool in link.tools.items()]


async def main() -> None:
    """Runs one scenario; what a tool or its server says is no failure of the client."""
    context = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT", "{}"))
    async with McpLink(configuration(sys.argv[-1], context)) as link:
        print("tools:", *link.tools)
        for name, arguments in calls(link, context):
            try:
                output = await link.call(name, arguments)
                print(f"{name}{arguments}: {str(output)[:500]}")
            except ToolError as error:
                print(f"{name}{arguments}: {error}")


if __name__ == "__main__":
    asyncio.run(main())
