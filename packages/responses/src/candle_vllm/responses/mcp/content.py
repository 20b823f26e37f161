"""What a server's tool gives back, as our own pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from candle_vllm.responses.tools.tool import ContentPart, ToolOutput

if TYPE_CHECKING:
    import mcp_types as types

MAX_PARTS = 1000


def tool_output(result: types.CallToolResult, *, fault: str | None = None) -> ToolOutput:
    """A call's result; every kind of content of both protocol eras has its piece.

    Args:
        fault: what is wrong with the result though the server calls it a success; it becomes its first text.
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
