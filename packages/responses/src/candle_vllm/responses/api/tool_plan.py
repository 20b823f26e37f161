# SPDX-License-Identifier: MIT
"""The tools of a request: which the model is shown, which run here, and their names."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.protocol.custom_tools import stand_in
from candle_vllm.openai.protocol.tools import function_of
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.task import Choice, ToolUse
from candle_vllm.responses.api.mcp_source import OpenServer
from candle_vllm.responses.protocol import tools as wire_tools
from candle_vllm.responses.protocol.request import PromptFields
from candle_vllm.responses.tools.approval import Rule
from candle_vllm.responses.tools.names import tool_name
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolDefinition

logger = logging.getLogger(__name__)

Kind = Literal["function", "custom", "mcp"]


class PlannedTool(NamedTuple):
    """A tool that the model may call.

    Attributes:
        kind: type of the tool, which defines its format and who runs it.
        name: name without the prefix of a namespace or an MCP server.
        grammar: Lark grammar of a custom tool's input.
    """

    kind: Kind
    name: str
    path: str
    namespace: str | None = None
    server: str | None = None
    grammar: str | None = None


class ToolPlan(msgspec.Struct, kw_only=True):
    """The tools of one request.

    Attributes:
        by_name: tools by the names that the model uses.
        shown: all tools in the form for chat templates: first the tools that run here, then the client's.
        approval: approval rule of each tool that runs here.
        servers: MCP servers of the request, with their tools or the reason why these cannot be listed.
        offered: by server label, the server's tools that the model is shown.
    """

    by_name: dict[str, PlannedTool] = msgspec.field(default_factory=dict)
    shown: list[dict[str, Any]] = msgspec.field(default_factory=list)
    registry: ToolRegistry = msgspec.field(default_factory=ToolRegistry)
    approval: dict[str, Rule] = msgspec.field(default_factory=dict)
    choice: Choice = Choice()
    servers: Sequence[OpenServer] = ()
    offered: dict[str, list[ToolDefinition]] = msgspec.field(default_factory=dict)

    def mcp_name(self, label: str, name: str) -> str:
        """Return the name by which the model calls an MCP server's tool, even if the request lacks the tool."""
        for chat_name, tool in self.by_name.items():
            if tool.server == label and tool.name == name:
                return chat_name
        return tool_name(label, name)

    def needs_approval(self, name: str) -> bool:
        return self.approval.get(name) == "always"

    def use(self, choice: Choice, *, parallel: bool | None) -> ToolUse:
        """Return the tools and the tool choice of a task."""
        names = ("name", "description", "parameters", "strict")
        functions = [
            msgspec.structs.replace(
                function_of(*map(tool["function"].get, names)), grammar=self.by_name[tool["function"]["name"]].grammar
            )
            for tool in self.shown
        ]
        return choice.among(functions, self.shown, parallel=parallel)


def plan_tools(request: PromptFields, servers: Mapping[int, OpenServer]) -> ToolPlan:
    """Return the tools of a checked request, whose MCP `servers` are given by their index in `tools`.

    Raises InvalidParameterError if two tools have one name, or the tool choice names no tool or an ambiguous one.
    """
    plan = ToolPlan(servers=[servers[place] for place in sorted(servers)])
    for place, tool in enumerate(request.tools or ()):
        path = f"tools.{place}"
        if isinstance(tool, wire_tools.HostedTool):
            logger.info("the tool of type %.80r is left out of a request: it does not run here", tool.type)
            remark([f"{path}: a tool of type {tool.type!r:.80} does not run here and is left out"])
        elif isinstance(tool, wire_tools.McpTool):
            _add_server(plan, tool, servers[place], path)
        elif isinstance(tool, wire_tools.NamespaceTool):
            for number, inner in enumerate(tool.tools):
                _add_client_tool(plan, inner, f"{path}.tools.{number}", tool)
        else:
            _add_client_tool(plan, tool, path, None)
    plan.shown[:0] = [definition.to_openai() for definition in plan.registry.definitions()]
    plan.choice = _choice(plan, request.tool_choice)
    return plan


def _add_client_tool(
    plan: ToolPlan,
    tool: wire_tools.FunctionTool | wire_tools.CustomTool,
    path: str,
    namespace: wire_tools.NamespaceTool | None,
) -> None:
    name = tool.name if namespace is None else tool_name(namespace.name, tool.name)
    if name in plan.by_name:
        field = f"{path}.name"
        raise InvalidParameterError(
            f"{field} must be unique, and {plan.by_name[name].path} is called {tool.name!r} too", field
        )
    grammar = None
    if isinstance(tool, wire_tools.FunctionTool):
        kind: Kind = "function"
        given = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
        function: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    else:
        kind, form = "custom", tool.format if isinstance(tool.format, wire_tools.GrammarFormat) else None
        grammar = form.definition if form and form.syntax == "lark" else None
        function = stand_in(name, tool.description, form.syntax if form else None, form.definition if form else "")
    inside = None if namespace is None else namespace.name
    plan.by_name[name] = PlannedTool(kind, tool.name, path, namespace=inside, grammar=grammar)
    description = [function.get("description")]
    if namespace is not None and namespace.description:
        description.append(f"One of the tools of {namespace.name}: {namespace.description}")
    if text := "\n\n".join(filter(None, description)):
        function["description"] = text
    plan.shown.append({"type": "function", "function": {"name": name, **function}})


