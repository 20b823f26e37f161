"""What a tool is, what a model asks of it, and what comes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import msgspec

ToolStatus = Literal["completed", "failed", "denied", "timed_out", "unknown", "invalid_arguments", "unavailable"]


class ToolDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a model sees it.

    Attributes:
        name: what the model calls; letters, digits, "_" and "-", at most 64 of them, and its own in a registry.
        description: what it is for, in the tool's own words.
        parameters: a JSON schema of an object.
        server: the label of the MCP server that has it; None for a Python function.
        original_name: its name there; the name itself otherwise.
        read_only: its server says that it changes nothing, which is a hint and no promise.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"type": "object", "properties": {}})
    server: str | None = None
    original_name: str = ""
    read_only: bool = False

    def to_openai(self) -> dict[str, Any]:
        """The tool in a chat request."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """What a model asks for; `arguments` is JSON text as it wrote it, which need not be valid."""

    id: str
    name: str
    arguments: str


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of a tool's output.

    Attributes:
        kind: "text", "image", "audio", "resource" (its content is here) or "resource_link" (it is elsewhere).
        text: of a text or of a resource that is one.
        data: base64 of an image, of audio, or of a resource that is not text.
        mime_type, uri, name: as the tool gave them.
    """

    kind: Literal["text", "image", "audio", "resource", "resource_link"]
    text: str | None = None
    data: str | None = None
    mime_type: str | None = None
    uri: str | None = None
    name: str | None = None


class ToolOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool gave back.

    Attributes:
        content: its pieces in order.
        structured: a JSON value beside them, or None.
        is_error: the tool says that it failed; the content says why, and the model may try again.
    """

    content: tuple[ContentPart, ...] = ()
    structured: Any = None
    is_error: bool = False

    @classmethod
    def of_text(cls, text: str, *, is_error: bool = False) -> ToolOutput:
        """An output of one text."""
        return cls(content=(ContentPart(kind="text", text=text),), is_error=is_error)


class ToolProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a running tool says that it is; `total` is None where it does not know."""

    progress: float
    total: float | None = None
    message: str | None = None


class ToolResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one call.

    Attributes:
        call: what the model asked for.
        server: the label of the MCP server; None for a Python function or a tool that does not exist.
        status: "completed"; "failed" where the tool says so itself; else why it did not run or has no output.
        output: for every status: where the tool gave none, a text that tells the model what happened.
        text: the output as the model sees it, cut to the limit.
        seconds: how long it ran.
    """

    call: ToolCall
    server: str | None = None
    status: ToolStatus
    output: ToolOutput
    text: str
    seconds: float = 0.0


Report = Callable[[ToolProgress], None]


class Tool(Protocol):
    """Something that a model may call."""

    @property
    def definition(self) -> ToolDefinition: ...

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        """Runs once with arguments that fit the schema.

        Cancelling it ends the work. An exception that is a `ToolError` speaks to the model; any other is a failure
        whose message stays in the log.
        """
        ...
