# SPDX-License-Identifier: MIT
"""Input items of a conversation, and the content parts of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from candle_vllm.openai.protocol import messages
from candle_vllm.openai.protocol.fields import (
    MAX_PARTS,
    Name,
    Refusal,
    WireModel,
    by_type,
    invalid,
    list_form,
    type_of,
    unsupported,
)
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.task import ImagePart as Image
from candle_vllm.openai.task import Part
from candle_vllm.openai.task import TextPart as TaskText
from candle_vllm.responses.protocol.fields import ItemId, Status, Text

_HOSTED_CALLS = frozenset({
    "file_search_call", "web_search_call", "computer_call", "computer_call_output", "code_interpreter_call",
    "image_generation_call", "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "tool_search_call", "tool_search_output",
})  # fmt: skip
_HOSTED_ITEMS = frozenset(
    {"additional_tools", "configuration_update", "compaction_trigger", "program", "program_output"}
)


class TextPart(WireModel):
    """A text; the model sees only the field `text`."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Refuse parts that are no text; the error names the type."""
        if messages.OTHER_PART.fullmatch(str(kind := data.get("type"))):
            raise unsupported("type", f"{kind!r} parts are not supported: send input_text or input_image")


class ImagePart(WireModel):
    """An image: a data URL, an address, or the id of a file of `/v1/files`; `detail` has no effect."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)] | None = None
    file_id: Name | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    _is_one_image = model_validator(mode="after")(messages.one_image)

    def image(self, path: str) -> Image:
        """Return the image as a part of a task; `path` is the path of this part in the request."""
        if self.file_id is not None:
            return Image(self.file_id, self.detail, f"{path}.file_id", stored=True)
        return Image(self.image_url or "", self.detail, f"{path}.image_url")


class RefusalPart(messages.RefusalPart):
    """A model's refusal, which the model sees as text."""

    refusal: Text


# Tags in angle brackets are left out of the paths in error messages.
_Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<input_image>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(by_type("input_image", "refusal", otherwise="text")),
]
_OutputPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<input_image>")],
    Discriminator(by_type("input_image", otherwise="text")),
]
Content = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[_Part], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]
Output = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[_OutputPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(list_form),
]


def text_of(content: Any) -> str:
    """Return the texts of a content as one string, separated by line breaks; images are left out."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if not isinstance(part, ImagePart))


def parts_of(content: Any, path: str) -> tuple[Part, ...]:
    """Return a content as a task's parts: one text or, with images, a part for each part; `path` is the content's."""
    if isinstance(content, str) or not any(isinstance(part, ImagePart) for part in content):
        return (TaskText(text_of(content)),)
    return tuple(
        part.image(f"{path}.{place}") if isinstance(part, ImagePart) else TaskText(part.text)
        for place, part in enumerate(content)
    )


def images_in(content: Any) -> int:
    """Return the number of images in a content."""
    return 0 if isinstance(content, str) else sum(isinstance(part, ImagePart) for part in content or ())


Phase = Literal["commentary", "final_answer"]
"""Kind of a model's message: text before or between calls, or the final answer."""


class MessageItem(WireModel):
    """A message; the `phase` of an answer is stored, but the model does not see it."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: ItemId | None = None
    status: Status | None = None
    phase: Phase | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "tool_calls": Refusal("it belongs to chat requests; calls are items of their own here", ([],)),
        "name": Refusal("names of messages are not supported"),
    }


class _DirectCaller(WireModel):
    """The caller of a tool: the model itself."""

    type: Literal["direct"]


class _CallItem(WireModel):
    """A call of an earlier answer; `async`, in OpenAI's `model_dump()` `async_`, and `caller` have no effect."""

    id: ItemId | None = None
    call_id: Name
    name: Name
    namespace: Name | None = None
    status: Status | None = None
    caller: _DirectCaller | None = None
    runs_async: bool | None = Field(default=None, alias="async")

    refused_fields: ClassVar[Mapping[str, Refusal]] = {"async_": Refusal("the name is 'async'", (True, False))}


class FunctionCallItem(_CallItem):
    """A call of a function; the arguments are JSON text as the model generated it."""

    type: Literal["function_call"]
    arguments: Text
    parsed_arguments: Any = None


class CustomCallItem(_CallItem):
    """A call of a custom tool, whose input is any text."""

    type: Literal["custom_tool_call"]
    input: Text


class CallOutputItem(WireModel):
    """The output of a tool that the client ran."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    id: ItemId | None = None
    call_id: Name
    output: Output
    status: Status | None = None
    name: Name | None = None
    namespace: Name | None = None
    caller: _DirectCaller | None = None


class _ThoughtPart(WireModel):
    """A text of reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text", "text", "output_text"]
    text: Text


