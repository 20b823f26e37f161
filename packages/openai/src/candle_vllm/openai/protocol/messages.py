# SPDX-License-Identifier: MIT
"""The messages of a chat request, and the rules that connect tool calls to their results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.custom_tools import CustomToolCall, kind_form
from candle_vllm.openai.protocol.fields import MAX_PARTS, MAX_TOOL_CALLS, Name, Refusal, WireModel, invalid, unsupported
from candle_vllm.openai.task import Call
from candle_vllm.openai.task import ImagePart as Image

OTHER_PART = re.compile(r"((in|out)put_)?(image|video|audio|file|document|thinking|computer_|encrypted_)\w{0,30}")
_IMAGES = ("image_url", "input_image")


class TextPart(WireModel):
    """A text part of a message's content; cache marks and the other fields of `output_text` have no effect."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        if (kind := data.get("type")) in _IMAGES:
            raise unsupported("type", "images can only be in messages of users and tools")
        if OTHER_PART.fullmatch(str(kind)):
            raise unsupported("type", f"{kind!r} parts are not supported: the server takes text and images")


class ImageUrl(WireModel):
    """Location of an image: a data URL or an address; `detail` has no effect."""

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high", "original"] | None = None


def one_image(part: Any) -> Any:
    """Check that a part has either an `image_url` or a `file_id`, and return it."""
    if part.image_url is None and part.file_id is None:
        raise invalid("image_url", "is required where there is no file_id")
    if part.image_url is not None and part.file_id is not None:
        raise invalid("file_id", "and image_url are two images: send one of them")
    return part


class ImagePart(WireModel):
    """An image: an object, or its address, or the id of a file of `/v1/files`; vLLM's `uuid` has no effect."""

    type: Literal["image_url", "input_image"]
    image_url: (
        Annotated[
            Annotated[str, Field(min_length=1), Tag("<string>")] | Annotated[ImageUrl, Tag("<object>")],
            Discriminator(lambda value: "<string>" if isinstance(value, str) else "<object>"),
        ]
        | None
    ) = None
    file_id: Name | None = None
    uuid: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    _is_one_image = model_validator(mode="after")(one_image)

    def image(self, path: str) -> Image:
        """Convert to the `ImagePart` of a `Task`."""
        if self.image_url is None:
            return Image(self.file_id or "", self.detail, f"{path}.file_id", stored=True)
        if isinstance(self.image_url, str):
            return Image(self.image_url, self.detail, f"{path}.image_url")
        return Image(self.image_url.url, self.image_url.detail or self.detail, f"{path}.image_url.url")


class RefusalPart(WireModel):
    """Text with which a model refused to answer; the model sees it like any other text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


# Tags in angle brackets are omitted from the paths in error messages.
_String = Annotated[str, Tag("<string>")]
Content = Annotated[
    _String | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(fields.list_form),
]
_SpokenPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(fields.by_type("refusal", otherwise="text")),
]
_SeenPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")],
    Discriminator(lambda value: "<image>" if fields.type_of(value) in _IMAGES else "<text>"),
]
SeenContent = Annotated[
    _String | Annotated[list[_SeenPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(fields.list_form),
]
SpokenContent = Annotated[
    _String | Annotated[list[_SpokenPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(fields.list_form),
]
ResultContent = Annotated[
    _String | Annotated[list[_SeenPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(fields.list_form),
]


class SystemMessage(WireModel):
    """Instructions; `developer` is OpenAI's newer name for the role."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(WireModel):
    """A message of the user."""

    role: Literal["user"]
    content: SeenContent
    name: Name | None = None


class FunctionCall(WireModel):
    """The function that an earlier answer called, with its arguments as JSON text.

    The text may be invalid JSON, because a model wrote it: a truncated answer must not end a conversation.
    `parsed_arguments`, which the official client adds, has no effect.
    """

    name: Name
    arguments: str
    parsed_arguments: Any = None


