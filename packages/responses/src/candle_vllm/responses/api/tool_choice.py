"""The choice among the tools of a request, in the words of a chat request."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.protocol.tools import (
    AllowedToolsChoice,
    McpToolChoice,
    NamedToolChoice,
    ToolChoice,
    ToolReference,
)

Kind = Literal["function", "custom", "mcp"]


class PlannedTool(NamedTuple):
    """A tool that the model may call.

    Attributes:
        kind: who runs it and in which form.
        name: its own.
        path: where the request has it.
        namespace: of a function or a custom tool.
        server: label of an MCP server.
        parameters: path of its schema, for errors.
    """

    kind: Kind
    name: str
    path: str
    namespace: str | None = None
    server: str | None = None


def chat_choice(tools: Mapping[str, PlannedTool], choice: ToolChoice | None) -> Any:
    """The `tool_choice` of the chat request; None where it has none.

    Args:
        tools: those of the request, by the names that the model calls.
        choice: of the request.

    Raises:
        InvalidParameterError: it names none of them, or there are none.
    """
    if choice is None or isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidParameterError("tool_choice needs tools: there is nothing to choose from", "tool_choice")
        return choice if tools else None
    if isinstance(choice, AllowedToolsChoice):
        if choice.mode == "none":
            return "none"
        names = [name for i, one in enumerate(choice.tools) for name in _named(tools, one, f"tool_choice.tools.{i}")]
        return _allowed_tools(names, choice.mode)
    names = _named(tools, choice, "tool_choice")
    if len(names) == 1:
        return {"type": "function", "function": {"name": names[0]}}
    return _allowed_tools(names, "required")


def _allowed_tools(names: Sequence[str], mode: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in dict.fromkeys(names)]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def _named(tools: Mapping[str, PlannedTool], reference: ToolReference, path: str) -> list[str]:
    """The names that the model calls for what a choice names."""
    if isinstance(reference, McpToolChoice):
        field, wanted = f"{path}.server_label", reference.server_label
        found = [name for name, tool in tools.items() if tool.server == wanted]
        if found and reference.name is not None:
            field, wanted = f"{path}.name", reference.name
            found = [name for name in found if tools[name].name == wanted]
        known = [tool.server or "" for tool in tools.values()] if field.endswith("label") else []
    else:
        assert isinstance(reference, NamedToolChoice)
        field, wanted = f"{path}.name", reference.name
        found = [name for name, tool in tools.items() if _is_named(name, tool, reference)]
        known = [tool.name for tool in tools.values()]
    if not found:
        near = difflib.get_close_matches(wanted, known, n=1)
        advice = f"; did you mean {near[0]!r:.80}?" if near else ""
        raise InvalidParameterError(f"{field} must name one of the request's tools, not {wanted!r:.80}{advice}", field)
    if len(found) > 1 and not isinstance(reference, McpToolChoice):
        raise UnsupportedParameterError(
            f"{field} names tools of several namespaces: {', '.join(found)[:200]}; use one of these names", field
        )
    return found


def _is_named(name: str, tool: PlannedTool, reference: NamedToolChoice) -> bool:
    if tool.kind != reference.type:
        return False
    if reference.namespace is not None:
        return (tool.namespace, tool.name) == (reference.namespace, reference.name)
    return reference.name in (name, tool.name)
