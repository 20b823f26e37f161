# SPDX-License-Identifier: MIT
"""Conversations of a model that calls tools, MCP clients, and the Responses API.

Names are imported on first use, so that only a program that uses MCP pays for its import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from candle_vllm.responses.api.responder import Responder, ResponderOptions
    from candle_vllm.responses.conversation.chat_model import InProcessModel
    from candle_vllm.responses.conversation.events import ConversationFinished, Event
    from candle_vllm.responses.conversation.http_model import HttpModel
    from candle_vllm.responses.conversation.loop import ConversationLoop
    from candle_vllm.responses.conversation.options import ConversationOptions, ConversationResult
    from candle_vllm.responses.mcp.config import McpConfig, load_mcp_config
    from candle_vllm.responses.mcp.fleet import McpFleet
    from candle_vllm.responses.mcp.link import McpLink
    from candle_vllm.responses.mcp.peer import McpServerError
    from candle_vllm.responses.mcp.server_config import McpServerConfig
    from candle_vllm.responses.session import ResponsesSession
    from candle_vllm.responses.tools.approval import Approval
    from candle_vllm.responses.tools.python_tool import function_tool
    from candle_vllm.responses.tools.registry import ToolRegistry
    from candle_vllm.responses.tools.tool import (
        ContentPart,
        ToolCall,
        ToolDefinition,
        ToolError,
        ToolOutput,
        ToolResult,
    )

__all__ = [
    "Approval",
    "ContentPart",
    "ConversationFinished",
    "ConversationLoop",
    "ConversationOptions",
    "ConversationResult",
    "Event",
    "HttpModel",
    "InProcessModel",
    "McpConfig",
    "McpFleet",
    "McpLink",
    "McpServerConfig",
    "McpServerError",
    "Responder",
    "ResponderOptions",
    "ResponsesSession",
    "ToolCall",
    "ToolDefinition",
    "ToolError",
    "ToolOutput",
    "ToolRegistry",
    "ToolResult",
    "function_tool",
    "load_mcp_config",
]

_HOMES = {
    "api.responder": ("Responder", "ResponderOptions"),
    "conversation.events": ("ConversationFinished", "Event"),
    "conversation.http_model": ("HttpModel",),
    "conversation.chat_model": ("InProcessModel",),
    "conversation.loop": ("ConversationLoop",),
    "conversation.options": ("ConversationOptions", "ConversationResult"),
    "mcp.config": ("McpConfig", "load_mcp_config"),
    "mcp.peer": ("McpServerError",),
    "mcp.fleet": ("McpFleet",),
    "mcp.link": ("McpLink",),
    "mcp.server_config": ("McpServerConfig",),
    "session": ("ResponsesSession",),
    "tools.approval": ("Approval",),
    "tools.python_tool": ("function_tool",),
    "tools.registry": ("ToolRegistry",),
    "tools.tool": ("ContentPart", "ToolCall", "ToolDefinition", "ToolError", "ToolOutput", "ToolResult"),
}


if not TYPE_CHECKING:  # a type checker would accept every name of a module with `__getattr__`

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{home}"), name)
        from candle_vllm.core.arguments import missing_name

        raise missing_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return [*__all__]
