# SPDX-License-Identifier: MIT
"""Types of tools: definition, call, output, result, and the errors by which a tool reports to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from candle_vllm.core.errors import CandleVllmError

_PICTURE = re.compile(r"image/[a-z0-9.+-]{1,40}")
_NOTE = re.compile(r"\n\[cut: the whole output has [0-9]{1,12} characters\]\Z")
NOTHING = "(the tool returned nothing)"
MAX_TIMEOUT = 86_400.0  # maximum timeout of a call in seconds

ToolStatus = Literal[
    "completed", "failed", "denied", "timed_out", "unknown", "invalid_arguments", "unavailable", "not_run"
]


class ToolDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a model sees it.

    Attributes:
        name: name that the model uses; at most 64 letters, digits, "_" and "-", and unique in a registry.
        description: purpose of the tool, in the words of its author.
        parameters: a JSON schema of an object.
        server: label of its MCP server; None for a Python function.
        original_name: name of the tool on its server, or of the Python function; empty means `name`.
        read_only: whether its server declares that the tool changes nothing; this is only a hint.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"type": "object", "properties": {}})
    server: str | None = None
    original_name: str = ""
    read_only: bool = False

    def to_openai(self) -> dict[str, Any]:
        """Return the tool in the format of a chat request."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call by a model; `arguments` is JSON text as the model generated it, which may be invalid."""

    id: str
    name: str
    arguments: str


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a tool's output.

    Attributes:
        kind: "text", "image", "audio", "resource" (with its content) or "resource_link" (without).
        text: text of a text part, or of a text resource, or description of a link.
        data: base64 data of an image, of audio, or of a resource that is not text.
        mime_type, uri, name: values that the tool gave.
    """

    kind: Literal["text", "image", "audio", "resource", "resource_link"]
    text: str | None = None
    data: str | None = None
    mime_type: str | None = None
    uri: str | None = None
    name: str | None = None


class ToolOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The output of a tool.

    Attributes:
        structured: JSON value in addition to the parts, or None.
        is_error: whether the tool reports a failure; the content says why, and the model may try again.
    """

    content: tuple[ContentPart, ...] = ()
    structured: Any = None
    is_error: bool = False

    @classmethod
    def of_text(cls, text: str, *, is_error: bool = False) -> ToolOutput:
        return cls(content=(ContentPart(kind="text", text=text),), is_error=is_error)


class ToolProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress that a running tool reports; `total` is None if it is unknown."""

    progress: float
    total: float | None = None
    message: str | None = None


class ToolResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one call.

    Attributes:
        server: label of the MCP server; None for a Python function or a tool that does not exist.
        status: "completed"; "failed" if the tool failed or its output is refused; otherwise why it has no output.
            "not_run" is a complete call in an answer that reached its token limit.
        output: output of the tool, or a text that tells the model why there is no output.
        text: output as the model sees it, truncated to the limit.
        seconds: how long the tool ran.
    """

    call: ToolCall
    server: str | None = None
    status: ToolStatus
    output: ToolOutput
    text: str
    seconds: float = 0.0


Report = Callable[[ToolProgress], None]
allowed_seconds: ContextVar[float | None] = ContextVar("allowed_seconds", default=None)
"""Timeout that the caller set for the running call; None means the tool's own."""


class Tool(Protocol):
    """A tool that a model may call."""

    @property
    def definition(self) -> ToolDefinition: ...

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        """Run once with arguments that match the schema, as far as it is checked. A cancellation ends the work.

        The model sees the message of a `ToolError`; of other exceptions, it sees only the type.
        """


class ToolError(CandleVllmError):
    """A failure whose message the model sees, so that it can react. Subclasses have their own `ToolResult.status`.

    The model, and through it the user, can see the messages: they must not contain secrets.
    """

    status: ClassVar[ToolStatus] = "failed"


class ToolUnavailableError(ToolError):
    """The tool cannot run now: its server is not connected, or too many of its calls are running."""

    status: ClassVar[ToolStatus] = "unavailable"


