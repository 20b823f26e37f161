"""Whether a tool's structured output fits the schema that its own server declares for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from candle_vllm.responses.tools.schemas import MAX_SCHEMA, ArgumentsChecker

if TYPE_CHECKING:
    from mcp_types import CallToolResult, Tool


class OutputChecks:
    """Checks outputs; a schema is prepared when it is first needed, and kept until the tool's is another one."""

    def __init__(self) -> None:
        self._checkers: dict[str, tuple[Any, ArgumentsChecker]] = {}

    def keep(self, names: set[str]) -> None:
        """Forgets all other tools."""
        self._checkers = {name: kept for name, kept in self._checkers.items() if name in names}

    async def fault(self, tool: Tool, result: CallToolResult) -> str | None:
        """What is wrong with an output that its server calls a success, in words for a model; None where it fits."""
        schema = tool.output_schema
        if schema is None or result.is_error:
            return None
        if result.structured_content is None and "structured_content" not in result.model_fields_set:
            return "The tool ran, but gave no structured output, though its server declares a schema for it."
        structured: Any = result.structured_content
        known = self._checkers.get(tool.name)
        if known is None or known[0] != schema:
            if len(msgspec.json.encode(schema)) > MAX_SCHEMA:
                return None  # nobody checks with a schema of that size
            known = self._checkers[tool.name] = (schema, ArgumentsChecker(schema, tool.name))
        faults = await asyncio.to_thread(known[1].faults, structured)
        if not faults:
            return None
        return f"The tool ran, but its output does not fit the schema that its server declares: {'; '.join(faults)}"
