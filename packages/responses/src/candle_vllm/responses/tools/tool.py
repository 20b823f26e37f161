# SPDX-License-Identifier: MIT
"""What a tool is, what a model asks of it, what comes of that, and what a tool raises to speak to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from candle_vllm.core.errors import CandleVllmError

_PICTURE = re.compile(r"image/[a-z0-9.+-]{1,40}")
NOTHING = "(the tool returned nothing)"

ToolStatus = Literal[
    "completed", "failed", "denied", "timed_out", "unknown", "invalid_arguments", "unavailable", "not_run"
]


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
        status: "completed"; "failed" where the tool says so itself; else why it did not run or has no output. "not_run"
            is a call that was whole, in an answer that was cut at its token limit.
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


class ToolError(CandleVllmError):
    """A failure whose message the model sees, so that it can do otherwise; each kind becomes a status of the result.

        ToolError                    "failed": the tool says so in its own words
        ├── ToolUnavailableError     "unavailable": it cannot be reached now
        ├── ToolTimedOutError        "timed_out": it noticed by itself that its time is over
        └── ToolArgumentsError       "invalid_arguments": they do not fit after all

    Their messages reach the model, and through it the user: they must hold no secrets.
    """

    status: ClassVar[ToolStatus] = "failed"


class ToolUnavailableError(ToolError):
    """The tool cannot run now: its server is gone, or too many calls of it run."""

    status: ClassVar[ToolStatus] = "unavailable"


class ToolTimedOutError(ToolError):
    """The tool gave up because its time was over."""

    status: ClassVar[ToolStatus] = "timed_out"


class ToolArgumentsError(ToolError):
    """The arguments fit the schema and still not the tool."""

    status: ClassVar[ToolStatus] = "invalid_arguments"


def is_picture(part: ContentPart) -> bool:
    """Whether a piece has the data of an image."""
    return bool(part.data) and (part.kind == "image" or (part.kind == "resource" and picture_type(part) != ""))


def picture_type(part: ContentPart) -> str:
    """The media type of an image as a tool gave it; "" for an invalid one."""
    return part.mime_type if part.mime_type and _PICTURE.fullmatch(part.mime_type) else ""


def output_text(output: ToolOutput, max_chars: int, faults: Mapping[int, str] = MappingProxyType({})) -> str:
    """The output as text of at most `max_chars` characters; where it is cut, its end says so.

    Texts and text resources stand as they are; of images, sound and other data the model learns the kind and size.
    Structured output is shown as JSON where there is no text that says the same.

    Args:
        output: of a tool.
        max_chars: at least 1.
        faults: what is said of some of its pieces besides, by their places.
    """
    ((text, _),) = output_pieces(output, max_chars, faults)
    return text


def output_pieces(
    output: ToolOutput, max_chars: int, faults: Mapping[int, str] = MappingProxyType({}),
    images: Mapping[int, str] = MappingProxyType({}),
) -> list[tuple[str, str | None]]:  # fmt: skip
    """The output in pieces, texts and images; see `output_text`, whose limit holds for the texts together.

    Args:
        output: of a tool.
        max_chars: of all texts.
        faults: what is said of some of its pieces besides, by their places.
        images: addresses of those that are shown.

    Returns:
        Texts with None, and images with "" and their address; at least one.
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
    """The text, or its beginning and a note of how much is missing."""
    if len(text) <= max_chars:
        return text
    note = f"\n[cut: the whole output has {len(text)} characters]"
    return text[: max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]


def output_size(output: ToolOutput) -> int:
    """Characters of all that is in it, base64 as it stands; structured output counts where no text says the same."""
    size = sum(len(part.text or "") + len(part.data or "") for part in output.content)
    return size if output.structured is None or _has_text(output) else size + len(_json(output.structured))


def _has_text(output: ToolOutput) -> bool:
    return any(part.kind == "text" and part.text for part in output.content)


def _part_text(part: ContentPart, fault: str | None = None) -> str:
    if part.kind == "text":
        return part.text or ""
    if part.kind == "resource_link":
        return _bracketed("link to a resource", part.name, part.uri, part.mime_type)
    size = None if part.data is None else f"{_bytes_of_base64(part.data)} bytes"
    label = _bracketed(part.kind, part.name, part.uri, part.mime_type, size, fault)
    return f"{label}\n{part.text}" if part.text else label


def _bracketed(kind: str, *details: str | None) -> str:
    told = ", ".join(f"{detail:.2000}" for detail in details if detail)
    return f"[{kind}: {told}]" if told else f"[{kind}]"


def _bytes_of_base64(data: str) -> int:
    return max(0, len(data) * 3 // 4 - data[-2:].count("="))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return "[structured output that is no JSON]"
