# SPDX-License-Identifier: MIT
"""Sessions remember what was said and done, and only that; any of them can be taken up by another."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import CandleVllmError, ConfigError, InvalidParameterError, RequestAbortedError, RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.responses import (
    ConversationFinished,
    ConversationOptions,
    McpConfig,
    McpServerConfig,
    ResponsesSession,
    ToolError,
)
from candle_vllm.responses.conversation.chat_model import InProcessModel
from candle_vllm.responses.conversation.events import ToolStarted
from candle_vllm.responses.conversation.transcript import LOST
from packages.responses.tests.conversation.conversation_fakes import (
    Gate,
    adapter_of,
    call_text,
    engine_of,
    other_tasks,
    user,
)
from tests.waiting import until


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def roles(session: ResponsesSession) -> list[str]:
    return [message["role"] for message in session.messages]


async def test_each_call_continues_the_last() -> None:
    engine = ScriptedEngine(lambda prompt: f"answer {prompt.count('<|im_start|>user')}")
    session = ResponsesSession(OpenAIAdapter(engine), [{"role": "system", "content": "be brief"}])
    first = await session.run_conversation([user("one")])
    second = await session.run_conversation([user("two")])
    assert (first.final_message, second.final_message) == ("answer 1", "answer 2")
    assert second.completed
    assert second.turns_taken == 1
    assert roles(session) == ["system", "user", "assistant", "user", "assistant"]
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    again = ResponsesSession(engine, session.messages)
    assert (await again.run_conversation([user("three")])).final_message == "answer 3"


class OwnEngine:
    """An engine of another library, which has what `EngineLike` asks for, but no `apply_chat_template`."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        if name == "apply_chat_template":
            raise AttributeError(name)
        return getattr(self.engine, name)


@pytest.mark.parametrize(
    "wrap", [lambda engine: engine, OwnEngine, OpenAIAdapter, lambda e: InProcessModel(OpenAIAdapter(e))]
)
async def test_any_model_will_do(wrap: Any) -> None:
    session = ResponsesSession(wrap(ScriptedEngine("Hello!")))
    assert (await session.run_conversation([user("x")])).final_message == "Hello!"


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(ConfigError, match="the class ScriptedEngine itself"):
        ResponsesSession(ScriptedEngine)
    with pytest.raises(ConfigError, match="not a int"):
        ResponsesSession(3)
    with pytest.raises(ConfigError, match="load it with InferenceEngine"):
        ResponsesSession("model.gguf")
    with pytest.raises(ConfigError, match="for a base URL"):
        ResponsesSession(ScriptedEngine(), api_key="secret")


async def test_a_cut_answer_is_not_complete() -> None:
    session = ResponsesSession(OpenAIAdapter(ScriptedEngine("a long answer")))
    result = await session.run_conversation([user("x")], ConversationOptions(request={"max_tokens": 2}))
    assert not result.completed
    assert result.stop_reason == "length"
    assert result.usage.completion_tokens == 2


async def test_a_failed_turn_leaves_the_transcript_alone() -> None:
    session = ResponsesSession(OpenAIAdapter(ScriptedEngine("x", submit_error=CandleVllmError("no"))))
    with pytest.raises(CandleVllmError):
        await session.run_conversation([user("x")])
    with pytest.raises(InvalidParameterError):
        await session.run_conversation([{"role": "nobody", "content": "x"}])
    with pytest.raises(InvalidParameterError, match=r"messages\.0 must be an object"):
        await session.run_conversation(["hi"])
    with pytest.raises(InvalidParameterError, match="messages must be a list"):
        await session.run_conversation("hi")
    assert session.messages == []


def test_a_request_may_not_set_what_the_session_does() -> None:
    with pytest.raises(InvalidParameterError, match="must not set n, stream"):
        ConversationOptions(request={"n": 2, "stream": True})


async def test_tools_run_and_stay_in_the_transcript() -> None:
    session = ResponsesSession(adapter_of(call_text("add", a=1, b=2), "3 it is"), tools=[add])
    result = await session.run_conversation([user("1 + 2?")])
    assert (result.final_message, result.turns_taken) == ("3 it is", 2)
    assert roles(session) == ["user", "assistant", "tool", "assistant"]
    shown = session.messages
    shown[0]["content"] = "changed"
    assert session.messages[0]["content"] == "1 + 2?"


