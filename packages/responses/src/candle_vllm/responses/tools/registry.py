# SPDX-License-Identifier: MIT
"""The tools of a conversation or a server, by the names that a model uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace as with_fields

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.names import hashed_name, is_tool_name, matches
from candle_vllm.responses.tools.schemas import ArgumentsChecker, schema_fault
from candle_vllm.responses.tools.tool import Report, Tool, ToolDefinition, ToolOutput

logger = logging.getLogger(__name__)

MAX_TOOLS = 10_000


class Registered:
    """A tool with its definition at the time of its registration, and the checker of its arguments."""

    def __init__(self, tool: Tool, definition: ToolDefinition) -> None:
        self.tool = tool
        self.definition = definition
        self.checker = ArgumentsChecker(definition.parameters, definition.name)


class ToolRegistry:
    """Tools by name: `add` adds one tool, and `replace` sets all tools of an MCP server.

    Functions come first, then each server's tools, with the servers in the order of their registration. A registry
    belongs to the thread of its event loop.
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = ()) -> None:
        self._groups: dict[str | None, dict[str, Registered]] = {None: {}}
        self.revision = 0  # number of changes; while it is the same, the tools are the same
        if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
            raise InvalidParameterError(
                f"tools must be a list of functions and Tool objects, not a {type(tools).__name__}", "tools"
            )
        given: Iterable[Any] = tools
        for tool in given:
            if hasattr(tool, "definition"):
                self.add(tool)
            else:
                self.add_function(tool)

    def add(self, tool: Tool) -> ToolDefinition:
        """Add one tool; InvalidParameterError for a used or invalid name, an invalid schema, or too many tools."""
        definition = tool.definition
        fault = _fault(definition)
        if fault is None and definition.name in self:
            fault = "there is a tool of this name already: give this one another name, or remove the other"
        if fault is None and len(self) >= MAX_TOOLS:
            fault = f"there are {MAX_TOOLS} tools already, and no more are allowed"
        if fault is not None:
            raise InvalidParameterError(f"the tool {definition.name!r:.100} cannot be added: {fault}", "tools")
        self._groups.setdefault(definition.server, {})[definition.name] = Registered(tool, definition)
        self.revision += 1
        return definition

    def add_function(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | None = None,
    ) -> Tool:
        """Make a tool of a Python function (`function_tool`), and add it."""
        from candle_vllm.responses.tools.python_tool import function_tool

        tool = function_tool(function, name=name, description=description, timeout=timeout)
        self.add(tool)
        return tool

    def remove(self, name: str) -> None:
        """Remove a tool, whose running calls continue; InvalidParameterError if there is no tool of this name."""
        for group in self._groups.values():
            if group.pop(name, None) is not None:
                self.revision += 1
                return
        raise InvalidParameterError(f"there is no tool {name!r:.100} to remove", "tools")

    def replace(self, server: str, tools: Sequence[Tool]) -> tuple[str, ...]:
        """Replace all tools of a server; without tools, it keeps its place in the order.

        A tool whose name a function or another server's tool has gets a name with a hash. A tool that cannot be offered
        (the second of one name, an invalid schema) is left out, with a warning in the log. Returns the
        original names of the tools that are left out.
        """
        room = MAX_TOOLS - len(self) + len(self._groups.get(server, {}))
        group: dict[str, Registered] = {}
        left_out: list[str] = []
        for tool in tools:
            entry = self._entry(server, tool, group)
            fault = entry if isinstance(entry, str) else None
            if fault is None and len(group) >= room:
                fault = f"there are {MAX_TOOLS} tools already"
            if isinstance(entry, Registered) and fault is None:
                group[entry.definition.name] = entry
                continue
            original = tool.definition.original_name or tool.definition.name
            left_out.append(original)
            logger.warning("the tool %.100r of the MCP server %.100r is left out: %s", original, server, fault)
        self._groups[server] = group
        self.revision += 1
        return tuple(left_out)

    def definitions(self, allowed: Iterable[str] | None = None) -> tuple[ToolDefinition, ...]:
        """Return the definitions for a model: all, or those whose names match a pattern ("*" matches any text)."""
        patterns = None if allowed is None else tuple(allowed)
        shown = (entry.definition for entry in self._entries())
        return tuple(item for item in shown if patterns is None or matches(patterns, item.name))

    def find(self, name: str) -> Tool | None:
        """Return the tool that a model calls by this name, or None."""
        entry = self.entry(name)
        return None if entry is None else entry.tool

    def entry(self, name: str) -> Registered | None:
        """Return the tool with its definition and checker, or None."""
        return next((group[name] for group in self._groups.values() if name in group), None)

    def names(self) -> Iterator[str]:
        return (entry.definition.name for entry in self._entries())

    def __iter__(self) -> Iterator[Tool]:
        return iter([entry.tool for entry in self._entries()])

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __contains__(self, name: object) -> bool:
        return any(name in group for group in self._groups.values())

    def _entries(self) -> Iterator[Registered]:
        for group in self._groups.values():
            yield from group.values()

    def _entry(self, server: str, tool: Tool, group: Mapping[str, Registered]) -> Registered | str:
        """Return the entry for one of a server's tools, or why it cannot be registered."""
        definition = tool.definition
        if definition.server != server:
            return f"it says that its server is {definition.server!r:.100}"
        fault = _fault(definition)
        if fault is not None:
            return fault
        if definition.name in group:
            return "the server has it twice"
        others = [other for label, other in self._groups.items() if label != server]
        if any(definition.name in other for other in others):
            definition = with_fields(definition, name=hashed_name(server, definition.original_name or definition.name))
            if any(definition.name in other for other in (group, *others)):
                return "its name is taken"
            tool = _Renamed(tool, definition)
        return Registered(tool, definition)


class _Renamed:
    def __init__(self, tool: Tool, definition: ToolDefinition) -> None:
        self._tool = tool
        self.definition = definition
        self.timeout: float | None = getattr(tool, "timeout", None)

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        return await self._tool.run(arguments, report)


def _fault(definition: ToolDefinition) -> str | None:
    """Return why a tool cannot be offered to a model, or None."""
    if not is_tool_name(definition.name):
        return "a name is 1 to 64 letters, digits, '_' and '-'"
    return schema_fault(definition.parameters)