class ToolTimedOutError(ToolError):
    """The tool reports that a time limit of its own has passed."""

    status: ClassVar[ToolStatus] = "timed_out"


class ToolArgumentsError(ToolError):
    """The arguments match the schema, but the tool does not accept them."""

    status: ClassVar[ToolStatus] = "invalid_arguments"


def is_picture(part: ContentPart) -> bool:
    """Whether a part has the data of an image."""
    return bool(part.data) and (part.kind == "image" or (part.kind == "resource" and picture_type(part) != ""))


def picture_type(part: ContentPart) -> str:
    """Return the media type that a tool gave for an image; "" if it is missing or invalid."""
    return part.mime_type if part.mime_type and _PICTURE.fullmatch(part.mime_type) else ""


def output_text(output: ToolOutput, max_chars: int, faults: Mapping[int, str] = MappingProxyType({})) -> str:
    """Return the output as text of at most `max_chars` (at least 1) characters; a truncated text ends as in `cut`.

    Images, audio and other data appear as kind and size; structured output appears as JSON if there is no text.
    `faults` are additional remarks on parts, by the index of the part.
    """
    return output_pieces(output, max_chars, faults)[0][0]


def output_pieces(
    output: ToolOutput, max_chars: int, faults: Mapping[int, str] = MappingProxyType({}),
    images: Mapping[int, str] = MappingProxyType({}),
) -> list[tuple[str, str | None]]:  # fmt: skip
    """Return the output as texts and images: pairs of a text and None, or of "" and an image's address; at least one.

    `max_chars`, for all texts together, and `faults` are as in `output_text`. `images` are the addresses of parts that
    are shown as images, by the index of the part.
    """
    runs, made = [list[str]()], list[str]()
    for place, part in enumerate(output.content):
        if place in images:
            made.append(images[place])
            runs.append([])
        elif text := _part_text(part, faults.get(place)):
            runs[-1].append(text)
    if output.structured is not None and not _has_text(output):
        runs[-1].append(_json(output.structured))
    if not made and not runs[0]:
        runs[0].append(NOTHING)
    pieces: list[tuple[str, str | None]] = []
    for run, image in zip_longest(runs, made):
        if run:
            text = cut("\n".join(run).encode("utf-8", "replace").decode("utf-8"), max_chars)
            max_chars -= len(text)
            pieces.append((text, None))
        if image is not None:
            pieces.append(("", image))
    return [piece for piece in pieces if piece[0] or piece[1]] or [("", None)]


def cut(text: str, max_chars: int) -> str:
    """Return the text, or its beginning and, if there is space, a note with its whole length, also if it was cut."""
    if len(text) <= max_chars:
        return text
    earlier = _NOTE.search(text)
    note = earlier[0] if earlier else f"\n[cut: the whole output has {len(text)} characters]"
    return text[: max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]


def output_size(output: ToolOutput) -> int:
    """Number of characters of the output, including base64 data; structured output counts only if there is no text."""
    size = sum(len(part.text or "") + len(part.data or "") for part in output.content)
    return size if output.structured is None or _has_text(output) else size + len(_json(output.structured))


def _has_text(output: ToolOutput) -> bool:
    return any(part.kind == "text" and part.text for part in output.content)


def _part_text(part: ContentPart, fault: str | None = None) -> str:
    if part.kind == "text":
        return part.text or ""
    if part.kind == "resource_link":
        return _bracketed("link to a resource", part.name, part.uri, part.mime_type, part.text)
    size = None
    if part.data is not None:
        size = f"{max(0, len(part.data) * 3 // 4 - part.data[-2:].count('='))} bytes"  # of what base64 encodes
    label = _bracketed(part.kind, part.name, part.uri, part.mime_type, size, fault)
    return f"{label}\n{part.text}" if part.text else label


def _bracketed(kind: str, *details: str | None) -> str:
    told = ", ".join(f"{detail:.2000}" for detail in details if detail)
    return f"[{kind}: {told}]" if told else f"[{kind}]"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return "[structured output that is no JSON]"