class ToolCall(WireModel):
    """A call in an assistant message; `index` is its index in a stream and has no effect."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Annotated[int, Field(ge=0)] | None = None

    def called(self) -> Call:
        """Convert to the `Call` of a `Task`."""
        return Call(self.id, self.function.name, self.function.arguments)


AnyToolCall = Annotated[
    Annotated[ToolCall, Tag("<function>")] | Annotated[CustomToolCall, Tag("<custom>")], Discriminator(kind_form)
]


class AssistantMessage(WireModel):
    """An earlier answer; `reasoning_content` and `reasoning` are two names of its reasoning.

    Attributes:
        refusal: text with which the model refused to answer; the model sees it after the content.
        parsed: parsed content, which the official client adds; no effect.
    """

    role: Literal["assistant"]
    content: SpokenContent | None = None
    refusal: str | None = None
    parsed: Any = None
    name: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[AnyToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None

    # Clients send answers back unchanged, so fields of an answer are allowed here if they are empty.
    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "annotations": Refusal("annotations cannot be shown to the model", ([],)),
        "audio": Refusal("the server takes text only"),
        "function_call": Refusal("OpenAI replaced it by tool_calls, with an id"),
    }

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.reasoning is not None and self.reasoning_content not in (None, self.reasoning):
            raise invalid("reasoning", "and reasoning_content are two names of one field and must be equal")
        if self.content is None and not self.refusal and not self.tool_calls and not self.thoughts:
            raise invalid("content", "is required where an assistant message has no tool_calls")
        return self

    @property
    def thoughts(self) -> str | None:
        """The reasoning under either name."""
        return self.reasoning_content if self.reasoning_content is not None else self.reasoning


class ToolMessage(WireModel):
    """Result of a called function; may be an empty text or have no parts."""

    role: Literal["tool"]
    content: ResultContent
    tool_call_id: Name
    name: Name | None = None


def _not_older(value: Any) -> Any:
    if not isinstance(value, (dict, WireModel)):
        raise invalid("", "must be an object with a role and content")
    if isinstance(value, dict) and value.get("role") == "function":
        raise unsupported("role", "OpenAI replaced 'function' by 'tool', with a tool_call_id")
    return value


def by_role(*roles: str, **alike: str) -> Discriminator:
    """Return the discriminator of messages; `alike` maps a role to another one of the same form."""

    def form(value: Any) -> str | None:
        role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
        return f"<{alike.get(role, role)}>" if isinstance(role, str) and role in roles else None

    return Discriminator(
        form,
        custom_error_type="invalid_field",
        custom_error_message="unknown role",
        custom_error_context={"field": "role", "text": f"must be one of {', '.join(roles)}"},
    )


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by_role("system", "developer", "user", "assistant", "tool", developer="system"),
    BeforeValidator(_not_older),
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=fields.MAX_MESSAGES, fail_fast=True)]


def check_history(messages: Sequence[Message]) -> None:
    """Check that each tool call has exactly one result before the next other message, and that each result has a call.

    Assistant messages in a row are one answer: clients that replay a streamed answer put its text behind its calls.
    Later turns may repeat ids. Raises an error that pydantic reports.
    """
    if not any(isinstance(message, ToolMessage) or getattr(message, "tool_calls", None) for message in messages):
        return
    pending: dict[str, None] = {}
    for index, message in enumerate(messages):
        here = f"messages.{index}"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in pending:
                raise invalid(
                    f"{here}.tool_call_id",
                    f"{message.tool_call_id!r:.80} is not the id of a tool call without a result",
                )
            del pending[message.tool_call_id]
            continue
        if not (index and isinstance(message, AssistantMessage) and isinstance(messages[index - 1], AssistantMessage)):
            all_answered(pending, f"{here}.role", "tool calls without a tool message")
        for number, call in enumerate(getattr(message, "tool_calls", None) or ()):
            if call.id in pending:
                raise invalid(f"{here}.tool_calls.{number}.id", f"{call.id!r:.80} is already the id of another call")
            pending[call.id] = None
    all_answered(pending, "messages", "tool calls without a tool message")


def all_answered(pending: Mapping[str, None], field: str, calls: str) -> None:
    """Raise an error for `field` if calls with these ids are pending; `calls` describes them in the message."""
    if pending:
        missing = ", ".join(repr(call_id)[:80] for call_id in list(pending)[:5])
        raise invalid(field, f"leaves {calls}: {missing}")
