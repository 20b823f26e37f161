# SPDX-License-Identifier: MIT
"""Wire types of constraints on an answer: OpenAI's, vLLM's and llama.cpp's fields (step 2 of a request's life).

All are converted to core's `StructuredOutputsParams`, which checks types and limits; the grammar is compiled later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling import structured as core
from candle_vllm.core.sampling.structured import KINDS, StructuredOutputsParams
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.protocol.fields import (
    MAX_TOOL_NAME,
    FunctionName,
    Refusal,
    WireModel,
    by_type,
    invalid,
    unsupported,
)
from candle_vllm.openai.protocol.tools import Schema, check_depth, plain_schema

_Choice = Annotated[str, Field(min_length=1)]
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_OTHER_FORMATS = frozenset({"grammar", "regex", "json", "choice", "ebnf"})


class TextFormat(WireModel):
    """Format that allows any text."""

    type: Literal["text"]

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        kind = data.get("type")
        if isinstance(kind, str) and kind in _OTHER_FORMATS:
            raise unsupported("type", f"for {kind!r} use structured_outputs instead of response_format")
        if kind != "text":
            raise invalid("type", f"must be one of {', '.join(_FORMATS)}")


class JsonObjectFormat(WireModel):
    """Any JSON object, or, as in llama.cpp, JSON that follows a schema."""

    type: Literal["json_object"]
    json_schema: Schema | None = Field(default=None, alias="schema")

    def core_fields(self) -> dict[str, Any]:
        """Return the equivalent fields of core's `StructuredOutputsParams`."""
        return {"json": self.json_schema} if self.json_schema else {"json_object": True}


class JsonSchema(WireModel):
    """A schema that the answer always follows, `strict` or not; the model does not see it, its name or description."""

    name: FunctionName
    description: str | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


def _named(value: Any) -> Any:
    """Add the name, which llama.cpp's clients omit."""
    return {"name": "schema", **value} if isinstance(value, dict) and "schema" in value else value


