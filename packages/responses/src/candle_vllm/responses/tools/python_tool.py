# SPDX-License-Identifier: MIT
"""Python functions as tools: the signature becomes the schema, the docstring the description."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NotRequired, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_jsonable_python
from typing_extensions import TypedDict

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools import tool
from candle_vllm.responses.tools.names import is_tool_name
from candle_vllm.responses.tools.tool import MAX_TIMEOUT, ToolArgumentsError

_SECTION = re.compile(r"[A-Z][A-Za-z ]{0,30}:\s*$")
_DOCUMENTED = re.compile(r"\*{0,2}(\w+)\s*+(?:\([^)]*\)\s*+)?:\s*+(.*)$")
_MAX_FAULTS = 5


class Signature:
    """The parameters of a function.

    `schema` is the JSON schema of the arguments. Creation raises `InvalidParameterError` for parameters that cannot be
    given by name, or whose types are not JSON or cannot be resolved.
    """

    def __init__(self, function: Callable[..., Any], descriptions: Mapping[str, str], label: str) -> None:
        parameters = _parameters(function, label)
        hints = _hints(function, label)
        fields: dict[str, Any] = {}
        for name, parameter in parameters.items():
            hint = hints.get(name, Any)
            fields[name] = hint if parameter.default is inspect.Parameter.empty else NotRequired[hint]
        arguments: Any = cast("Any", TypedDict)("arguments", fields)  # a type checker accepts only literals
        arguments.__pydantic_config__ = ConfigDict(extra="forbid")
        try:
            self._adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(arguments)
            self.schema = self._adapter.json_schema(schema_generator=_Untitled)
            self._complete(parameters, descriptions)
        except (PydanticUserError, TypeError, ValueError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise InvalidParameterError(
                f"{label} cannot be a tool: its parameters have no JSON schema ({reason:.300})", "tools"
            ) from None

    def convert(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the arguments to the types of the parameters; ToolArgumentsError if one cannot be converted."""
        try:
            return self._adapter.validate_json(json.dumps(dict(arguments)))
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_FAULTS]
            told = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"[:300] for fault in faults)
            raise ToolArgumentsError(f"The arguments do not fit: {told}") from None

    def _complete(self, parameters: Mapping[str, inspect.Parameter], descriptions: Mapping[str, str]) -> None:
        """Add descriptions and defaults, which are not in the types."""
        self.schema.pop("title", None)
        shown = self.schema.setdefault("properties", {})  # by alias, if a parameter has one
        names = self._adapter.json_schema(by_alias=False, schema_generator=_Untitled).get("properties", ())
        for name, schema in zip(names, shown.values(), strict=True):
            parameter = parameters[name]
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


MAX_THREADS = 64  # threads of one tool, including calls that timed out; the maximum of `parallel_tools`, too


def function_tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
) -> tool.Tool:
    """Make a tool of a Python function.

    The schema comes from the annotations: whatever pydantic supports, also nested dataclasses and models, `Literal`,
    and `Annotated[..., Field(description=...)]`; a parameter without annotation accepts any JSON. The docstring's first
    paragraph describes the tool, its "Args:" in Google's style the parameters. A returned text or `ToolOutput` is used
    unchanged, None is no output, other values become JSON. The model sees the message of a raised `ToolError`.

    An async function runs on the event loop, and ends when it is cancelled. A plain function runs in a thread, which
    cannot be stopped: after a timeout, the model learns that the call timed out, and the thread continues. While
    `MAX_THREADS` threads of the tool run, the tool is unavailable.

    Args:
        function: function whose parameters can be given by name; another one raises InvalidParameterError.
        name: name that the model uses; the function's own by default.
        description: purpose of the tool; the docstring's first paragraph by default.
        timeout: seconds for a call if the conversation sets no timeout; None means 60.
    """
    return PythonTool(function, name=name, description=description, timeout=timeout)


