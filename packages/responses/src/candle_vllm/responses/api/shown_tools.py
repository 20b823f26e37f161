"""The tools of a request as its response repeats them: without those that do not run here, and without secrets."""

from __future__ import annotations

from typing import Any

from candle_vllm.responses.protocol.request import PromptFields
from candle_vllm.responses.protocol.tools import CustomTool, FunctionTool, HostedTool, McpTool, NamespaceTool


def shown_tools(request: PromptFields) -> list[dict[str, Any]]:
    """In the request's order."""
    return [_shown_any(tool) for tool in request.tools or () if not isinstance(tool, HostedTool)]


def _shown_any(tool: FunctionTool | CustomTool | NamespaceTool | McpTool) -> dict[str, Any]:
    if isinstance(tool, McpTool):
        return _shown_server(tool)
    return _shown_namespace(tool) if isinstance(tool, NamespaceTool) else _shown(tool)


def _shown(tool: FunctionTool | CustomTool) -> dict[str, Any]:
    if isinstance(tool, FunctionTool):
        return {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
    form = {"type": "text"} if tool.format is None else tool.format.model_dump()
    return {"type": "custom", "name": tool.name, "description": tool.description, "format": form}


def _shown_namespace(tool: NamespaceTool) -> dict[str, Any]:
    inner = [_shown(one) for one in tool.tools]
    return {"type": "namespace", "name": tool.name, "description": tool.description or "", "tools": inner}


def _shown_server(tool: McpTool) -> dict[str, Any]:
    shown = tool.model_dump(exclude={"authorization", "headers", "defer_loading"}, exclude_none=True)
    shown["require_approval"] = shown.get("require_approval", "always")
    if tool.server_url is not None:
        shown["server_url"] = tool.server_url.partition("?")[0]
    return shown
