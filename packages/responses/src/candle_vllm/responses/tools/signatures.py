# SPDX-License-Identifier: MIT
"""Description of a Python function: its signature as a JSON schema, and its docstring in Google's style."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_jsonable_python
from typing_extensions import TypedDict

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.tool import ToolArgumentsError

_SECTION = re.compile(r"[A-Z][A-Za-z ]{0,30}:\s*$")
_DOCUMENTED = re.compile(r"\*{0,2}(\w+)\s*+(?:\([^)]*\)\s*+)?:\s*+(.*)$")
_MAX_FAULTS = 5


class Signature:
    """The parameters of a function.

    `schema` is the JSON schema of the arguments. Creation raises `InvalidParameterError` for parameters that cannot be
    given by name, or whose types are not JSON.
    """

    def __init__(self, function: Callable[..., Any], descriptions: Mapping[str, str], label: str) -> None:
        parameters = _parameters(function, label)
        hints = _hints(function, label)
        fields: dict[str, Any] = {}
        for name, parameter in parameters.items():
            hint = hints.get(name, Any)
            fields[name] = hint if parameter.default is inspect.Parameter.empty else NotRequired[hint]
        make: Any = TypedDict  # a type checker accepts only literals here
        arguments = make("arguments", fields)
        arguments.__pydantic_config__ = ConfigDict(extra="forbid")
        try:
            self._adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(arguments)
            self.schema = self._adapter.json_schema(schema_generator=_Untitled)
        except (PydanticUserError, TypeError, ValueError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise InvalidParameterError(
                f"{label} cannot be a tool: its parameters have no JSON schema ({reason:.300})", "tools"
            ) from None
        self._complete(parameters, descriptions)

    def convert(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the arguments to the types of the parameters; missing arguments are left out.

        Raises:
            ToolArgumentsError: an argument cannot be converted.
        """
        try:
            return self._adapter.validate_json(json.dumps(dict(arguments)))
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_FAULTS]
            told = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"[:300] for fault in faults)
            raise ToolArgumentsError(f"The arguments do not fit: {told}") from None

    def _complete(self, parameters: Mapping[str, inspect.Parameter], descriptions: Mapping[str, str]) -> None:
        """Add descriptions and defaults, which are not in the types."""
        self.schema.pop("title", None)
        self.schema.setdefault("properties", {})
        for name, parameter in parameters.items():
            schema = self.schema["properties"][name]
            if descriptions.get(name):
                schema.setdefault("description", descriptions[name])
            if parameter.default is not inspect.Parameter.empty and "default" not in schema:
                try:
                    schema["default"] = to_jsonable_python(parameter.default, inf_nan_mode="null")
                except (PydanticSerializationError, ValueError, RecursionError):
                    continue  # a default that is not JSON is left out of the schema


class _Untitled(GenerateJsonSchema):
    """Generates schemas without titles, which repeat the names and cost tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def _parameters(function: Callable[..., Any], label: str) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise InvalidParameterError(f"{label} cannot be a tool: its signature cannot be read", "tools") from None
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InvalidParameterError(
                f"{label} cannot be a tool: models pass arguments by name, and {parameter} cannot be passed by name; "
                "use named parameters",
                "tools",
            )
    return parameters


def _hints(function: Callable[..., Any], label: str) -> dict[str, Any]:
    target: Any = function
    while hasattr(target, "func"):  # functools.partial
        target = target.func
    if not inspect.isroutine(target):
        target = type(target).__call__
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise InvalidParameterError(
            f"{label} cannot be a tool: its annotations cannot be resolved ({error}); import the types at the top of "
            "its module",
            "tools",
        ) from None


def describe(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the docstring's first paragraph on one line, and the descriptions of its "Args:" by parameter."""
    lines = (inspect.getdoc(function) or "").splitlines()
    first: list[str] = []
    for line in lines:
        if not line.strip() or _SECTION.match(line):
            break
        first.append(line.strip())
    return " ".join(first), _documented(lines)


def _documented(lines: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    inside = False
    current: list[str] | None = None
    indent: int | None = None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if depth == 0 and line.strip():
            inside = line.strip() in ("Args:", "Arguments:", "Parameters:")
            current, indent = None, None
        elif inside and line.strip():
            indent = depth if indent is None else indent
            parameter = _DOCUMENTED.match(line.strip()) if depth <= indent else None
            if parameter is not None:
                current = found[parameter[1]] = [parameter[2]]
            elif current is not None:
                current.append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in found.items()}