class JsonSchemaFormat(WireModel):
    """Format: JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: Annotated[JsonSchema, BeforeValidator(_named)]

    def core_fields(self) -> dict[str, Any]:
        return {"json": self.json_schema.json_schema}


class Structure(WireModel):
    """One tagged part: JSON that follows the schema, between a begin text and an end text."""

    begin: str
    content_schema: Annotated[dict[str, Any] | bool | None, BeforeValidator(check_depth)] = Field(None, alias="schema")
    end: str


MAX_TAGS = 1000


class StructuralTagFormat(WireModel):
    """Free text with tagged parts, in the older form (`structures`, `triggers`) or the newer form (`format`)."""

    type: Literal["structural_tag"]
    structures: Annotated[list[Structure], Field(max_length=MAX_TAGS, fail_fast=True)] | None = None
    triggers: Annotated[list[str], Field(max_length=MAX_TAGS, fail_fast=True)] | None = None
    format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        older = self.structures is not None or self.triggers is not None
        if older == (self.format is not None):
            raise invalid("format", "must be given, or structures and triggers instead of it")
        if older and (self.structures is None or self.triggers is None):
            missing = "structures" if self.structures is None else "triggers"
            raise invalid(missing, "is required: structures and triggers must both be given")
        check_depth(self.format)
        return self

    def core_fields(self) -> dict[str, Any]:
        if self.format is not None:
            return {"structural_tag": {"type": self.type, "format": self.format}}
        structures = [
            {"begin": one.begin, "schema": one.content_schema, "end": one.end} for one in self.structures or ()
        ]
        return {"structural_tag": {"structures": structures, "triggers": self.triggers}}


def format_of(given: Any) -> Any:
    """Convert a class to the `response_format` of its schema; return anything else unchanged."""
    if not isinstance(given, type):
        return given
    name = re.sub(r"[^a-zA-Z0-9_-]", "_", given.__name__)[:MAX_TOOL_NAME]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": plain_schema(given)}}


# Tags in angle brackets are omitted from the paths in error messages.
ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[StructuralTagFormat, Tag("<structural_tag>")],
    Discriminator(by_type(*_FORMATS, otherwise="text")),
    BeforeValidator(format_of),
]


class StructuredOutputs(WireModel):
    """vLLM's constraint on an answer: exactly one of `KINDS`.

    Attributes:
        json_value: a JSON schema, as a value or as JSON text; a Python caller may pass a class with a schema.
        disable_fallback: no effect, because there is only one backend.
    """

    json_value: Any = Field(default=None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=core.MAX_REGEX)] | None = None
    choice: Annotated[list[_Choice], Field(min_length=1, max_length=core.MAX_CHOICES, fail_fast=True)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=core.MAX_GRAMMAR)] | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Annotated[str, Field(min_length=1, max_length=core.MAX_WHITESPACE_PATTERN)] | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "disable_additional_properties": Refusal('write "additionalProperties": false into the schema', (False,)),
    }

    @field_validator("json_value", "structural_tag")
    @classmethod
    def _object_or_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            try:
                value = decode_json(value, "the text")
            except InvalidBodyError as error:
                raise invalid("", f"must be an object or the JSON text of one, but {error}") from None
        value = plain_schema(value) if info.field_name == "json_value" else value
        schema_without_object = isinstance(value, bool) and info.field_name == "json_value"
        if value is not None and not isinstance(value, dict) and not schema_without_object:
            raise invalid("", "must be an object or the JSON text of one")
        check_depth(value)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if self.asks_for(kind)]
        if len(given) != 1:
            found = f"{', '.join(given)} are given" if given else "none is given"
            raise invalid("", f"needs exactly one of {', '.join(KINDS)}; {found}")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise invalid("whitespace_pattern", "and disable_any_whitespace exclude each other; give one of them")
        return self

    def asks_for(self, kind: str) -> bool:
        """Return whether the answer must be of this kind; `json_object: false` is no constraint."""
        value = self._value(kind)
        return value is not None and (kind != "json_object" or value)

    def _value(self, kind: str) -> Any:
        return self.json_value if kind == "json" else getattr(self, kind)

    def core_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {kind: self._value(kind) for kind in KINDS if self.asks_for(kind)}
        if self.whitespace_pattern is not None:
            fields["whitespace_pattern"] = self.whitespace_pattern
        if self.disable_any_whitespace:
            fields["disable_any_whitespace"] = True
        return fields


class LlamaForms(WireModel):
    """llama.cpp's fields that constrain an answer, besides `response_format`; empty values are no constraint.

    Attributes:
        grammar: GBNF, or Lark.
        json_schema: a schema that the answer follows.
    """

    grammar: Annotated[str, Field(max_length=core.MAX_GRAMMAR)] | None = None
    json_schema: Annotated[dict[str, Any], BeforeValidator(check_depth)] | None = None

    def llama_form(self) -> tuple[str, StructuredOutputsParams] | None:
        """Return the field that is set and its constraint, or None; raises the error that pydantic reports."""
        if self.grammar and self.json_schema:
            raise invalid("grammar", "and json_schema exclude each other; give one of them")
        if self.grammar:
            return "grammar", constraint("grammar", grammar=self.grammar)
        return ("json_schema", constraint("json_schema", json=self.json_schema)) if self.json_schema else None


def constraint(field: str, **kinds: Any) -> StructuredOutputsParams:
    """Return a constraint; raises the error that pydantic reports, which names `field`, if core refuses its values."""
    try:
        return StructuredOutputsParams(**kinds)
    except InvalidParameterError as error:
        raise invalid(field, f"cannot be used: {str(error).removeprefix('structured_outputs: ')}") from None


def structured_params(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> StructuredOutputsParams | None:
    """Return the constraint on the answer, or None if any text is allowed.

    Raises the error that pydantic reports if both fields set a constraint, or if core refuses the value.
    """
    fields: dict[str, Any] = {}
    if response_format is not None and not isinstance(response_format, TextFormat):
        if structured_outputs is not None:
            raise invalid("structured_outputs", "and response_format exclude each other; give one of them")
        fields = response_format.core_fields()
    elif structured_outputs is not None:
        fields = structured_outputs.core_fields()
    return constraint(blamed_field(response_format, structured_outputs), **fields) if fields else None


def blamed_field(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> str:
    """Return the path of the request field that core calls `structured_outputs`."""
    if isinstance(response_format, JsonSchemaFormat):
        return "response_format.json_schema.schema"
    if isinstance(response_format, JsonObjectFormat) and response_format.json_schema:
        return "response_format.schema"
    if structured_outputs is None:
        return "response_format"
    return f"structured_outputs.{next(kind for kind in KINDS if structured_outputs.asks_for(kind))}"
