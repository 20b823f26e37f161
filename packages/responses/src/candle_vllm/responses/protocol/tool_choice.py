"""The choice among the tools of a request: none, any, one of them, or some of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from candle_vllm.openai.protocol.fields import MAX_NAME, MAX_TOOLS, WireModel, unsupported
from candle_vllm.responses.protocol.parts import type_of


class NamedToolChoice(WireModel):
    """Exactly one call of this tool."""

    type: Literal["function", "custom"]
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    namespace: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None


class McpToolChoice(WireModel):
    """A call of a tool of this server, or of this one."""

    type: Literal["mcp"]
    server_label: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None


def _reference_form(value: Any) -> str:
    return "<mcp>" if type_of(value) == "mcp" else "<named>"


def _served_reference(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom", "mcp", "allowed_tools"):
        raise unsupported("type", f"{kind!r:.60} is a tool of OpenAI's own; name a function, a custom or an mcp tool")
    return value


ToolReference = Annotated[
    Annotated[NamedToolChoice, Tag("<named>")] | Annotated[McpToolChoice, Tag("<mcp>")],
    Discriminator(_reference_form),
    BeforeValidator(_served_reference),
]


class AllowedToolsChoice(WireModel):
    """Some of the tools: `auto` may call them, `required` must; the model is shown all."""

    type: Literal["allowed_tools"]
    mode: Literal["none", "auto", "required"] = "auto"
    tools: Annotated[list[ToolReference], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def _choice_form(value: Any) -> str:
    if not isinstance(value, (dict, WireModel)):
        return "<string>"
    return {"mcp": "<mcp>", "allowed_tools": "<allowed>"}.get(type_of(value) or "", "<named>")


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[NamedToolChoice, Tag("<named>")]
    | Annotated[McpToolChoice, Tag("<mcp>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_choice_form),
    BeforeValidator(_served_reference),
]
