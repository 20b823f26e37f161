# SPDX-License-Identifier: MIT
"""Converts the output of an MCP server's tool, and checks whether it matches the schema that the server declares."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from candle_vllm.responses.tools.schemas import MAX_SCHEMA, ArgumentsChecker
from candle_vllm.responses.tools.tool import ContentPart, ToolOutput

if TYPE_CHECKING:
    from mcp_types import CallToolResult, Tool

MAX_PARTS = 1000


def tool_output(result: CallToolResult, *, fault: str | None = None) -> ToolOutput:
    """Convert a call's result; every kind of content in both protocol versions is supported.

    `fault` is an error in a result that the server reports as a success; it becomes the first text.
    """
    parts = [_part(block) for block in result.content[:MAX_PARTS]]
    if len(result.content) > MAX_PARTS:
        parts.append(ContentPart(kind="text", text=f"[{len(result.content) - MAX_PARTS} more pieces are left out]"))
    if fault is not None:
        parts.insert(0, ContentPart(kind="text", text=fault))
    return ToolOutput(
        content=tuple(parts), structured=result.structured_content, is_error=bool(result.is_error) or fault is not None
    )


def _part(block: Any) -> ContentPart:
    match block.type:
        case "text":
            return ContentPart(kind="text", text=block.text)
        case "image" | "audio":
            return ContentPart(kind=block.type, data=block.data, mime_type=block.mime_type)
        case "resource_link":
            return ContentPart(
                kind="resource_link", uri=str(block.uri), name=block.name, mime_type=block.mime_type,
                text=block.description,
            )  # fmt: skip
        case "resource":
            inner = block.resource
            return ContentPart(
                kind="resource", uri=str(inner.uri), mime_type=inner.mime_type,
                text=getattr(inner, "text", None), data=getattr(inner, "blob", None),
            )  # fmt: skip
    return ContentPart(kind="text", text=f"[content of the kind {str(block.type)[:50]!r}, which is not understood]")


class OutputChecks:
    """Checks outputs. The checker of a schema is made at its first use, and reused until the tool's schema changes."""

    def __init__(self) -> None:
        self._checkers: dict[str, tuple[Any, ArgumentsChecker]] = {}

    def keep(self, names: set[str]) -> None:
        """Drop the checkers of all tools except `names`."""
        self._checkers = {name: kept for name, kept in self._checkers.items() if name in names}

    async def fault(self, tool: Tool, result: CallToolResult) -> str | None:
        """Return the errors of an output that its server reports as a success, as a text for a model, or None."""
        schema = tool.output_schema
        if schema is None or result.is_error:
            return None
        if result.structured_content is None and "structured_content" not in result.model_fields_set:
            return "The tool ran, but gave no structured output, though its server declares a schema for it."
        structured: Any = result.structured_content
        known = self._checkers.get(tool.name)
        if known is None or known[0] != schema:
            if len(msgspec.json.encode(schema)) > MAX_SCHEMA:
                return None  # a schema of that size is not used
            known = self._checkers[tool.name] = (schema, ArgumentsChecker(schema, tool.name))
        faults = await asyncio.to_thread(known[1].faults, structured)
        if not faults:
            return None
        return f"The tool ran, but its output does not fit the schema that its server declares: {'; '.join(faults)}"
