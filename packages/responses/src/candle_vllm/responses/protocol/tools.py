# SPDX-License-Identifier: MIT
"""Tools of a request: functions, custom tools, namespaces, MCP servers; and the tool choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.custom_tools import AnyText, Grammar, format_form, kind_form
from candle_vllm.openai.protocol.tools import ArgumentsSchema

MAX_HEADERS = 32
MAX_URL = 2048
MAX_SECRET = 16 << 10  # characters of a header or a token
_Text = Annotated[str, Field(max_length=1 << 20)]
_CALLED_DIRECTLY = {"allowed_callers": fields.Refusal("only the model itself calls tools", (["direct"],))}


class FunctionTool(fields.WireModel):
    """A function that the client runs.

    `defer_loading` has no effect: the model sees every tool from the start. `async` and `output_schema` have no effect
    either: they describe the tool's execution and result, which are the client's.
    """

    type: Literal["function"]
    name: fields.FunctionName
    description: _Text | None = None
    parameters: ArgumentsSchema | None = None
    strict: bool | None = None
    output_schema: dict[str, Any] | None = None
    defer_loading: bool | None = None
    runs_async: bool | None = Field(default=None, alias="async")

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = {
        **_CALLED_DIRECTLY,
        "function": fields.Refusal(
            "it belongs to chat requests; name, description and parameters stand in the tool itself"
        ),
    }

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Explain where the fields of a chat request's tool belong."""
        if "function" in data and "name" not in data:
            raise fields.invalid("name", "is required: name, description and parameters stand in the tool itself here")


class GrammarFormat(Grammar):
    """A format that enforces a grammar."""

    type: Literal["grammar"]


class CustomTool(fields.WireModel):
    """A tool with a text as its input, which the client runs."""

    type: Literal["custom"]
    name: fields.FunctionName
    description: _Text | None = None
    format: (
        Annotated[
            Annotated[AnyText, Tag("<text>")] | Annotated[GrammarFormat, Tag("<grammar>")],
            Discriminator(format_form),
        ]
        | None
    ) = None
    defer_loading: bool | None = None
    runs_async: bool | None = Field(default=None, alias="async")

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = _CALLED_DIRECTLY


class NamespaceTool(fields.WireModel):
    """Tools with a common prefix; the model sees `namespace__name`, the client gets both names."""

    type: Literal["namespace"]
    name: fields.FunctionName
    description: _Text | None = None
    tools: Annotated[
        list[
            Annotated[
                Annotated[FunctionTool, Tag("<function>")] | Annotated[CustomTool, Tag("<custom>")],
                Discriminator(kind_form),
            ]
        ],
        Field(max_length=fields.MAX_TOOLS, fail_fast=True),
    ]


class ToolFilter(fields.WireModel):
    """Tools of a server that match every field that is set: by name, and by whether the server calls them read-only."""

    tool_names: Annotated[list[fields.Name], Field(max_length=fields.MAX_TOOLS, fail_fast=True)] | None = None
    read_only: bool | None = None


class ApprovalFilter(fields.WireModel):
    """Which tools `always` need an approval, even if `never` names them too, and which `never`; all others need one."""

    always: ToolFilter | None = None
    never: ToolFilter | None = None


