"""The messages of a chat request, and the rules that tie tool calls to their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.protocol.fields import MAX_PARTS, MAX_TOOL_CALLS, Name, Refusal, WireModel, invalid, unsupported

_OTHER_PARTS = frozenset({
    "image_url", "input_image", "image_base64", "input_audio", "audio_url", "video_url", "file", "input_file",
    "refusal",
})  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool")


class TextPart(WireModel):
    """One part of a message's content; the cache marks have no effect, because every full block is cached."""

    type: Literal["text", "input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Names parts that carry something other than text."""
        kind = data.get("type")
        if isinstance(kind, str) and kind in _OTHER_PARTS:
            raise unsupported("type", f"{kind!r} parts cannot be read, the server takes text only")


def _content_form(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<string>"


# Tags in angle brackets are left out of the paths in error messages.
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<parts>")],
    Discriminator(_content_form),
]


class SystemMessage(WireModel):
    """Instructions; `developer` is OpenAI's newer name for the role."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(WireModel):
    """What the user said."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class FunctionCall(WireModel):
    """The function that an earlier answer called, with its arguments as JSON text."""

    name: Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _must_be_object(cls, arguments: str) -> str:
        try:
            value = decode_json(arguments or "{}", "the text")
        except InvalidBodyError as error:
            raise invalid("", f"must hold one JSON object as text, but {error}") from None
        if not isinstance(value, dict):
            raise invalid("", "must hold one JSON object as text")
        return arguments

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as an object; empty text means none."""
        return decode_json(self.arguments or "{}")


class ToolCall(WireModel):
    """A call in an assistant message."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(WireModel):
    """An earlier answer; `reasoning_content` and `reasoning` are two names for its thoughts."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None

    # Clients send answers back as they got them, so the fields of an answer may stand here when they are empty.
    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "refusal": Refusal("refusals of other models cannot be shown to this one", ("",)),
        "annotations": Refusal("annotations cannot be shown to the model", ([],)),
        "audio": Refusal("the server takes text only"),
        "function_call": Refusal("OpenAI replaced it by tool_calls"),
    }

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.reasoning is not None and self.reasoning_content not in (None, self.reasoning):
            raise invalid("reasoning", "and reasoning_content are two names of one field and must be equal")
        if self.content is None and not self.tool_calls and not self.thoughts:
            raise invalid("content", "is required where an assistant message has no tool_calls")
        return self

    @property
    def thoughts(self) -> str | None:
        """The reasoning under either name."""
        return self.reasoning_content if self.reasoning_content is not None else self.reasoning


class ToolMessage(WireModel):
    """What a called function gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name
    name: Name | None = None


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    if not isinstance(role, str) or role not in _ROLES:
        return None
    return "<system>" if role == "developer" else f"<{role}>"


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        _role,
        custom_error_type="invalid_field",
        custom_error_message="unknown role",
        custom_error_context={"field": "role", "text": f"must be one of {', '.join(_ROLES)}"},
    ),
]


def check_history(messages: Sequence[Message]) -> None:
    """Every tool call is answered right after it, once, and nothing else is.

    Raises the error that pydantic reports when an id is used twice, a result is missing, or a result has no call.
    """
    used: set[str] = set()
    pending: dict[str, None] = {}
    for index, message in enumerate(messages):
        here = f"messages.{index}"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in pending:
                raise invalid(f"{here}.tool_call_id", f"{message.tool_call_id!r:.80} answers no call that is open here")
            del pending[message.tool_call_id]
            continue
        _all_answered(pending, f"{here}.role")
        for number, call in enumerate(getattr(message, "tool_calls", None) or ()):
            if call.id in used:
                raise invalid(f"{here}.tool_calls.{number}.id", f"{call.id!r:.80} is already the id of another call")
            used.add(call.id)
            pending[call.id] = None
    _all_answered(pending, "messages")


def _all_answered(pending: Mapping[str, None], field: str) -> None:
    if pending:
        missing = ", ".join(repr(call_id)[:80] for call_id in list(pending)[:5])
        raise invalid(field, f"leaves tool calls without a tool message: {missing}")
