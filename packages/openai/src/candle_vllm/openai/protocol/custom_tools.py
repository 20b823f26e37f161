# SPDX-License-Identifier: MIT
"""Custom tools, whose input is any text: wire types, the function with one text that a model is shown for each, and
what it calls that with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.protocol.fields import NOT_DEFERRED, FunctionName, Name, Refusal, WireModel, invalid
from candle_vllm.openai.task import Call

CUSTOM_INPUT = "input"  # the one argument of the function
MAX_GRAMMAR = 64 << 10  # characters

Syntax = Literal["lark", "regex"]


def stand_in(name: str, description: str | None, syntax: Syntax | None, definition: str) -> dict[str, Any]:
    """The function that a model is shown; a grammar in Lark, which a schema cannot say, is shown to it as well.

    Args:
        name, description: of the tool.
        syntax: of its grammar, None where any text will do.
        definition: the grammar.
    """
    value: dict[str, Any] = {"type": "string"}
    texts = [description]
    if syntax == "regex":
        value["pattern"] = f"^(?:{definition})$"
    elif syntax == "lark":
        texts.append(f"The input must follow this Lark grammar:\n{definition}")
    schema = {"type": "object", "properties": {CUSTOM_INPUT: value}, "required": [CUSTOM_INPUT]}
    function: dict[str, Any] = {"name": name, "parameters": {**schema, "additionalProperties": False}}
    if text := "\n\n".join(filter(None, texts)):
        function["description"] = text
    return {**function, "strict": True} if syntax == "regex" else function


def custom_arguments(text: str) -> str:
    """The arguments of that function, of which this is the text."""
    return json.dumps({CUSTOM_INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The text in the arguments of that function.

    Models that know the tool as a function of their own call the one text otherwise (Codex's `apply_patch`: `patch`).
    What is not of the form that was asked for, such as JSON that was cut, is given as it is.
    """
    try:
        value = decode_json(arguments)
    except InvalidBodyError:
        return arguments
    if not isinstance(value, dict) or len(value) != 1:
        return arguments
    ((name, text),) = value.items()
    if isinstance(text, str):
        return text
    return arguments if text is None or name != CUSTOM_INPUT else json.dumps(text, ensure_ascii=False)


def type_of(value: Any) -> Any:
    """The `type` of an object, checked or not."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def kind_form(value: Any) -> str:
    """The tag of a tool, a call or a reference: of a function, or of a custom tool."""
    return "<custom>" if type_of(value) == "custom" else "<function>"


class AnyText(WireModel):
    """Any text."""

    type: Literal["text"]


class Grammar(WireModel):
    """Of the input of a custom tool."""

    syntax: Syntax
    definition: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]


class GrammarFormat(WireModel):
    """Text of a grammar, which is enforced."""

    type: Literal["grammar"]
    grammar: Grammar

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Names the form that other routes have."""
        if "grammar" not in data and "definition" in data:
            raise invalid("grammar", "is required: put syntax and definition into it")


def format_form(value: Any) -> str:
    """The tag of a format of a custom tool's input."""
    return "<grammar>" if type_of(value) == "grammar" else "<text>"


class CustomDefinition(WireModel):
    """What a custom tool is; without a format its input is any text."""

    name: FunctionName
    description: str | None = None
    format: (
        Annotated[
            Annotated[AnyText, Tag("<text>")] | Annotated[GrammarFormat, Tag("<grammar>")],
            Discriminator(format_form),
        ]
        | None
    ) = None


class CustomTool(WireModel):
    """A tool whose input is text; the model is shown a function with one text."""

    type: Literal["custom"]
    custom: CustomDefinition

    refused_fields: ClassVar[Mapping[str, Refusal]] = NOT_DEFERRED
    schema_path: ClassVar[str] = "custom.format.grammar.definition"

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Names the form that other routes have."""
        if "custom" not in data:
            raise invalid("custom", "is required: put name, description and format into it")

    @property
    def name(self) -> str:
        """Its own."""
        return self.custom.name

    @property
    def grammar(self) -> Grammar | None:
        """Of its input, if it has one."""
        return self.custom.format.grammar if isinstance(self.custom.format, GrammarFormat) else None

    def shown(self) -> dict[str, Any]:
        """The tool for a chat template."""
        tool, grammar = self.custom, self.grammar
        syntax, definition = (grammar.syntax, grammar.definition) if grammar else (None, "")
        return {"type": "function", "function": stand_in(tool.name, tool.description, syntax, definition)}


class FunctionReference(WireModel):
    """A function by its name."""

    name: FunctionName


class CustomToolReference(WireModel):
    """A custom tool by its name; as a choice, exactly one call of it."""

    type: Literal["custom"]
    custom: FunctionReference


class CustomCall(WireModel):
    """The custom tool that an earlier answer called, with the text for it."""

    name: Name
    input: str


class CustomToolCall(WireModel):
    """A call of a custom tool in an assistant message; `index` is its place in a stream and has no effect."""

    id: Name
    type: Literal["custom"]
    custom: CustomCall
    index: Annotated[int, Field(ge=0)] | None = None

    def called(self) -> Call:
        """The call as a task has it: of the function that stands for the tool."""
        return Call(self.id, self.custom.name, custom_arguments(self.custom.input))