async def test_events_come_as_they_happen() -> None:
    session = ResponsesSession(adapter_of(call_text("add", a=1, b=2), "3"), tools=[add])
    kinds = []
    async with aclosing(session.stream_conversation([user("x")])) as events:
        async for event in events:
            kinds.append(type(event).__name__)
    for name in ("TurnStarted", "CallStarted", "TurnFinished", "ToolStarted", "ToolFinished", "ConversationFinished"):
        assert name in kinds
    assert roles(session) == ["user", "assistant", "tool", "assistant"]


class TestFaults:
    async def test_a_later_turn_that_fails_keeps_the_earlier_ones(self) -> None:
        def boom() -> str:
            """Breaks the engine."""
            engine.submit_error = CandleVllmError("gone")
            return "done"

        engine = engine_of(call_text("boom"), "now it works")
        session = ResponsesSession(OpenAIAdapter(engine, tool_parser="hermes"), tools=[boom])
        with pytest.raises(CandleVllmError, match="gone"):
            await session.run_conversation([user("x")])
        assert roles(session) == ["user", "assistant", "tool"]
        engine.submit_error = None
        assert (await session.run_conversation()).final_message == "now it works"

    async def test_cancelled_in_a_tool_its_call_is_answered_and_never_run_again(self) -> None:
        gate = Gate()
        calls = call_text("wait", number=1) + call_text("add", a=1, b=2) + call_text("wait", number=2)
        session = ResponsesSession(adapter_of(calls, "ok"), tools=[gate.wait, add])
        options = ConversationOptions(parallel_tools=2)
        task = asyncio.create_task(session.run_conversation([user("x")], options))
        await until(lambda: gate.begun == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.cancelled == 2
        assert not other_tasks()
        assert [message["content"] for message in session.messages[2:]] == [LOST, "3", LOST]
        assert session.open_calls == ()
        assert (await session.run_conversation()).final_message == "ok"
        assert gate.begun == 2

    async def test_a_call_that_had_not_begun_is_open_and_runs_later(self) -> None:
        gate = Gate()
        calls = call_text("wait", number=1) + call_text("add", a=1, b=2)
        session = ResponsesSession(adapter_of(calls, "ok"), tools=[gate.wait, add])
        task = asyncio.create_task(session.run_conversation([user("x")], ConversationOptions(parallel_tools=1)))
        await until(lambda: gate.begun == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [call.name for call in session.open_calls] == ["add"]
        again = ResponsesSession(adapter_of("ok"), json.loads(json.dumps(session.messages)), tools=[add])
        result = await again.run_conversation()
        assert [one.text for one in result.tool_calls] == ["3"]
        assert result.completed

    async def test_one_conversation_at_a_time(self) -> None:
        gate = Gate()
        session = ResponsesSession(adapter_of(call_text("wait"), "ok"), tools=[gate.wait])
        task = asyncio.create_task(session.run_conversation([user("x")]))
        await until(lambda: gate.begun == 1)
        with pytest.raises(RequestError, match="is running"):
            await session.run_conversation([user("y")])
        gate.open.set()
        assert (await task).completed

    async def test_closing_the_session_ends_its_conversation(self) -> None:
        gate = Gate()
        session = ResponsesSession(adapter_of(call_text("wait"), "never"), tools=[gate.wait])
        async with session:
            task = asyncio.create_task(session.run_conversation([user("x")]))
            await until(lambda: gate.begun == 1)
        assert gate.cancelled == 1
        with pytest.raises(RequestAbortedError):
            await task
        assert session.messages[-1]["content"] == LOST

    async def test_a_reader_that_leaves_without_closing(self) -> None:
        gate = Gate()
        async with ResponsesSession(adapter_of(call_text("wait")), tools=[gate.wait]) as session:
            events = session.stream_conversation([user("x")])
            async for event in events:
                if isinstance(event, ToolStarted):
                    break
            await until(lambda: gate.begun == 1)
        assert gate.cancelled == 1
        assert not other_tasks()
        await events.aclose()

    async def test_a_reader_that_leaves_early(self) -> None:
        session = ResponsesSession(adapter_of("x" * 10_000))
        async with aclosing(session.stream_conversation([user("x")])) as events:
            async for _ in events:
                break
        assert session.messages == []
        assert not other_tasks()


class TestApprovals:
    RULES = ConversationOptions(approval="always")

    async def stopped(self) -> tuple[ResponsesSession, str]:
        calls = call_text("add", a=1, b=2)
        session = ResponsesSession(adapter_of(calls, "done"), tools=[add])
        result = await session.run_conversation([user("x")], self.RULES)
        assert result.stop_reason == "approval"
        return session, result.pending[0].id

    @pytest.mark.parametrize(("answer", "status"), [("allow", "completed"), ("deny", "denied")])
    async def test_an_answer_lets_the_conversation_go_on(self, answer: str, status: str) -> None:
        session, call_id = await self.stopped()
        session.answer_approvals({call_id: answer})
        result = await session.run_conversation(options=self.RULES)
        assert [one.status for one in result.tool_calls] == [status]
        assert result.final_message == "done"

    async def test_by_another_session(self) -> None:
        session, call_id = await self.stopped()
        other = ResponsesSession(adapter_of("done"), json.loads(json.dumps(session.messages)), tools=[add])
        assert [call.id for call in other.open_calls] == [call_id]
        other.answer_approvals({call_id: "allow"})
        assert (await other.run_conversation(options=self.RULES)).completed

    async def test_a_tool_message_of_the_callers_is_an_answer_too(self) -> None:
        session, call_id = await self.stopped()
        result = await session.run_conversation([{"role": "tool", "tool_call_id": call_id, "content": "four"}])
        assert (result.final_message, result.tool_calls) == ("done", ())

    async def test_new_messages_wait_for_the_answer(self) -> None:
        session, call_id = await self.stopped()
        with pytest.raises(InvalidParameterError, match=f"{call_id} have no result yet"):
            await session.run_conversation([user("never mind")])
        done = {"role": "tool", "tool_call_id": call_id, "content": "not wanted"}
        assert (await session.run_conversation([done, user("never mind")])).completed

    async def test_wrong_answers(self) -> None:
        session, call_id = await self.stopped()
        with pytest.raises(InvalidParameterError, match="is not a call without a result; these are: " + call_id):
            session.answer_approvals({"call_x": "allow"})
        with pytest.raises(InvalidParameterError, match="must be 'allow' or 'deny'"):
            session.answer_approvals({call_id: "pending"})
        with pytest.raises(InvalidParameterError, match="by the id of a call"):
            session.answer_approvals([call_id])

    async def test_the_last_answer_counts_and_an_answered_call_takes_no_more(self) -> None:
        session, call_id = await self.stopped()
        session.answer_approvals({call_id: "allow"})
        session.answer_approvals({call_id: "deny"})
        result = await session.run_conversation(options=self.RULES)
        assert [one.status for one in result.tool_calls] == ["denied"]
        with pytest.raises(InvalidParameterError, match="these are: none"):
            session.answer_approvals({call_id: "allow"})

    async def test_transcripts_that_refer_to_unknown_calls(self) -> None:
        session, call_id = await self.stopped()
        stray = {"role": "tool", "tool_call_id": "call_x", "content": "?"}
        with pytest.raises(InvalidParameterError, match="'call_x' is not the id of a tool call without a result"):
            await session.run_conversation([{**stray, "tool_call_id": call_id}, stray])
        other = ResponsesSession(adapter_of("done"), [user("x"), stray])
        with pytest.raises(InvalidParameterError, match="'call_x' is not the id of a tool call without a result"):
            await other.run_conversation()


async def test_client_tools_by_a_tool_message() -> None:
    tool = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object", "properties": {}}}}
    session = ResponsesSession(adapter_of(call_text("ask") * 2, "thanks"))
    result = await session.run_conversation([user("x")], client_tools=[tool])
    assert result.stop_reason == "client_tools"
    first, second = ({"role": "tool", "tool_call_id": call.id, "content": "yes"} for call in result.pending)
    half = await session.run_conversation([first], client_tools=[tool])
    assert (half.stop_reason, half.pending) == ("client_tools", result.pending[1:])
    assert (await session.run_conversation([second], client_tools=[tool])).completed


async def test_tools_without_the_model() -> None:
    session = ResponsesSession(ScriptedEngine(), tools=[add])
    assert [tool["function"]["name"] for tool in session.list_openai_tools()] == ["add"]
    assert session.list_openai_tools(["b*"]) == []
    assert (await session.call_tool(None, "add", {"a": 1, "b": 2})).text == "3"
    assert (await session.call_tool(None, "add", {"a": 1})).status == "invalid_arguments"
    with pytest.raises(InvalidParameterError, match="no tool 'sub' among the Python tools"):
        await session.call_tool(None, "sub", {})
    with pytest.raises(InvalidParameterError, match="at the MCP server 'time'"):
        await session.call_tool("time", "add", {})
    assert session.messages == []
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for arguments in (None, 3, "x", ["a"], {"a": object()}, {"a": deep}):
        with pytest.raises(InvalidParameterError, match="arguments must be") as caught:
            await session.call_tool(None, "add", arguments)
        assert caught.value.param == "arguments"
    for timeout in (-1, 0, float("nan"), "x"):
        with pytest.raises(InvalidParameterError, match="timeout must be more than 0"):
            await session.call_tool(None, "add", {"a": 1, "b": 2}, timeout=timeout)


@pytest.mark.parametrize("tools", [add, None, "add", {"add": add}, 3])
def test_tools_that_are_no_list(tools: Any) -> None:
    with pytest.raises(InvalidParameterError, match="tools must be a list of functions"):
        ResponsesSession(ScriptedEngine(), tools=tools)


SERVER = McpServerConfig(name="time", command="nothing")


@pytest.mark.parametrize(
    ("servers", "told"),
    [
        (None, "not a NoneType"),
        ({"time": {"command": "x"}}, "not a dict"),
        ([{"command": "x"}], "not a dict"),
        ([SERVER, SERVER], "two MCP servers are named 'time'"),
        ("nothing.json", r"nothing\.json does not exist"),
        ("~nobody-of-this-name/mcp.json", "does not exist"),
        ("x" * 5000, "cannot read"),
    ],
)
def test_servers_that_cannot_be(servers: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ResponsesSession(ScriptedEngine(), mcp_servers=servers)


@pytest.mark.parametrize("servers", [SERVER, [SERVER], (one for one in [SERVER]), McpConfig((SERVER,))])
async def test_servers_in_every_form(servers: Any) -> None:
    async with ResponsesSession(ScriptedEngine(), mcp_servers=servers) as session:
        assert session.fleet is not None
        assert [status.name for status in session.fleet.status()] == ["time"]


MCP_SERVER = """
import os
from mcp.server import MCPServer

server = MCPServer("numbers")

@server.tool()
def double(n: int) -> int:
    "Doubles a number."
    return 2 * n

@server.tool()
def pid() -> int:
    "Tells the number of its process."
    return os.getpid()

server.run(transport="stdio")
"""


@pytest.mark.parametrize("options", [ConversationOptions(), ConversationOptions(approval="never")])
async def test_tools_of_mcp_servers(tmp_path: Path, options: ConversationOptions) -> None:
    (tmp_path / "server.py").write_text(MCP_SERVER)
    numbers = {"command": sys.executable, "args": ["server.py"], "cwd": ".", "autoApprove": ["double"]}
    gone = {"command": str(tmp_path / "nothing")}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"numbers": numbers, "gone": gone}}))
    calls = call_text("numbers__double", n=21) + call_text("numbers__pid") + call_text("add", a=1, b=2)
    session = ResponsesSession(adapter_of(calls, "done"), tools=[add], mcp_servers=tmp_path / "mcp.json")
    with pytest.raises(ConfigError, match="async with"):
        await session.run_conversation([user("x")])
    async with session:
        assert session.fleet is not None
        states = {status.name: status.state for status in session.fleet.status()}
        assert (states["numbers"], states["gone"] != "ready") == ("ready", True)
        result = await session.run_conversation([user("x")], options)
        everything = options.approval == "never"
        assert result.stop_reason == ("stop" if everything else "approval")
        assert ("numbers", "42") in [(one.server, one.text) for one in result.tool_calls]
        assert [call.name for call in result.pending] == ([] if everything else ["numbers__pid"])
        assert "add" in [one.call.name for one in result.tool_calls]  # a function of the program needs no approval
        assert (await session.call_tool("numbers", "double", {"n": 4})).text == "8"
        pid = int((await session.call_tool("numbers", "pid", {})).text)
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [one["function"]["name"] for one in session.list_openai_tools()] == ["add"]
    strict = ResponsesSession(ScriptedEngine(), mcp_servers=tmp_path / "mcp.json", strict_servers=True)
    with pytest.raises(CandleVllmError, match="gone"):
        async with strict:
            pass


