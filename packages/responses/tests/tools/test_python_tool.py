# SPDX-License-Identifier: MIT
"""Python functions as tools."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.python_tool import MAX_THREADS, function_tool
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import (
    ContentPart,
    ToolArgumentsError,
    ToolError,
    ToolOutput,
    ToolResult,
    ToolUnavailableError,
)
from packages.responses.tests.tools.tools_fakes import call, execute
from tests.waiting import until


@dataclass
class Point:
    x: int
    y: float = 0.0


class Place(BaseModel):
    name: str
    at: Point


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Options(TypedDict):
    deep: bool


def run(function: Callable[..., Any], **arguments: Any) -> ToolOutput:
    return asyncio.run(function_tool(function, name="t").run(arguments, lambda _: None))


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(function_tool(function, name="t").definition.parameters)


def everything(
    place: Place,
    unit: Literal["km", "mi"],
    day: date,
    colour: Colour,
    count: Annotated[int, Field(description="how many", ge=1)] = 3,
    tags: list[str] = [],  # noqa: B006 a default that the schema shows
    *,
    limit: Optional[float] = None,  # noqa: UP045 the older form
    extra: dict[str, int] | None = None,
    options: Options | None = None,
    anything=None,
) -> str:
    """Says what it was
    given.

    And more.

    Args:
        place: where.
        unit (str): of length.
        count: not shown, the annotation says more.
    """
    kinds = [type(value).__name__ for value in (place, place.at, unit, day, colour, count, tags)]
    return " ".join([*kinds, f"{limit} {extra} {options} {anything}"])


def test_the_definition() -> None:
    definition = function_tool(everything).definition
    assert (definition.name, definition.original_name, definition.server) == ("everything", "everything", None)
    assert definition.description == "Says what it was given."
    schema = definition.parameters
    properties = schema["properties"]
    assert schema["required"] == ["place", "unit", "day", "colour"]
    assert schema["additionalProperties"] is False
    assert properties["place"]["description"] == "where."
    assert properties["unit"] == {"enum": ["km", "mi"], "type": "string", "description": "of length."}
    assert properties["count"] == {"description": "how many", "minimum": 1, "type": "integer", "default": 3}
    assert properties["tags"] == {"items": {"type": "string"}, "type": "array", "default": []}
    assert properties["limit"] == {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None}
    assert properties["anything"] == {"default": None}
    assert schema["$defs"]["Place"]["properties"]["at"] == {"$ref": "#/$defs/Point"}
    assert "title" not in json.dumps(properties)
    named = function_tool(everything, name="other", description="says", timeout=5).definition
    assert (named.name, named.description) == ("other", "says")


async def test_arguments_are_checked_and_converted() -> None:
    registry = ToolRegistry([everything])
    good = {
        "place": {"name": "A", "at": {"x": 1}},
        "unit": "km",
        "day": "2026-01-02",
        "colour": "red",
        "extra": {"a": 1},
        "options": {"deep": True},
    }
    result = await execute(registry, call("everything", json.dumps(good)))
    assert isinstance(result, ToolResult)
    assert result.status == "completed"
    assert result.text == "Place Point str date Colour int list None {'a': 1} {'deep': True} None"
    for wrong, told in (
        ({"unit": "m"}, "unit: 'm' is not one of"),
        ({"place": {"name": "A"}}, "place: 'at' is a required property"),
        ({"count": 0}, "count: 0 is less than"),
        ({"other": 1}, "'other' was unexpected"),
        ({"day": "someday"}, "day: Input should be a valid date"),
    ):
        result = await execute(registry, call("everything", json.dumps({**good, **wrong})))
        assert isinstance(result, ToolResult)
        assert result.status == "invalid_arguments"
        assert told in result.text


@pytest.mark.parametrize("name", ["schema", "json", "model_config", "_private", "self_", "class_", "copy"])
def test_any_name_of_a_parameter(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def f({name}: int): return {name}", namespace)
    assert list(parameters(namespace["f"])["properties"]) == [name]
    assert run(namespace["f"], **{name: 3}).structured == 3


def test_an_alias_is_the_name_that_the_model_knows() -> None:
    def count(number: Annotated[int, Field(alias="n")] = 2, hidden: SkipJsonSchema[int] = 1, plain: int = 0) -> int:
        """Count.

        Args:
            number: how many.
            plain: more.
        """
        return number + hidden + plain

    assert parameters(count)["properties"] == {
        "n": {"type": "integer", "description": "how many.", "default": 2},
        "plain": {"type": "integer", "description": "more.", "default": 0},
    }
    assert run(count, n=3, plain=1).structured == 5
    with pytest.raises(ToolArgumentsError, match="number: Extra inputs are not permitted"):
        run(count, number=3)

    def twins(a: Annotated[int, Field(alias="n")], b: Annotated[int, Field(alias="n")]) -> int:
        return a + b

    with pytest.raises(InvalidParameterError, match="twins"):
        function_tool(twins)


def test_no_parameters() -> None:
    assert parameters(lambda: 1) == {"additionalProperties": False, "properties": {}, "type": "object"}


class Service:
    """Something with methods."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def times(self, number: int) -> int:
        """Multiplies."""
        return self.factor * number

    @staticmethod
    def half(number: int) -> float:
        return number / 2

    def __call__(self, number: int) -> int:
        return number


def test_methods_partials_and_objects() -> None:
    service = Service(3)
    assert list(parameters(service.times)["properties"]) == ["number"]
    assert function_tool(service.times).definition.description == "Multiplies."
    assert run(service.times, number=2).structured == 6
    assert run(Service.half, number=3).structured == 1.5
    assert run(service, number=2).structured == 2
    partial = functools.partial(service.times, number=4)
    assert parameters(partial)["properties"]["number"]["default"] == 4
    assert run(partial).structured == 12
    with pytest.raises(InvalidParameterError, match="give it a name"):
        function_tool(partial)


