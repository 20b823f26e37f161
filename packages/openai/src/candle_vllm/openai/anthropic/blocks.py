# SPDX-License-Identifier: MIT
"""Content blocks of Anthropic's requests (step 2 of a request's life).

Text, images, documents of text, reasoning, and tool calls, results and references are accepted; the error for any other
type names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from candle_vllm.openai.protocol.fields import (
    MAX_PARTS,
    Name,
    Refusal,
    WireModel,
    by_type,
    invalid,
    list_form,
    unsupported,
)
from candle_vllm.openai.task import ImagePart

_USER = ("text", "image", "document", "tool_result")
_ASSISTANT = ("text", "thinking", "redacted_thinking", "tool_use")
_RESULT = ("text", "image", "document", "tool_reference")
_SYSTEM = ("text",)
_OURS = frozenset({*_USER, *_ASSISTANT, *_RESULT})
_MEDIA = frozenset({"search_result", "container_upload"})
_HOSTED = frozenset({
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result",
    "mcp_tool_use", "mcp_tool_result", "tool_addition", "tool_removal", "browser_state", "compaction", "fallback",
})  # fmt: skip

CacheControl = dict[str, Any]


def type_of(value: Any) -> str:
    """Return the `type` of an object; raises an error that pydantic reports if it is not a string."""
    if isinstance(value, WireModel):
        return str(getattr(value, "type", ""))
    if not isinstance(value, dict):
        raise invalid("", "must be an object with a type")
    if "type" not in value:
        raise invalid("type", "is required")
    if not isinstance(value["type"], str):
        raise invalid("type", "must be a string")
    return value["type"]


def one_of(allowed: Collection[str]) -> Callable[[Any], Any]:
    """Return a validator that requires the type of an object to be one of `allowed`; null passes."""

    def check(value: Any) -> Any:
        if value is not None and (kind := type_of(value)) not in allowed:
            raise invalid("type", f"must be one of {', '.join(allowed)}, not {kind!r:.60}")
        return value

    return check


class TextBlock(WireModel):
    """Text. `cache_control` and `parsed_output`, which Anthropic's client adds to an answer's text, have no effect."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    parsed_output: Any = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "citations": Refusal("citations cannot be shown to the model", ([],))
    }


class WrittenBlock(TextBlock):
    """Non-empty text of a user or of a system prompt."""

    text: Annotated[str, Field(min_length=1)]


class ThinkingBlock(WireModel):
    """Reasoning of the model; the signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class RedactedThinkingBlock(WireModel):
    """Reasoning that only Anthropic can read; ignored."""

    type: Literal["redacted_thinking"]
    data: str


class _Caller(WireModel):
    """Who called a tool: always the model."""

    type: Literal["direct"]


class ToolUseBlock(WireModel):
    """A tool call in an earlier answer."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: _Caller | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {"toolset_name": Refusal("toolsets are not supported")}

    @field_validator("input")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:  # Python objects that are not JSON
            raise invalid("", f"must be JSON: {error}") from None
        return value