class PythonTool:
    """A Python function that a model may call; `function_tool` makes it."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | None = None,
    ) -> None:
        own, label = _named(function, name)
        if timeout is not None and not 0 < timeout <= MAX_TIMEOUT:
            raise InvalidParameterError(
                f"the timeout of {label} must lie between 0 and {MAX_TIMEOUT:g} seconds, not {timeout!r:.40}", "timeout"
            )
        summary, descriptions = describe(function.func if isinstance(function, partial) else function)
        self._function = function
        called = getattr(function, "__call__", None)  # noqa: B004
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
        self._signature = Signature(function, descriptions, label)
        self._threads = 0
        self._lock = threading.Lock()
        self.timeout = timeout
        self.definition = tool.ToolDefinition(
            name=own,
            description=summary if description is None else description,
            parameters=self._signature.schema,
            original_name=own,
        )

    async def run(self, arguments: Mapping[str, Any], report: tool.Report) -> tool.ToolOutput:  # noqa: ARG002 it reports nothing
        values = self._signature.convert(arguments)
        value = await self._function(**values) if self._is_async else await self._in_thread(values)
        if inspect.isawaitable(value):  # a plain function that calls an async one
            value = await value
        return _output(value)

    async def _in_thread(self, values: dict[str, Any]) -> Any:
        """Call the function in a daemon thread, so that one that hangs does not keep the program from ending."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not answer.done():
                answer.set_result((value, error))

        def work() -> None:
            value, failure = None, None
            try:
                value = context.run(self._function, **values)
            except BaseException as error:
                failure = error
            finally:
                with self._lock:
                    self._threads -= 1
            try:
                loop.call_soon_threadsafe(settle, value, failure)
            except RuntimeError:
                return  # the loop is closed, so nobody waits for the result

        context = contextvars.copy_context()
        self._start(work)
        value, error = await answer
        if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):  # signals never reach a thread
            raise RuntimeError(f"{type(error).__name__} in a thread") from error
        if error is not None:
            raise error
        return value

    def _start(self, work: Callable[[], None]) -> None:
        name = self.definition.name
        with self._lock:
            if self._threads >= MAX_THREADS:
                raise tool.ToolUnavailableError(
                    f"{self._threads} earlier calls of this tool still run: try again later."
                )
            self._threads += 1
        try:
            threading.Thread(target=work, name=f"candle-vllm-tool-{name}", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._threads -= 1
            raise tool.ToolUnavailableError("There are too many threads: try again later.") from None


def _named(function: Callable[..., Any], name: str | None) -> tuple[str, str]:
    """Return the tool's name, and a text that names the function in error messages."""
    own = name if name is not None else getattr(function, "__name__", None)
    label = f"the function {getattr(function, '__qualname__', own)!r:.100}"
    if not callable(function):
        raise InvalidParameterError(f"a {type(function).__name__} cannot be a tool: give a function", "tools")
    if own is None or not is_tool_name(own):
        raise InvalidParameterError(
            f"{label} cannot be a tool under the name {own!r:.100}: give it a name of 1 to 64 letters, digits, '_' and "
            "'-' (name=...)",
            "tools",
        )
    target = function.func if isinstance(function, partial) else function
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise InvalidParameterError(f"{label} cannot be a tool: it is a generator; return the whole result", "tools")
    return own, label


def _output(value: Any) -> tool.ToolOutput:
    if isinstance(value, tool.ToolOutput):
        return value
    if value is None:
        return tool.ToolOutput()
    if isinstance(value, str):
        return tool.ToolOutput.of_text(str(value))
    try:
        structured = to_jsonable_python(value, inf_nan_mode="null")
        text = json.dumps(structured, ensure_ascii=False)
    except (PydanticSerializationError, TypeError, ValueError, RecursionError):
        raise tool.ToolError(
            f"The tool failed: it returned a {type(value).__name__:.100}, which is not JSON."
        ) from None
    return tool.ToolOutput(content=(tool.ContentPart(kind="text", text=text),), structured=structured)
