"""Wire types of tools and of the choice among them, and what they say in one piece (step 2)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

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
from candle_vllm.openai.protocol.fields import (
    MAX_SCHEMA_DEPTH,
    MAX_TOOL_NAME,
    MAX_TOOLS,
    MAX_TOOLS_SIZE,
    Refusal,
    WireModel,
    invalid,
    unsupported,
)
from candle_vllm.openai.task import Choice, ToolFunction, ToolUse

_NAME = re.compile(rf"[a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME}}}")
_NOT_DEFERRED = {"defer_loading": Refusal("every tool is shown to the model from the start", (False,))}


def check_name(name: str) -> str:
    """OpenAI's rule for the names of functions and schemas."""
    if not _NAME.fullmatch(name):
        raise invalid(
            "",
            f"must be 1 to {MAX_TOOL_NAME} of the characters a-z, A-Z, 0-9, _ and -, which is OpenAI's rule for names; "
            f"{name!r:.80} is not: rename it, and map the name back when it is called",
        )
    return name


FunctionName = Annotated[str, AfterValidator(check_name)]


def check_depth(schema: Any) -> Any:
    """A JSON schema as it is; refuses one whose parts lie too deep inside each other."""
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise invalid("", f"is nested too deeply: a schema may have at most {MAX_SCHEMA_DEPTH} levels; use $defs")
    return schema