def test_recursive_types_and_postponed_annotations() -> None:
    assert parameters(everything)["properties"]["place"]["$ref"] == "#/$defs/Place"
    schema = parameters(walk)
    assert schema["$defs"]["Tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    assert run(walk, tree={"children": [{"children": []}]}).structured == 2


class Tree(BaseModel):
    children: list[Tree]


def walk(tree: Tree) -> int:
    return 1 + sum(walk(child) for child in tree.children)


def variadic(*values: int) -> None: ...


def keywords(**values: int) -> None: ...


def positional(value: int, /) -> None: ...


def unresolved(value: Missing) -> None: ...  # noqa: F821


def callback(value: Callable[[], int]) -> None: ...


def opaque(value: threading.Thread) -> None: ...


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (variadic, r"'variadic' cannot be a tool: models pass arguments by name, and \*values"),
        (keywords, r"\*\*values"),
        (positional, "cannot be passed by name"),
        (unresolved, "annotations cannot be resolved .*Missing"),
        (callback, "its parameters have no JSON schema"),
        (opaque, "its parameters have no JSON schema"),
        (generator, "it is a generator"),
        (async_generator, "it is a generator"),
        (lambda: 1, "under the name '<lambda>'"),
        (3, "a int cannot be a tool: give a function"),
        (dict.fromkeys, "cannot be a tool"),
    ],
)
def test_functions_that_cannot_be_tools(function: Any, told: str) -> None:
    with pytest.raises(InvalidParameterError, match=told):
        function_tool(function)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), 86_401])
def test_timeouts(timeout: float) -> None:
    with pytest.raises(InvalidParameterError, match="the timeout of the function 'walk' must lie between"):
        function_tool(walk, timeout=timeout)


@pytest.mark.parametrize(
    ("value", "text", "structured"),
    [
        ("plain", "plain", None),
        (None, None, None),
        (3, "3", 3),
        (False, "false", False),
        ([1, "é"], '[1, "é"]', [1, "é"]),
        (
            Place(name="A", at=Point(1)),
            '{"name": "A", "at": {"x": 1, "y": 0.0}}',
            {"name": "A", "at": {"x": 1, "y": 0.0}},
        ),
        (date(2026, 1, 2), '"2026-01-02"', "2026-01-02"),
        (float("nan"), "null", None),
    ],
)
def test_what_is_returned(value: Any, text: str | None, structured: Any) -> None:
    output = run(lambda: value)
    assert output == ToolOutput(
        content=() if text is None else (ContentPart(kind="text", text=text),), structured=structured
    )


def test_outputs_stay_as_they_are() -> None:
    output = ToolOutput.of_text("no", is_error=True)
    assert run(lambda: output) is output


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("function", [circular, lambda: object(), lambda: b"\xff", lambda: threading.Lock()])
def test_values_that_are_no_json(function: Callable[[], Any]) -> None:
    with pytest.raises(ToolError, match="which is not JSON"):
        run(function)


def test_its_own_argument_errors() -> None:
    with pytest.raises(ToolArgumentsError, match="number: Input should be a valid integer"):
        run(Service(1).times, number="x")


async def test_async_functions_run_on_the_loop_and_others_do_not() -> None:
    async def on_loop() -> bool:
        return threading.current_thread() is threading.main_thread()

    def in_thread() -> list[Any]:
        return [threading.current_thread() is threading.main_thread(), threading.current_thread().name, variable.get()]

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("seen")
    assert (await function_tool(on_loop).run({}, lambda _: None)).structured is True
    output = await function_tool(in_thread).run({}, lambda _: None)
    assert output.structured == [False, "candle-vllm-tool-in_thread", "seen"]


async def test_a_plain_function_that_returns_an_awaitable() -> None:
    async def inner() -> str:
        return "awaited"

    output = await function_tool(lambda: inner(), name="outer").run({}, lambda _: None)
    assert output.content[0].text == "awaited"


async def test_threads_that_hang_are_counted() -> None:
    gate = threading.Event()
    registry = ToolRegistry()
    tool = registry.add_function(gate.wait, name="hang", timeout=0.01)
    try:
        for _ in range(MAX_THREADS):
            result = await execute(registry, call("hang"))
            assert isinstance(result, ToolResult)
            assert result.status == "timed_out"
        result = await execute(registry, call("hang"))
        assert isinstance(result, ToolResult)
        assert (result.status, result.text) == (
            "unavailable", f"{MAX_THREADS} earlier calls of this tool still run: try again later.",
        )  # fmt: skip
        with pytest.raises(ToolUnavailableError):
            await tool.run({}, lambda _: None)
    finally:
        gate.set()
    await until(lambda: all(thread.name != "candle-vllm-tool-hang" for thread in threading.enumerate()))
    result = await execute(registry, call("hang"))
    assert isinstance(result, ToolResult)
    assert result.status == "completed"


def test_a_hanging_thread_does_not_hold_up_the_loops_end() -> None:
    gate = threading.Event()

    async def main() -> str:
        registry = ToolRegistry()
        registry.add_function(gate.wait, name="hang", timeout=0.01)
        result = await execute(registry, call("hang"))
        assert isinstance(result, ToolResult)
        return result.status

    assert asyncio.run(main()) == "timed_out"
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "candle-vllm-tool-hang"]
    gate.set()  # it ends after its loop has been closed
    thread.join()
