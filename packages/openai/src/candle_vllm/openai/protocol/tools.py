# SPDX-License-Identifier: MIT
"""Wire types of functions, custom tools and the tool choice -> `ToolUse` (step 2 of a request's life)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec.structs import replace
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.json_rules import arguments_fault, in_json_types
from candle_vllm.core.sampling.structured import schema_of
from candle_vllm.openai.json_body import is_deeper
from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.custom_tools import (
    CustomTool,
    CustomToolReference,
    FunctionReference,
    kind_form,
)
from candle_vllm.openai.task import Choice, ToolFunction, ToolUse


def check_depth(schema: Any) -> Any:
    """Return a JSON schema unchanged; refuse one that is nested too deeply."""
    if is_deeper(schema, fields.MAX_SCHEMA_DEPTH):
        raise fields.invalid(
            "", f"is nested too deeply: a schema may have at most {fields.MAX_SCHEMA_DEPTH} levels; use $defs"
        )
    return schema


def check_arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a function's arguments unchanged; refuse an invalid one. Error paths are relative to it."""
    check_depth(schema)
    kind = schema.get("type", "object")
    if kind not in ("object", "dict"):
        raise fields.invalid("type", f"must be 'object', because arguments have names; it is {kind!r:.60}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise fields.invalid("properties", "must be an object that maps names to schemas")
    for name, property_schema in properties.items():
        if not isinstance(property_schema, (dict, bool)):
            raise fields.invalid(f"properties.{name:.80}", "must be a JSON schema: an object, true or false")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise fields.invalid("required", "must be a list of property names")
    fault = arguments_fault(schema)
    if fault is not None:
        raise fields.invalid(fault.path, fault.text)
    return schema


def plain_schema(given: Any) -> Any:
    """Convert a class, which a library caller may pass, to its schema; return anything else unchanged."""
    if not isinstance(given, type):
        return given
    try:
        return dict(schema_of(given))
    except InvalidParameterError as error:
        raise fields.invalid("", f"cannot be used: {str(error).removeprefix('structured_outputs: ')}") from None


Schema = Annotated[dict[str, Any], BeforeValidator(plain_schema), AfterValidator(check_depth)]
ArgumentsSchema = Annotated[dict[str, Any], AfterValidator(check_arguments)]


class FunctionDefinition(fields.WireModel):
    """A function that the model may call.

    Attributes:
        parameters: a JSON schema of type object; without it, or if it is empty, the function has no arguments.
        strict: whether the arguments always follow the schema, with any tool choice.
    """

    name: fields.FunctionName
    description: str | None = None
    parameters: ArgumentsSchema | None = None
    strict: bool | None = None

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = fields.NOT_DEFERRED


class Tool(fields.WireModel):
    """A function as a tool; `cache_control` has no effect, because every full block is cached."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
    cache_control: dict[str, Any] | None = None

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = fields.NOT_DEFERRED
    schema_path: ClassVar[str] = "function.parameters"
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_as_given(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Keep the order of the keys: templates print tools as JSON, and prompts must match the prefix cache."""
        tool = handler(data)
        if isinstance(data, dict):
            tool._given = data
        return tool

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        kind = data.get("type", "function")
        if isinstance(kind, str) and kind != "function":
            raise fields.unsupported("type", f"{kind!r:.60} tools are not supported, only 'function'")
        if "function" not in data and "name" in data:
            raise fields.invalid("function", "is required: put name, description, parameters and strict into it")

    @property
    def name(self) -> str:
        return self.function.name

    def shown(self) -> dict[str, Any]:
        """Return the tool for a chat template: keys in the caller's order, without nulls and cache marks."""
        given = self._given.get("function")
        function = given if isinstance(given, dict) else self.function.model_dump()
        known = FunctionDefinition.model_fields
        tool = {
            "type": self.type,
            "function": {key: value for key, value in function.items() if key in known and value is not None},
        }
        order = dict.fromkeys([*(key for key in self._given if key in tool), *tool])
        return {key: tool[key] for key in order}


def _served_tool(value: Any) -> Any:
    kind = fields.type_of(value)
    if isinstance(kind, str) and kind not in ("function", "custom"):
        raise fields.unsupported("type", f"{kind!r:.60} tools are not supported, only 'function' and 'custom'")
    return value


AnyTool = Annotated[
    Annotated[Tool, Tag("<function>")] | Annotated[CustomTool, Tag("<custom>")],
    Discriminator(kind_form),
    BeforeValidator(_served_tool),
]


class ToolReference(fields.WireModel):
    """A tool, referred to by its name; as a tool choice it requires exactly one call of the tool."""

    type: Literal["function"] = "function"
    function: FunctionReference

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        if data.get("type", "function") != "function":
            raise fields.invalid(
                "type",
                "must be 'function', 'custom' or 'allowed_tools'; 'none', 'auto' and 'required' are plain strings",
            )


AnyReference = Annotated[
    Annotated[ToolReference, Tag("<function>")] | Annotated[CustomToolReference, Tag("<custom>")],
    Discriminator(kind_form),
]


class AllowedTools(fields.WireModel):
    """A subset of the tools: with `auto` the model may call them, with `required` it must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AnyReference], Field(min_length=1, max_length=fields.MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(fields.WireModel):
    """OpenAI's choice that restricts the tools without changing the prompt."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_form(value: Any) -> str:
    if not isinstance(value, (dict, fields.WireModel)):
        return "<string>"
    return "<allowed>" if fields.type_of(value) == "allowed_tools" else kind_form(value)


# Tags in angle brackets are omitted from the paths in error messages.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[ToolReference, Tag("<function>")]
    | Annotated[CustomToolReference, Tag("<custom>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_choice_form),
]


def check_tools(tools: Iterable[tuple[str, str, Mapping[str, Any]]], schema_path: str = "function.parameters") -> None:
    """Refuse equal names, tools that are not JSON, and more than `MAX_TOOLS_SIZE`; error paths are relative to `tools`.

    Args:
        tools: for each tool, the path of its name (`0.function.name`), its name, and its form in the template.
        schema_path: path of the schema inside a tool.
    """
    numbers: dict[str, str] = {}
    size = 0
    for path, name, shown in tools:
        number = path.partition(".")[0]
        first = numbers.setdefault(name, number)
        if first != number:
            raise fields.invalid(path, f"must be unique, and tools.{first} is called {name!r} too")
        try:
            size += len(json.dumps(shown, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:  # Python objects that are not JSON
            raise fields.invalid(f"{number}.{schema_path}", f"must be JSON: {error}") from None
        if size > fields.MAX_TOOLS_SIZE:
            raise fields.invalid(
                "", f"have more than {fields.MAX_TOOLS_SIZE} characters of JSON; send fewer tools at once"
            )


def check_chat_tools(tools: Sequence[Tool | CustomTool]) -> Sequence[Tool | CustomTool]:
    """Apply `check_tools` to the tools of a chat request, and return them."""
    check_tools((f"{index}.{tool.type}.name", tool.name, tool.shown()) for index, tool in enumerate(tools))
    return tools


def tool_use(tools: Sequence[Tool | CustomTool], choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """Combine a request's three tool fields; raises the error that pydantic reports if they contradict each other."""
    functions = [_function(tool) for tool in tools]
    custom = custom_names(tools)
    chosen = read_choice(choice, [one.name for one in functions if one.name not in custom], custom)
    return chosen.among(functions, [tool.shown() for tool in tools], parallel=parallel)


def custom_names(tools: Sequence[Tool | CustomTool]) -> frozenset[str]:
    """Return the names of the custom tools."""
    return frozenset(tool.custom.name for tool in tools if isinstance(tool, CustomTool))


def read_choice(choice: ToolChoice | None, known: Collection[str], custom: Collection[str] = ()) -> Choice:
    """Convert the tool choice, given the names `known` of functions and `custom` of custom tools.

    Raises the error that pydantic reports if the choice names another tool.
    """
    if isinstance(choice, (ToolReference, CustomToolReference)):
        return Choice("required", named=_known(choice, known, custom, "tool_choice"))
    if isinstance(choice, AllowedToolsChoice):
        path = "tool_choice.allowed_tools.tools"
        names = {_known(one, known, custom, f"{path}.{i}") for i, one in enumerate(choice.allowed_tools.tools)}
        return Choice(choice.allowed_tools.mode, names)
    return Choice(choice or "auto")


def _known(
    reference: ToolReference | CustomToolReference, known: Collection[str], custom: Collection[str], path: str
) -> str:
    if isinstance(reference, ToolReference):
        kind, name, names = "function", reference.function.name, known
    else:
        kind, name, names = "custom", reference.custom.name, custom
    if name not in names:
        raise fields.invalid(f"{path}.{kind}.name", unknown_tool(name, names))
    return name


def unknown_tool(name: str, known: Collection[str]) -> str:
    """Return the message for a choice of a tool that is not in `known`."""
    if not known:
        return f"must name a tool of that type, and the request has no such tool: {name!r}"
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"the first of them is {next(iter(known))!r}"
    return f"must name one of the {len(known)} tools, not {name!r}; {advice}"


def _function(tool: Tool | CustomTool) -> ToolFunction:
    if isinstance(tool, CustomTool):
        names = ("name", "description", "parameters", "strict")
        made = function_of(*map(tool.shown()["function"].get, names))
        grammar = tool.grammar
        return replace(made, grammar=grammar.definition) if grammar and grammar.syntax == "lark" else made
    function = tool.function
    return function_of(function.name, function.description, function.parameters, function.strict)


def function_of(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None
) -> ToolFunction:
    """Build the function of a `Task`."""
    schema = {"type": "object", **(parameters or {"properties": {}, "additionalProperties": False})}
    return ToolFunction(name, description, in_json_types(schema), bool(strict))