class Base64Source(WireModel):
    """Data of an image; its type is detected from the bytes, not read from `media_type`."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Annotated[str, Field(min_length=1)]


class UrlSource(WireModel):
    """Address of an image."""

    type: Literal["url"]
    url: Annotated[str, Field(min_length=1)]


class FileSource(WireModel):
    """An image that is a file of `/v1/files`."""

    type: Literal["file"]
    file_id: Name


class ImageBlock(WireModel):
    """An image; `cache_control` has no effect."""

    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")]
        | Annotated[UrlSource, Tag("<url>")]
        | Annotated[FileSource, Tag("<file>")],
        Discriminator(by_type("base64", "url", otherwise="file")),
        BeforeValidator(one_of(("base64", "url", "file"))),
    ]
    cache_control: CacheControl | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "transformations": Refusal("large images are always scaled down", ({}, {"oversized_image": "downsize"}))
    }

    def image(self, path: str) -> ImagePart:
        """Convert to the `ImagePart` of a `Task`."""
        if isinstance(self.source, FileSource):
            return ImagePart(self.source.file_id, path=f"{path}.source.file_id", stored=True)
        if isinstance(self.source, UrlSource):
            return ImagePart(self.source.url, path=f"{path}.source.url")
        return ImagePart(f"data:{self.source.media_type};base64,{self.source.data}", path=f"{path}.source.data")


class PlainTextSource(WireModel):
    """Text of a document."""

    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: Annotated[str, Field(min_length=1)]

    @property
    def text(self) -> str:
        return self.data


_DocumentText = Annotated[TextBlock, BeforeValidator(one_of(("text",)))]


class ContentSource(WireModel):
    """A document as a text, or as text blocks."""

    type: Literal["content"]
    content: Annotated[
        Annotated[str, Field(min_length=1), Tag("<string>")]
        | Annotated[list[_DocumentText], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
        Discriminator(list_form),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(block.text for block in self.content)


def _readable(value: Any) -> Any:
    if value is not None and (kind := type_of(value)) in ("base64", "url", "file"):
        raise unsupported("type", f"documents are read as plain text (source of type 'text'), not from {kind!r}")
    return one_of(("text", "content"))(value)


class DocumentBlock(WireModel):
    """A document of plain text; the model reads its title, context and text. `cache_control` has no effect."""

    type: Literal["document"]
    source: Annotated[
        Annotated[PlainTextSource, Tag("<text>")] | Annotated[ContentSource, Tag("<content>")],
        Discriminator(by_type("text", otherwise="content")),
        BeforeValidator(_readable),
    ]
    title: Annotated[str, Field(max_length=500)] | None = None
    context: str | None = None
    cache_control: CacheControl | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "citations": Refusal("citations in answers are not supported", ({"enabled": False},))
    }

    @property
    def text(self) -> str:
        """The text that the model reads."""
        return "\n".join(filter(None, (self.title, self.context, self.source.text)))


class ToolReferenceBlock(WireModel):
    """A tool that a search returned; the model reads its name."""

    type: Literal["tool_reference"]
    tool_name: Name
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        """The text that the model reads."""
        return f"Tool: {self.tool_name}"


def _checked(allowed: Collection[str], place: str) -> Callable[[Any], Any]:
    """Return a validator that requires a block's type to be one of `allowed`; `place` is for messages."""

    def check(value: Any) -> Any:
        kind = type_of(value)
        if kind in allowed:
            return value
        if kind in _MEDIA:
            raise unsupported("type", f"{kind!r} blocks are not supported: use text, images or text documents")
        if kind in _HOSTED:
            raise unsupported(
                "type", f"{kind!r} blocks belong to tools of Anthropic's own service, which this server does not run"
            )
        if kind in _OURS:
            raise invalid("type", f"must be one of {', '.join(allowed)} in {place}, not {kind!r}")
        raise invalid("type", f"must be one of {', '.join(allowed)}, not {kind!r:.60}")

    return check


# Paths in error messages omit tags in angle brackets.
_ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[ToolReferenceBlock, Tag("<tool_reference>")],
    Discriminator(by_type(*_RESULT, otherwise="text")),
    BeforeValidator(_checked(_RESULT, "a tool_result")),
]
_ResultContent = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[_ResultBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]


class ToolResultBlock(WireModel):
    """Result of a tool call, which may be empty; `is_error` marks a failed call."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: _ResultContent | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {"toolset_name": Refusal("toolsets are not supported")}


_SystemBlock = Annotated[WrittenBlock, BeforeValidator(_checked(_SYSTEM, "a system prompt"))]
_UserBlock = Annotated[
    Annotated[WrittenBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(by_type(*_USER, otherwise="text")),
    BeforeValidator(_checked(_USER, "a user message")),
]
_AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")],
    Discriminator(by_type(*_ASSISTANT, otherwise="text")),
    BeforeValidator(_checked(_ASSISTANT, "an assistant message")),
]
_String = Annotated[str, Tag("<string>")]
_Words = Annotated[str, Field(min_length=1), Tag("<string>")]

SystemContent = Annotated[
    _String | Annotated[list[_SystemBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]
UserContent = Annotated[
    _Words | Annotated[list[_UserBlock], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]
AssistantContent = Annotated[
    _String | Annotated[list[_AssistantBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]
