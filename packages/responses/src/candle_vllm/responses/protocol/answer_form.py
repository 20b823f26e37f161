"""The form of an answer: text or JSON, how much the model thinks first, and what a stream adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from candle_vllm.openai.protocol.fields import Refusal, WireModel, invalid
from candle_vllm.openai.protocol.structured import JsonObjectFormat, JsonSchema, TextFormat
from candle_vllm.responses.protocol.parts import type_of


class StreamOptions(WireModel):
    """Has nothing to choose."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "include_obfuscation": Refusal("events are never padded with random characters", (False,))
    }


class JsonSchemaFormat(JsonSchema):
    """A schema that the answer always follows, whether `strict` or not; the model sees nothing of it."""

    type: Literal["json_schema"]


class PlainFormat(TextFormat):
    """Any text."""

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Lists the formats."""
        if data.get("type") != "text":
            raise invalid("type", "must be one of text, json_object, json_schema")


def _format_form(value: Any) -> str:
    kind = type_of(value)
    return f"<{kind}>" if kind in ("json_object", "json_schema") else "<text>"


class TextConfig(WireModel):
    """The form of the answer; `verbosity` has no effect."""

    format: (
        Annotated[
            Annotated[PlainFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
            Discriminator(_format_form),
        ]
        | None
    ) = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(WireModel):
    """How much the model thinks, where its template knows efforts. The other fields have no effect."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Annotated[str, Field(max_length=64)] | None = None
