# SPDX-License-Identifier: MIT
"""One call of a tool never raises for what the tool does, and leaves nothing running."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools import execution
from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.execution import MAX_ARGUMENTS, MAX_OUTPUT, Checked, check, run
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import (
    ContentPart,
    Report,
    ToolArgumentsError,
    ToolCall,
    ToolDefinition,
    ToolError,
    ToolOutput,
    ToolProgress,
    ToolResult,
    ToolTimedOutError,
    ToolUnavailableError,
)
from packages.responses.tests.tools.tools_fakes import FakeTool, call, execute
from tests.waiting import until

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


async def done(registry: ToolRegistry, asked: ToolCall, **options: Any) -> ToolResult:
    result = await execute(registry, asked, **options)
    assert isinstance(result, ToolResult)
    assert result.call == asked
    assert result.text
    return result


def doing(work: Callable[[Mapping[str, Any], Report], Awaitable[Any]], **fields: Any) -> ToolRegistry:
    return ToolRegistry([FakeTool("fake", work, **fields)])


def raising(error: BaseException) -> ToolRegistry:
    async def work(*_: object) -> ToolOutput:
        raise error

    return doing(work)


@pytest.fixture(autouse=True)
async def nothing_left() -> Any:
    yield
    await asyncio.sleep(0)
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("tool ")] == []


async def test_the_whole_way() -> None:
    async def work(arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        report(ToolProgress(progress=1, total=2))
        return ToolOutput.of_text(json.dumps(arguments))

    seen: list[ToolProgress] = []
    registry = ToolRegistry([FakeTool("s__fake", work, server="s", parameters=SCHEMA)])
    result = await done(registry, call("s__fake", '{"n": 3}'), report=seen.append)
    assert (result.status, result.server, result.text) == ("completed", "s", '{"n": 3}')
    assert result.output == ToolOutput.of_text('{"n": 3}')
    assert 0 <= result.seconds < 5
    assert seen == [ToolProgress(progress=1, total=2)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wether", "There is no tool 'wether'. Did you mean weather?"),
        ("", "There is no tool ''. Use only the tools that you were given."),
        ("x" * 100_000, "Use only the tools"),
    ],
)
async def test_invented_tools(name: str, told: str) -> None:
    result = await done(ToolRegistry([FakeTool("weather"), FakeTool("time")]), call(name))
    assert result.status == "unknown"
    assert result.output.is_error
    assert told in result.text
    assert len(result.text) < 300


@pytest.mark.parametrize("text", ["", "  \n", "{}"])
async def test_no_arguments(text: str) -> None:
    assert (await done(ToolRegistry([FakeTool()]), call("fake", text))).status == "completed"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "The JSON of the arguments is not valid JSON"),
        ("[1]", "must be one JSON object"),
        ("null", "must be one JSON object"),
        ('"x"', "must be one JSON object"),
        ('{"n": 1, "n": 2}', "'n' appears twice"),
        ('{"n": NaN}', "NaN is not a JSON number"),
        ('{"n": 1}{', "not valid JSON"),
        ('{"n":' * 100 + "1" + "}" * 100, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": "\\ud800"}', "surrogate"),
        ('{"n": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"n": "' + "x" * MAX_ARGUMENTS + '"}', "1048576 are allowed"),
        ('{"n": "x"}', "do not fit the tool's schema: n: 'x' is not of type 'integer'"),
        ("{}", "'n' is a required property"),
        ('{"n": 1, "m": 2}', "'m' was unexpected"),
    ],
)
async def test_wrong_arguments(text: str, told: str) -> None:
    result = await done(ToolRegistry([FakeTool(parameters=SCHEMA)]), call("fake", text))
    assert result.status == "invalid_arguments"
    assert told in result.text
    assert len(result.text) < 1000


async def test_a_schema_that_cannot_be_used_stops_nothing() -> None:
    registry = ToolRegistry([FakeTool(parameters={"type": "object", "allOf": [{"$ref": "#"}]})])
    assert (await done(registry, call())).status == "completed"


async def test_checking_does_not_hold_up_the_loop() -> None:
    names = [f"d{number}" for number in range(40)]
    defs: dict[str, Any] = {a: {"anyOf": [{"$ref": f"#/$defs/{b}"}] * 2} for a, b in pairwise(names)}
    schema = {"type": "object", "$ref": "#/$defs/d0", "$defs": {**defs, "d39": {"required": ["z"]}}}
    checking = asyncio.create_task(done(ToolRegistry([FakeTool(parameters=schema)]), call()))
    turns = 0
    while not checking.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 3  # a second, in which the thread that checks gives way at least each 0.1 s
    assert checking.result().status == "completed"


async def test_approval() -> None:
    registry = ToolRegistry([FakeTool()])
    asked: list[tuple[ToolCall, ToolDefinition]] = []

    def answering(answer: Any) -> Any:
        async def ask(asked_call: ToolCall, definition: ToolDefinition) -> Approval:
            asked.append((asked_call, definition))
            return answer

        return ask

    assert (await done(registry, call(), approval="never")).status == "completed"
    assert (await done(registry, call(), approval={"fake": "never"})).status == "completed"
    assert (await done(registry, call(), approval=answering(Approval.ALLOW))).status == "completed"
    refused = await done(registry, call(), approval=answering(Approval.DENY))
    assert (refused.status, refused.output.is_error) == ("denied", True)
    assert "did not agree" in refused.text
    assert [definition.name for _, definition in asked] == ["fake", "fake"]
    waiting = await execute(registry, call(), approval="always")
    assert isinstance(waiting, Checked)
    assert (await run(waiting)).status == "completed"
    assert (await done(registry, call("none"), approval="always")).status == "unknown"  # nobody is asked for nothing
    assert (await done(registry, call(), approval=lambda *_: Approval.ALLOW)).status == "completed"
    assert (await done(registry, call(), approval=answering("deny"))).status == "denied"


@pytest.mark.parametrize("answer", [False, None, "no", 1, "ALLOW"])
async def test_an_approval_that_is_no_answer_lets_nothing_run(answer: Any) -> None:
    async def work(*_: object) -> ToolOutput:
        raise AssertionError("it ran")

    with pytest.raises(InvalidParameterError, match="approval callback must return") as caught:
        await execute(doing(work), call(), approval=lambda *_: answer)
    assert caught.value.param == "approval"


async def test_a_flood_of_structured_output() -> None:
    async def work(*_: object) -> ToolOutput:
        return ToolOutput(structured={"data": "x" * MAX_OUTPUT})

    assert "are allowed: ask for less" in (await done(doing(work), call())).text


class Mute(ToolError):
    def __str__(self) -> str:
        raise LookupError("no words")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ToolError("no such city"), "failed", "no such city"),
        (ToolError(), "failed", "The tool failed."),
        (ToolUnavailableError("gone"), "unavailable", "gone"),
        (ToolTimedOutError("slow"), "timed_out", "slow"),
        (ToolArgumentsError("odd"), "invalid_arguments", "odd"),
        (ValueError("password=hush"), "failed", "The tool failed (ValueError)."),
        (TimeoutError(), "failed", "The tool failed (TimeoutError)."),
        (StopIteration(), "failed", "The tool failed (RuntimeError)."),
        (RecursionError(), "failed", "The tool failed (RecursionError)."),
        (SystemExit(3), "failed", "The tool failed (SystemExit)."),
        (GeneratorExit(), "failed", "The tool failed (GeneratorExit)."),
        (BaseException("odd"), "failed", "The tool failed (BaseException)."),
        (BaseExceptionGroup("many", [SystemExit()]), "failed", "The tool failed (BaseExceptionGroup)."),
        (Mute(), "failed", "The tool failed (Mute)."),
        (asyncio.CancelledError(), "failed", "The tool failed: it cancelled itself."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_tools_that_raise(error: BaseException, status: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = await done(raising(error), call())
    assert (result.status, result.text, result.output.is_error) == (status, text, True)
    assert "hush" not in result.text
    assert ("hush" in caplog.text) == isinstance(error, ValueError)  # the log has the details
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration("x")])
async def test_functions_that_raise_in_their_thread(error: BaseException) -> None:
    def work() -> None:
        raise error

    registry = ToolRegistry([work])
    assert (await done(registry, call("work"))).status == "failed"


async def test_long_messages_are_cut() -> None:
    result = await done(raising(ToolError("x" * 100_000)), call())
    assert len(result.text) == 2000


async def test_an_error_that_the_tool_tells_itself() -> None:
    async def work(*_: object) -> ToolOutput:
        return ToolOutput.of_text("not today", is_error=True)

    result = await done(doing(work), call())
    assert (result.status, result.text) == ("failed", "not today")


@pytest.mark.parametrize(
    "output",
    [
        "a string",
        ToolOutput(content="a string"),  # type: ignore[arg-type]
        ToolOutput(content=("a string",)),  # type: ignore[arg-type]
        ToolOutput(content=ContentPart(kind="text", text="x")),  # type: ignore[arg-type]
        ToolOutput(content=(ContentPart(kind="text", text=5),)),  # type: ignore[arg-type]
        ToolOutput(content=(ContentPart(kind="video", data="QUJD"),)),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_output(output: Any) -> None:
    async def work(*_: object) -> Any:
        return output

    result = await done(doing(work), call())
    assert (result.status, result.text) == ("failed", "The tool failed: it did not return a tool output.")


async def test_bytes_of_an_image_become_base64() -> None:
    async def work(*_: object) -> ToolOutput:
        return ToolOutput(content=[ContentPart(kind="image", data=b"ABC")])  # type: ignore[arg-type]

    result = await done(doing(work), call())
    assert (result.status, result.text, result.output.content[0].data) == ("completed", "[image: 3 bytes]", "QUJD")


async def test_floods() -> None:
    async def work(arguments: Mapping[str, Any], _: Report) -> ToolOutput:
        return ToolOutput(content=tuple(ContentPart(kind="text", text="x" * 1_000_000) for _ in range(arguments["n"])))

    registry = doing(work, parameters=SCHEMA)
    result = await done(registry, call("fake", '{"n": 10}'), max_chars=1000)
    assert result.status == "completed"
    assert len(result.text) == 1000
    assert result.text.endswith("[cut: the whole output has 10000009 characters]")
    result = await done(registry, call("fake", '{"n": 17}'))
    assert (result.status, result.output.content[0].text) == (
        "failed", f"The tool returned 17000000 characters, and at most {MAX_OUTPUT} are allowed: ask for less.",
    )  # fmt: skip


class Hanging:
    """Work that never ends, and notes how it was ended."""

    def __init__(self, ignored: int = 0) -> None:
        self.begun = asyncio.Event()
        self.ended = 0
        self.ignored = ignored

    async def __call__(self, _: Mapping[str, Any], report: Report) -> ToolOutput:
        self.begun.set()
        for _ in range(self.ignored):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                report(ToolProgress(progress=99))
        try:
            await asyncio.sleep(3600)
        finally:
            self.ended += 1
        return ToolOutput()


async def test_a_tool_that_hangs_is_cancelled() -> None:
    work = Hanging()
    result = await done(doing(work), call(), timeout=0.05)
    assert (result.status, work.ended) == ("timed_out", 1)
    assert result.text == "The tool did not answer within 0.05 seconds and was stopped."
    assert result.seconds >= 0.05
    assert (await done(doing(Hanging()), call(), timeout=0)).status == "timed_out"


async def test_a_tool_that_swallows_a_cancelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_AGAIN", 0.05)
    work, seen = Hanging(ignored=2), list[ToolProgress]()
    result = await done(doing(work), call(), timeout=0.01, report=seen.append)
    assert (result.status, work.ended, seen) == ("timed_out", 1, [])


async def test_a_tool_that_takes_no_cancelling(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution, "_AGAIN", 0.02)
    monkeypatch.setattr(execution, "_PATIENCE", 0.05)
    work = Hanging(ignored=9)
    assert (await done(doing(work), call(), timeout=0.01)).status == "timed_out"
    assert "tool fake did not end within 0.05 seconds after it was cancelled" in caplog.text
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "tool fake"]
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert work.ended == 1


@pytest.mark.parametrize("cancels", [1, 3])
async def test_cancelled_while_a_tool_that_was_too_slow_cleans_up(cancels: int) -> None:
    state, release = list[str](), asyncio.Event()

    async def slow_to_end(*_: object) -> ToolOutput:
        try:
            await asyncio.sleep(3600)
        finally:
            state.append("ending")
            await release.wait()
            state.append("ended")
        return ToolOutput()

    running = asyncio.create_task(done(doing(slow_to_end), call(), timeout=0.01))
    await until(lambda: state)
    for _ in range(cancels):
        running.cancel()
        await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert state == ["ending", "ended"]


async def test_the_tools_own_time() -> None:
    work = Hanging()
    tool = FakeTool("fake", work)
    tool.timeout = 0.02
    assert (await done(ToolRegistry([tool]), call())).status == "timed_out"
    tool.timeout = 3600
    assert (await done(ToolRegistry([tool]), call(), timeout=0.02)).status == "timed_out"


async def test_cancelling_the_caller_ends_the_tool() -> None:
    work = Hanging()
    running = asyncio.create_task(done(doing(work), call()))
    await work.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert work.ended == 1


async def test_a_sync_function_whose_caller_goes() -> None:
    started, gate = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        gate.wait()

    running = asyncio.create_task(done(ToolRegistry([slow]), call("slow")))
    await asyncio.to_thread(started.wait)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.set()


async def test_calls_of_one_tool_at_the_same_time() -> None:
    def square(n: int) -> int:
        return n * n

    registry = ToolRegistry([square])
    calls = [call("square", json.dumps({"n": number})) for number in range(10)]
    results = await asyncio.gather(*(done(registry, one) for one in calls))
    assert [result.text for result in results] == [str(number * number) for number in range(10)]


async def test_a_tool_may_go_while_it_runs() -> None:
    registry = ToolRegistry([FakeTool()])
    checked = await check(registry, call())
    assert isinstance(checked, Checked)
    registry.remove("fake")
    assert (await run(checked)).status == "completed"