async def test_a_session_with_connections_is_used_as_a_context() -> None:
    session = ResponsesSession("http://127.0.0.1:9/v1", model_name="m")
    with pytest.raises(ConfigError, match="async with"):
        await session.run_conversation([user("x")])
    await session.aclose()


@pytest.mark.parametrize("model", [ScriptedEngine(), "http://127.0.0.1:9/v1"], ids=["engine", "url"])
async def test_a_session_is_entered_once_and_closed_for_good(model: Any) -> None:
    session = ResponsesSession(model)
    async with session:
        with pytest.raises(ConfigError, match="entered only once"):
            await session.__aenter__()
    with pytest.raises(ConfigError, match="the session is closed"):
        await session.run_conversation([user("x")])
    with pytest.raises(ConfigError, match="the session is closed"):
        await session.call_tool(None, "add", {})
    with pytest.raises(ConfigError, match="entered only once"):
        await session.__aenter__()


def test_the_package_loads_neither_mcp_nor_the_store() -> None:
    code = (
        "import sys, candle_vllm.responses as r\n"
        "from candle_vllm.responses import ConversationOptions, ResponsesSession\n"
        "sys.exit(', '.join(sorted({'mcp', 'sqlalchemy', 'httpx2', 'torch'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there() -> None:
    import candle_vllm.responses as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    assert ConversationFinished.__struct_fields__ == ("result", "messages")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


# ---- what is meant, and what is told ---------------------------------------------------------------------------------


async def test_options_that_cannot_be_meant_are_refused() -> None:
    session = ResponsesSession(engine_of("ok"), tools=[add])
    with pytest.raises(InvalidParameterError, match=r"options must be ConversationOptions, .* not dict"):
        await session.run_conversation([user("x")], {"max_turns": 3})
    with pytest.raises(InvalidParameterError, match=r"no tool 'ad' \(did you mean add\?\); there are: add"):
        await session.run_conversation([user("x")], ConversationOptions(allowed_tools=("add", "ad")))
    assert not session.messages
    for allowed in (("add",), ("a*", "z*"), (), None):
        assert (await session.run_conversation([user("x")], ConversationOptions(allowed_tools=allowed))).completed
        session = ResponsesSession(engine_of("ok"), tools=[add])


def test_arguments_that_there_are_not() -> None:
    with pytest.raises(TypeError, match=r"'max_turn' \(did you mean max_turns\?\)"):
        ConversationOptions(max_turn=3)
    with pytest.raises(TypeError, match=r"'nme' \(did you mean name\?\)"):
        McpServerConfig(nme="x", command="x")


async def test_a_session_says_what_it_is() -> None:
    session = ResponsesSession(engine_of("ok"), tools=[add])
    assert repr(session) == "<ResponsesSession: 0 messages, 1 tools>"
    await session.run_conversation([user("x")])
    await session.aclose()
    assert repr(session) == "<ResponsesSession, closed: 2 messages, 1 tools>"
    other = ResponsesSession("http://127.0.0.1:1/v1", mcp_servers=McpServerConfig(name="files", command="x"))
    assert repr(other) == "<ResponsesSession, not entered: 0 messages, 0 tools, MCP servers files>"


async def test_what_the_model_is_told_of_an_exception() -> None:
    def bang() -> str:
        raise ValueError("postgres://user:password@host")

    def told() -> str:
        raise ToolError("no such customer")

    for tool, text in ((bang, "The tool failed (ValueError)."), (told, "no such customer")):
        session = ResponsesSession(adapter_of(call_text(tool.__name__), "ok"), tools=[tool])
        result = await session.run_conversation([user("x")])
        assert [call.text for call in result.tool_calls] == [text]
        assert "password" not in json.dumps(session.messages)