# ---- MCP servers -----------------------------------------------------------------------------------------------------


def _add_server(plan: ToolPlan, tool: wire_tools.McpTool, server: OpenServer, path: str) -> None:
    plan.offered[server.label] = offered = []
    allowed = wire_tools.ToolFilter() if tool.allowed_tools is None else tool.allowed_tools
    for one in server.tools:
        definition = one.definition
        name = definition.original_name or definition.name
        if not (name in allowed if isinstance(allowed, list) else _matches(allowed, definition)):
            continue
        if (other := plan.by_name.get(definition.name)) is not None:
            field = f"{path}.allowed_tools"
            raise InvalidParameterError(
                f"{field} allows {name!r:.80}, and the model's name for it, {definition.name!r}, belongs to "
                f"{other.path}: rename that tool, or do not allow this one",
                field,
            )
        try:
            plan.registry.add(one)
        except InvalidParameterError as fault:  # left out, as by `ToolRegistry.replace`
            logger.warning("a tool of the MCP server %.100r is left out: %s", server.label, fault)
            continue
        offered.append(definition)
        plan.by_name[definition.name] = PlannedTool("mcp", name, path, server=tool.server_label)
        plan.approval[definition.name] = _rule(tool, definition)


def _matches(chosen: wire_tools.ToolFilter, definition: ToolDefinition) -> bool:
    if chosen.tool_names is not None and (definition.original_name or definition.name) not in chosen.tool_names:
        return False
    return chosen.read_only is None or chosen.read_only == definition.read_only


def _rule(tool: wire_tools.McpTool, definition: ToolDefinition) -> Rule:
    """Return the approval rule of a tool; a tool that neither filter matches needs an approval."""
    wish = tool.require_approval
    if isinstance(wish, wire_tools.ApprovalFilter):
        if wish.always is not None and _matches(wish.always, definition):
            return "always"
        never = wish.never or wire_tools.ToolFilter()
        given = (never.tool_names, never.read_only) != (None, None)  # an empty filter approves nothing
        return "never" if given and _matches(never, definition) else "always"
    return wish or "always"


# ---- tool choice -----------------------------------------------------------------------------------------------------


def _choice(plan: ToolPlan, choice: wire_tools.ToolChoice | None) -> Choice:
    """Return the choice with the names that the model uses; InvalidParameterError if a tool is not in the request."""
    if choice is None or isinstance(choice, str):
        return Choice(choice or "auto")
    if isinstance(choice, wire_tools.AllowedToolsChoice):
        if choice.mode == "none":
            return Choice("none")
        names = [name for i, one in enumerate(choice.tools) for name in _named(plan, one, f"tool_choice.tools.{i}")]
        return Choice(choice.mode, frozenset(names))
    names = _named(plan, choice, "tool_choice")
    return Choice("required", named=names[0]) if len(names) == 1 else Choice("required", frozenset(names))


def _named(plan: ToolPlan, reference: wire_tools.ToolReference, path: str) -> list[str]:
    """Return the names that the model uses for the tools to which a choice refers."""
    tools, why = plan.by_name, None
    if isinstance(reference, wire_tools.McpToolChoice):
        field, wanted = f"{path}.server_label", reference.server_label
        found = [name for name, tool in tools.items() if tool.server == wanted]
        if found and reference.name is not None:
            field, wanted = f"{path}.name", reference.name
            found = [name for name in found if tools[name].name == wanted]
        for server in plan.servers:
            if server.label == reference.server_label:
                why = "mcp.json does not approve it" if reference.name in server.unapproved else server.error
        known = [tool.server or "" for tool in tools.values()] if field.endswith("label") else []
    else:
        assert isinstance(reference, wire_tools.NamedToolChoice)
        field, wanted = f"{path}.name", reference.name
        same = {name: tool for name, tool in tools.items() if tool.kind == reference.type}
        if (inside := reference.namespace) is not None:
            found = [name for name, tool in same.items() if (tool.namespace, tool.name) == (inside, wanted)]
        else:
            found = [name for name, tool in same.items() if wanted in (name, tool.name)]
        found = [wanted] if wanted in found else found  # the model's own name is never ambiguous
        known = [tool.name for tool in same.values()]
        kinds = [tool.kind for name, tool in tools.items() if name not in same and wanted in (name, tool.name)]
        why = f"its type is {kinds[0]!r}" if kinds else None
    if not found:
        near = difflib.get_close_matches(wanted, known, n=1)
        advice = f"; did you mean {near[0]!r:.80}?" if near else ""
        told = f"must name one of the request's tools, not {wanted!r:.80}{advice}"
        raise InvalidParameterError(f"{field} {told if why is None else f'cannot be {wanted!r:.80}: {why}'}", field)
    if len(found) > 1 and not isinstance(reference, wire_tools.McpToolChoice):
        raise UnsupportedParameterError(
            f"{field} names tools of several namespaces: {', '.join(found)[:200]}; use one of these names", field
        )
    return found
