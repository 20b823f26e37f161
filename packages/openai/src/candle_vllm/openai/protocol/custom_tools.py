# SPDX-License-Identifier: MIT
"""Custom tools, whose input is free text: wire types, and the function with one text argument that the model sees."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.protocol.fields import NOT_DEFERRED, FunctionName, Name, Refusal, WireModel, by_type, invalid
from candle_vllm.openai.task import Call

CUSTOM_INPUT = "input"  # name of the function's only argument
MAX_GRAMMAR = 64 << 10  # characters
_ANCHORS = re.compile(r"\A\^|(?<!\\)((?:\\\\)*)\$\Z")  # around a regex; `stand_in` adds both itself

Syntax = Literal["lark", "regex"]


def stand_in(name: str, description: str | None, syntax: Syntax | None, definition: str) -> dict[str, Any]:
    """Return the function that the model sees in place of a custom tool.

    Args:
        name, description: name and description of the tool; a Lark grammar, which no schema expresses, is appended.
        syntax: syntax of the grammar; None if any text is allowed.
        definition: the grammar.
    """
    value: dict[str, Any] = {"type": "string"}
    texts = [description]
    if syntax == "regex":
        value["pattern"] = "^(?:" + _ANCHORS.sub(r"\1", definition) + ")$"
    elif syntax == "lark":
        texts.append(f"The input must follow this Lark grammar:\n{definition}")
    schema = {"type": "object", "properties": {CUSTOM_INPUT: value}, "required": [CUSTOM_INPUT]}
    function: dict[str, Any] = {"name": name, "parameters": {**schema, "additionalProperties": False}}
    if text := "\n\n".join(filter(None, texts)):
        function["description"] = text
    return {**function, "strict": True} if syntax == "regex" else function


def custom_arguments(text: str) -> str:
    """Return the arguments of a `stand_in` function with the input `text`."""
    return json.dumps({CUSTOM_INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """Return the input text from the arguments of a `stand_in` function.

    The only argument may have another name, which models learned with the tool (Codex's `apply_patch`: `patch`). An
    `input` that is no text becomes JSON. Arguments of any other form, such as truncated JSON, are returned unchanged.
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


kind_form = by_type("custom", otherwise="function")
"""Returns pydantic's union tag of a tool, a call or a reference."""
format_form = by_type("grammar", otherwise="text")
"""Returns pydantic's union tag for the format of a custom tool's input."""


class AnyText(WireModel):
    """A format that allows any text."""

    type: Literal["text"]


class Grammar(WireModel):
    """The grammar of a custom tool's input."""

    syntax: Syntax
    definition: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]


class GrammarFormat(WireModel):
    """A format that enforces a grammar."""

    type: Literal["grammar"]
    grammar: Grammar

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        if "grammar" not in data and "definition" in data:
            raise invalid("grammar", "is required: put syntax and definition into it")


class CustomDefinition(WireModel):
    """Definition of a custom tool; without a format its input is any text."""

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
    """A tool whose input is text; the model sees it as a function with one text argument."""

    type: Literal["custom"]
    custom: CustomDefinition

    refused_fields: ClassVar[Mapping[str, Refusal]] = NOT_DEFERRED
    schema_path: ClassVar[str] = "custom.format.grammar.definition"

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        if "custom" not in data:
            raise invalid("custom", "is required: put name, description and format into it")

    @property
    def name(self) -> str:
        return self.custom.name

    @property
    def grammar(self) -> Grammar | None:
        """Grammar of the tool's input, if it has one."""
        return self.custom.format.grammar if isinstance(self.custom.format, GrammarFormat) else None

    def shown(self) -> dict[str, Any]:
        """Return the tool in the form that a chat template expects."""
        tool, grammar = self.custom, self.grammar
        syntax, definition = (grammar.syntax, grammar.definition) if grammar else (None, "")
        return {"type": "function", "function": stand_in(tool.name, tool.description, syntax, definition)}


class FunctionReference(WireModel):
    """A function, referred to by its name."""

    name: FunctionName


class CustomToolReference(WireModel):
    """A custom tool, referred to by its name; as a tool choice it requires exactly one call of the tool."""

    type: Literal["custom"]
    custom: FunctionReference


class CustomCall(WireModel):
    """The custom tool that an earlier answer called, with its input text."""

    name: Name
    input: str


class CustomToolCall(WireModel):
    """A call of a custom tool in an assistant message; `index` is its index in a stream and has no effect."""

    id: Name
    type: Literal["custom"]
    custom: CustomCall
    index: Annotated[int, Field(ge=0)] | None = None

    def called(self) -> Call:
        """Convert to a call of the function that stands in for the tool, as a `Task` has it."""
        return Call(self.id, self.custom.name, custom_arguments(self.custom.input))
