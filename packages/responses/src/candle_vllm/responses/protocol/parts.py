"""Content parts of input items, and the messages that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from candle_vllm.openai.protocol.fields import MAX_PARTS, Refusal, WireModel, unsupported
from candle_vllm.responses.protocol.fields import MAX_TEXT

OTHER_PARTS = frozenset({
    "input_image", "input_file", "input_audio", "input_video", "image_url", "file", "image", "video_url", "audio_url",
    "computer_screenshot", "output_image", "output_audio", "encrypted_content",
})  # fmt: skip

Text = Annotated[str, Field(max_length=MAX_TEXT)]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete", "failed", "calling"]


class TextPart(WireModel):
    """A text; what an answer has beside its text (`annotations`, `logprobs`) is not shown to the model."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Names parts that carry something other than text."""
        kind = data.get("type")
        if isinstance(kind, str) and kind in OTHER_PARTS:
            raise unsupported("type", f"{kind!r} parts cannot be read, the server takes text only")


class RefusalPart(WireModel):
    """What a model said when it refused; shown to the model like any other text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """The text, by the name that it has in other parts."""
        return self.refusal


def type_of(value: Any) -> str | None:
    """The `type` of an object, checked or not; None where it is no text."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


def _part_form(value: Any) -> str:
    return "<refusal>" if type_of(value) == "refusal" else "<text>"


def content_form(value: Any) -> str:
    """Which of a string and a list of parts it is."""
    return "<parts>" if isinstance(value, list) else "<string>"


# Tags in angle brackets are left out of the paths in error messages.
_Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")], Discriminator(_part_form)
]
Content = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[_Part], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<parts>")],
    Discriminator(content_form),
]
Output = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<parts>")],
    Discriminator(content_form),
]


def text_of(content: Any) -> str:
    """A content as one string; parts stand on lines of their own."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class MessageItem(WireModel):
    """What somebody said; `phase` is a mark of OpenAI's models and has no effect."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: ItemId | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "tool_calls": Refusal("it belongs to chat requests; calls are items of their own here", ([],)),
        "name": Refusal("messages have no names here"),
    }
