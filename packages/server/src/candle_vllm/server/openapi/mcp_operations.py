"""The table of routes of MCP servers and their tools. Outside the ten steps."""

from __future__ import annotations

from collections.abc import Mapping

from candle_vllm.server.mcp.wire import McpCallRequest, McpCallResult, McpServerInfo, McpToolInfo
from candle_vllm.server.openapi.operation import BODY_ERRORS, Key, Operation

MCP_OPERATIONS: Mapping[Key, Operation] = {
    ("GET", "/v1/mcp/servers"): Operation(
        id="list_mcp_servers",
        tag="mcp",
        summary="The MCP servers, and how they are",
        answers={200: (McpServerInfo,)},
        errors=(404,),
        listed=True,
    ),
    ("GET", "/v1/mcp/tools"): Operation(
        id="list_mcp_tools",
        tag="mcp",
        summary="The tools of all MCP servers",
        answers={200: (McpToolInfo,)},
        errors=(404,),
        listed=True,
    ),
    ("POST", "/v1/mcp/call"): Operation(
        id="call_mcp_tool",
        tag="mcp",
        summary="Call a tool once; needs an API key and somebody's approval",
        body=(McpCallRequest,),
        example={"name": "time__get_current_time", "arguments": {"timezone": "UTC"}, "approved": True},
        answers={200: (McpCallResult,)},
        errors=(*BODY_ERRORS, 403, 404, 429, 504),
    ),
}