class ReasoningItem(WireModel):
    """Reasoning of a model.

    Attributes:
        summary: summary by OpenAI's models; the model sees it if there is no other text.
        content: text of the reasoning.
        encrypted_content: reasoning that this server encoded, for items without `content`; any other is ignored.
    """

    type: Literal["reasoning"]
    id: ItemId | None = None
    summary: Annotated[list[_ThoughtPart], Field(fail_fast=True)] = Field(default_factory=list)
    content: Annotated[list[_ThoughtPart], Field(fail_fast=True)] | None = None
    encrypted_content: Text | None = None
    status: Status | None = None


class CompactionItem(WireModel):
    """A compacted conversation of `/v1/responses/compact`: its summary, encoded."""

    type: Literal["compaction"]
    id: ItemId | None = None
    encrypted_content: Text
    created_by: str | None = None


class ItemReference(WireModel):
    """A reference to a stored item by its id."""

    type: Literal["item_reference"] | None = None
    id: ItemId


class McpListToolsItem(WireModel):
    """The listed tools of an MCP server; a response lists them again only if this listing or the server failed."""

    type: Literal["mcp_list_tools"]
    id: ItemId | None = None
    server_label: Name
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)]
    error: Any = None
    status: Status | None = None


class McpCallItem(WireModel):
    """A call of an MCP server's tool, and its result; a vision model sees `content`, within its limit of images."""

    type: Literal["mcp_call"]
    id: ItemId
    server_label: Name
    name: Name
    arguments: Text
    output: Text | None = None
    content: Annotated[list[_OutputPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    error: Any = None
    status: Status | None = None
    approval_request_id: ItemId | None = None


class McpApprovalRequestItem(WireModel):
    """A call that needs an approval."""

    type: Literal["mcp_approval_request"]
    id: ItemId
    server_label: Name
    name: Name
    arguments: Text
    status: Status | None = None


class McpApprovalResponseItem(WireModel):
    """The answer to an approval request; the model sees the reason of a denial."""

    type: Literal["mcp_approval_response"]
    id: ItemId | None = None
    approval_request_id: ItemId
    approve: bool
    reason: Annotated[str, Field(max_length=4096)] | None = None
    status: Status | None = None

    @field_validator("reason")
    @classmethod
    def _stripped(cls, reason: str | None) -> str | None:
        return (reason or "").strip() or None


class HostedCallItem(WireModel):
    """A call of a tool that this server lacks, or its result: stored and listed, but the model does not see it."""

    model_config = ConfigDict(extra="allow")

    type: str
    id: ItemId | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, data: Any) -> Any:
        return data  # in place of the check of other objects, which refuses unknown fields


_KINDS = {  # type -> pydantic's union tag
    **{kind: f"<{kind}>" for kind in ("message", "function_call", "custom_tool_call")},
    **dict.fromkeys(("function_call_output", "custom_tool_call_output"), "<output>"),
    **{kind: f"<{kind}>" for kind in ("reasoning", "compaction", "item_reference", "mcp_list_tools", "mcp_call")},
    **{kind: f"<{kind}>" for kind in ("mcp_approval_request", "mcp_approval_response")},
    **dict.fromkeys(_HOSTED_CALLS, "<hosted>"),
}


def _item_form(value: Any) -> str:
    kind = type_of(value)
    if kind is None:
        is_reference = isinstance(value, dict) and "role" not in value and "id" in value and "content" not in value
        return "<item_reference>" if is_reference or isinstance(value, ItemReference) else "<message>"
    return _KINDS[kind]


def _known_kind(value: Any) -> Any:
    """Refuse unknown types, and items of services that do not exist here; warn of items without effect."""
    if isinstance(value, WireModel):
        return value
    if not isinstance(value, dict):
        raise invalid("", "must be an object with a type, or a message with role and content")
    kind = value.get("type")
    if isinstance(kind, str) and kind in _HOSTED_CALLS:
        remark([f"items of the type {kind!r} have no effect: this server does not have the tool"])
    if isinstance(kind, str) and kind in _HOSTED_ITEMS:
        raise unsupported("type", f"{kind!r} is an item of a service that this server does not have; leave it out")
    if kind is not None and (not isinstance(kind, str) or kind not in _KINDS):
        raise invalid("type", f"must be one of {', '.join(_KINDS)}, not {kind!r:.60}")
    return value


# Tags in angle brackets are left out of the paths in error messages.
InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[CustomCallItem, Tag("<custom_tool_call>")]
    | Annotated[CallOutputItem, Tag("<output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[CompactionItem, Tag("<compaction>")]
    | Annotated[ItemReference, Tag("<item_reference>")]
    | Annotated[McpListToolsItem, Tag("<mcp_list_tools>")]
    | Annotated[McpCallItem, Tag("<mcp_call>")]
    | Annotated[McpApprovalRequestItem, Tag("<mcp_approval_request>")]
    | Annotated[McpApprovalResponseItem, Tag("<mcp_approval_response>")]
    | Annotated[HostedCallItem, Tag("<hosted>")],
    Discriminator(_item_form),
    BeforeValidator(_known_kind),
]
