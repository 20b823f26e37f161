# SPDX-License-Identifier: MIT
"""Wire types of the tools in Anthropic's requests, and of the tool choice (step 2 of a request's life)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from candle_vllm.openai.anthropic.blocks import CacheControl, one_of
from candle_vllm.openai.protocol.fields import Name, Refusal, WireModel, by_type, spelled, unsupported
from candle_vllm.openai.protocol.tools import ArgumentsSchema

MAX_TOOL_NAME = 128  # characters of a tool's name; Anthropic's limit
_SEARCH = re.compile(r"tool_search_tool_[a-z0-9_]+")
ToolName = Annotated[
    str,
    spelled(
        rf"[a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME}}}",
        f"must be 1 to {MAX_TOOL_NAME} of the characters a-z, A-Z, 0-9, _ and -, not {{!r:.150}}",
    ),
]


class Tool(WireModel):
    """A tool that the client runs.

    `defer_loading` has no effect: every tool is in the prompt from the start, so the beginning of the prompt stays the
    same for the prefix cache. `eager_input_streaming` has no effect either: the input is always streamed.
    """

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: ArgumentsSchema
    strict: bool | None = None
    cache_control: CacheControl | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "allowed_callers": Refusal("only the model itself calls tools", (["direct"],)),
        "input_examples": Refusal("put examples into the description", ([],)),
        "parameters": Refusal("it is OpenAI's; use input_schema"),
        "function": Refusal("it is OpenAI's; name, description and input_schema stand in the tool itself"),
    }

    def shown(self) -> dict[str, Any]:
        """Return the tool in the form that chat templates expect."""
        given = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


class SearchTool(WireModel):
    """Anthropic's search among deferred tools; ignored, because every tool is in the prompt from the start."""

    type: str
    name: Name
    cache_control: CacheControl | None = None


def _is_search(value: Any) -> bool:
    kind = value.get("type") if isinstance(value, dict) else None
    return isinstance(kind, str) and _SEARCH.fullmatch(kind) is not None


def _run_by_the_client(value: Any) -> Any:
    """Refuse, with a hint, tools that Anthropic executes or whose schema it defines."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom" and not _is_search(value):
        if kind == "function":
            raise unsupported("type", "'function' is OpenAI's; leave it out, and put name and input_schema here")
        raise unsupported("type", f"{kind!r:.60} is a tool of Anthropic's own; define one with name and input_schema")
    return value


# Tags in angle brackets are omitted from the paths in error messages.
AnyTool = Annotated[
    Annotated[Tool, Tag("<tool>")] | Annotated[SearchTool, Tag("<search>")],
    Discriminator(lambda value: "<search>" if _is_search(value) or isinstance(value, SearchTool) else "<tool>"),
    BeforeValidator(_run_by_the_client),
]


class AutoChoice(WireModel):
    """The model decides whether to call tools (`auto`), or must call one (`any`)."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class ToolNameChoice(WireModel):
    """The model must make exactly one call, of the named tool."""

    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class NoneChoice(WireModel):
    """The model must not call tools; they are not in the prompt either."""

    type: Literal["none"]


ToolChoice = Annotated[
    Annotated[AutoChoice, Tag("<auto>")]
    | Annotated[ToolNameChoice, Tag("<tool>")]
    | Annotated[NoneChoice, Tag("<none>")],
    Discriminator(by_type("tool", "none", otherwise="auto")),
    BeforeValidator(one_of(("auto", "any", "tool", "none"))),
]