def check_arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments as it is; refuses what cannot be one, with paths that begin below it."""
    check_depth(schema)
    kind = schema.get("type", "object")
    if kind not in ("object", "dict"):
        raise invalid("type", f"must be 'object', because arguments have names; it is {kind!r:.60}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise invalid("properties", "must be an object that maps names to schemas")
    for name, property_schema in properties.items():
        if not isinstance(property_schema, (dict, bool)):
            raise invalid(f"properties.{name:.80}", "must be a JSON schema: an object, true or false")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise invalid("required", "must be a list of property names")
    fault = arguments_fault(schema)
    if fault is not None:
        raise invalid(fault.path, fault.text)
    return schema


def plain_schema(given: Any) -> Any:
    """A class, which a library may give, as its schema; anything else as it is."""
    if not isinstance(given, type):
        return given
    try:
        return dict(schema_of(given))
    except InvalidParameterError as error:
        raise invalid("", f"cannot be used: {str(error).removeprefix('structured_outputs: ')}") from None


Schema = Annotated[dict[str, Any], BeforeValidator(plain_schema), AfterValidator(check_depth)]
ArgumentsSchema = Annotated[dict[str, Any], AfterValidator(check_arguments)]


class FunctionDefinition(WireModel):
    """A function that the model may call.

    Attributes:
        parameters: a JSON schema of type object; absent or empty means that there are no arguments.
        strict: the arguments always follow the schema, whatever the choice of tools is.
    """

    name: FunctionName
    description: str | None = None
    parameters: ArgumentsSchema | None = None
    strict: bool | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = _NOT_DEFERRED


class Tool(WireModel):
    """A tool: a function. The cache mark has no effect, because every full block is cached."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
    cache_control: dict[str, Any] | None = None

    refused_fields: ClassVar[Mapping[str, Refusal]] = _NOT_DEFERRED
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_as_given(cls, data: Any, handler: ModelWrapValidatorHandler[Tool]) -> Tool:
        """Templates print tools as JSON, so the order of the names matters to the prompt and to the prefix cache."""
        tool = handler(data)
        if isinstance(data, dict):
            tool._given = data
        return tool

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Names other types of tools, and the form that other routes have."""
        kind = data.get("type", "function")
        if isinstance(kind, str) and kind != "function":
            raise unsupported("type", f"{kind!r:.60} tools are not served, only 'function'")
        if "function" not in data and "name" in data:
            raise invalid("function", "is required: put name, description, parameters and strict into it")

    def shown(self) -> dict[str, Any]:
        """The tool for a chat template: the caller's names in the caller's order, without nulls and cache marks."""
        given = self._given.get("function")
        function = given if isinstance(given, dict) else self.function.model_dump()
        known = FunctionDefinition.model_fields
        tool = {
            "type": self.type,
            "function": {key: value for key, value in function.items() if key in known and value is not None},
        }
        order = dict.fromkeys([*(key for key in self._given if key in tool), *tool])
        return {key: tool[key] for key in order}


class FunctionReference(WireModel):
    """A function by its name."""

    name: FunctionName


class ToolReference(WireModel):
    """A tool by its name; as a choice, exactly one call of it."""

    type: Literal["function"] = "function"
    function: FunctionReference

    @classmethod
    def check_kind(cls, data: dict[str, Any]) -> None:
        """Says what else a choice may be."""
        kind = data.get("type", "function")
        if isinstance(kind, str) and kind == "custom":
            raise unsupported("type", "custom tools are not served, only 'function'")
        if kind != "function":
            raise invalid(
                "type", "must be 'function' or 'allowed_tools'; 'none', 'auto' and 'required' are plain strings"
            )


class AllowedTools(WireModel):
    """Some of the tools: `auto` may call them, `required` must."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(WireModel):
    """OpenAI's way to narrow the tools down without changing the prompt."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_form(value: Any) -> str:
    if not isinstance(value, (dict, WireModel)):
        return "<string>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "<allowed>" if kind == "allowed_tools" else "<function>"


# Tags in angle brackets are left out of the paths in error messages.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[ToolReference, Tag("<function>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_choice_form),
]


def check_tools(
    tools: Iterable[tuple[int, str, Mapping[str, Any]]],
    name_path: str = "function.name",
    schema_path: str = "function.parameters",
) -> None:
    """Refuses tools with equal names, and more text than a prompt can hold; the paths begin below `tools`.

    Args:
        tools: the place of each, its name, and what the template is shown of it.
        name_path, schema_path: where a tool has its name and its schema.
    """
    places: dict[str, int] = {}
    size = 0
    for number, name, shown in tools:
        first = places.setdefault(name, number)
        if first != number:
            raise invalid(f"{number}.{name_path}", f"must be unique, and tools.{first} is called {name!r} too")
        try:
            size += len(json.dumps(shown, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:  # objects of Python that are no JSON
            raise invalid(f"{number}.{schema_path}", f"must be JSON: {error}") from None
        if size > MAX_TOOLS_SIZE:
            raise invalid("", f"have more than {MAX_TOOLS_SIZE} characters of JSON; send fewer tools at once")


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """The three fields as one; raises the error that pydantic reports where they contradict each other."""
    functions = [_function(tool) for tool in tools or ()]
    if not functions and choice not in (None, "none") and not (choice == "auto" and tools is not None):
        raise invalid("tool_choice", "needs tools: there is nothing to choose from")
    chosen = read_choice(choice, [function.name for function in functions])
    return chosen.among(functions, [tool.shown() for tool in tools or ()], parallel=parallel)


def read_choice(choice: ToolChoice | None, known: Collection[str]) -> Choice:
    """The choice among tools of the names `known`; raises the error that pydantic reports where it names another."""
    if isinstance(choice, ToolReference):
        return Choice("required", named=_known(choice, known, "tool_choice"))
    if isinstance(choice, AllowedToolsChoice):
        place = "tool_choice.allowed_tools.tools"
        names = {_known(one, known, f"{place}.{i}") for i, one in enumerate(choice.allowed_tools.tools)}
        return Choice(choice.allowed_tools.mode, names)
    return Choice(choice or "auto")


def _known(reference: ToolReference, known: Collection[str], place: str) -> str:
    name = reference.function.name
    if name not in known:
        raise invalid(f"{place}.function.name", unknown_tool(name, known))
    return name


def unknown_tool(name: str, known: Collection[str]) -> str:
    """What is wrong with a choice of a tool that is none of `known`."""
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"the first of them is {next(iter(known))!r}"
    return f"must name one of the {len(known)} tools, not {name!r}; {advice}"


def _function(tool: Tool) -> ToolFunction:
    function = tool.function
    return function_of(function.name, function.description, function.parameters, function.strict)


def function_of(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None
) -> ToolFunction:
    """A function as it stands in a task."""
    schema = {"type": "object", **(parameters or {"properties": {}, "additionalProperties": False})}
    return ToolFunction(name, description, in_json_types(schema), bool(strict))