class McpTool(fields.WireModel):
    """The tools of an MCP server: one that the operator has configured under this label, or one at a URL.

    Attributes:
        server_url: URL of the server, if the operator allows it; null means a server of mcp.json.
        authorization: bearer token for the server.
        headers: HTTP headers for the server.
        allowed_tools: tools that may be called; null allows all.
        require_approval: which calls need an approval; null means "always".
        server_description, defer_loading: no effect: the tools describe themselves and are shown from the start.
    """

    type: Literal["mcp"]
    server_label: Annotated[str, Field(min_length=1, max_length=fields.MAX_NAME)]
    server_url: Annotated[str, Field(min_length=1, max_length=MAX_URL)] | None = None
    authorization: Annotated[str, Field(min_length=1, max_length=MAX_SECRET)] | None = Field(default=None, repr=False)
    headers: (
        Annotated[dict[str, Annotated[str, Field(max_length=MAX_SECRET)]], fields.few_entries(MAX_HEADERS)] | None
    ) = Field(default=None, repr=False)
    allowed_tools: (
        Annotated[
            Annotated[list[fields.Name], Field(max_length=fields.MAX_TOOLS, fail_fast=True), Tag("<names>")]
            | Annotated[ToolFilter, Tag("<filter>")],
            Discriminator(lambda value: "<names>" if isinstance(value, list) else "<filter>"),
        ]
        | None
    ) = None
    require_approval: (
        Annotated[
            Annotated[Literal["always", "never"], Tag("<word>")] | Annotated[ApprovalFilter, Tag("<filter>")],
            Discriminator(lambda value: "<filter>" if isinstance(value, (dict, ApprovalFilter)) else "<word>"),
        ]
        | None
    ) = None
    server_description: _Text | None = None
    defer_loading: bool | None = None

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = {
        **_CALLED_DIRECTLY,
        "connector_id": fields.Refusal("connectors are OpenAI's; give the server_url"),
        "tunnel_id": fields.Refusal("tunnels are OpenAI's; give the server_url"),
    }

    @model_validator(mode="after")
    def _for_a_url(self) -> Self:
        for name in ("authorization", "headers"):
            if getattr(self, name) and self.server_url is None:
                raise fields.invalid(name, "needs server_url: mcp.json sets it for its own servers")
        return self


class HostedTool(fields.WireModel):
    """A tool of any other type, such as OpenAI's `web_search`; it is ignored with a warning."""

    type: Annotated[str, Field(min_length=1, max_length=fields.MAX_NAME)]


_SERVED = ("function", "custom", "namespace", "mcp")


def _only_type_of_hosted(value: Any) -> Any:
    """Drop all fields of a hosted tool except its type, because they have no effect."""
    if isinstance(value, fields.WireModel):
        return value
    if not isinstance(value, dict):
        raise fields.invalid("", "must be an object with a type")
    kind = value.get("type")
    if not isinstance(kind, str):
        raise fields.invalid("type", "is required: function, custom, namespace or mcp")
    return value if kind in _SERVED else {"type": kind}


# Tags in angle brackets are left out of the paths in error messages.
AnyTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[CustomTool, Tag("<custom>")]
    | Annotated[NamespaceTool, Tag("<namespace>")]
    | Annotated[McpTool, Tag("<mcp>")]
    | Annotated[HostedTool, Tag("<hosted>")],
    Discriminator(fields.by_type(*_SERVED, otherwise="hosted")),
    BeforeValidator(_only_type_of_hosted),
]


class NamedToolChoice(fields.WireModel):
    """A client's tool; as the whole tool choice, it requires exactly one call of this tool."""

    type: Literal["function", "custom"]
    name: fields.Name
    namespace: fields.Name | None = None


class McpToolChoice(fields.WireModel):
    """All tools of an MCP server, or the one called `name`; as the whole tool choice, one of them must be called."""

    type: Literal["mcp"]
    server_label: fields.Name
    name: fields.Name | None = None


def _served_reference(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom", "mcp", "allowed_tools"):
        raise fields.unsupported(
            "type", f"tools of the type {kind!r:.60} do not run here; name a function, a custom or an mcp tool"
        )
    return value


ToolReference = Annotated[
    Annotated[NamedToolChoice, Tag("<named>")] | Annotated[McpToolChoice, Tag("<mcp>")],
    Discriminator(fields.by_type("mcp", otherwise="named")),
    BeforeValidator(_served_reference),
]


class AllowedToolsChoice(fields.WireModel):
    """Only these tools may be called, with `required` at least one; the model sees all tools, with `none` no tools."""

    type: Literal["allowed_tools"]
    mode: Literal["none", "auto", "required"] = "auto"
    tools: Annotated[list[ToolReference], Field(min_length=1, max_length=fields.MAX_TOOLS, fail_fast=True)]


_object_form = fields.by_type("mcp", "allowed_tools", otherwise="named")
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[NamedToolChoice, Tag("<named>")]
    | Annotated[McpToolChoice, Tag("<mcp>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed_tools>")],
    Discriminator(lambda value: _object_form(value) if isinstance(value, (dict, fields.WireModel)) else "<string>"),
    BeforeValidator(_served_reference),
]
