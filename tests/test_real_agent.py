# SPDX-License-Identifier: MIT
"""The whole way of a conversation that acts: a real model, real tools, an MCP server, in the process and over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from candle_vllm.core import InferenceEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.responses import ConversationFinished, ConversationOptions, McpServerConfig, ResponsesSession
from candle_vllm.responses.conversation.events import CallArgumentsDelta, ToolFinished, TurnFinished
from candle_vllm.server.settings.derived import demo_model
from tests.live_server import serving

SERVER = """
import anyio
import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["triangle", "square"]}},
    "required": ["shape"],
    "additionalProperties": False,
}

async def tools(context, params):
    tool = types.Tool(name="corners", description="Counts the corners of a shape.", input_schema=SCHEMA)
    return types.ListToolsResult(tools=[tool])

async def call(context, params):
    corners = {"triangle": 3, "square": 4}[params.arguments["shape"]]
    return types.CallToolResult(content=[types.TextContent(type="text", text=str(corners))])

async def main():
    server = Server("shapes", on_list_tools=tools, on_call_tool=call)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())

anyio.run(main)
"""
GREEDY = {"temperature": 0, "max_tokens": 120}


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    demo = demo_model()
    assert demo is not None
    with InferenceEngine(str(demo), max_model_len=4096) as engine:
        yield engine


@pytest.fixture
def shapes(tmp_path: Path) -> McpServerConfig:
    (tmp_path / "shapes.py").write_text(SERVER)
    arguments = [str(tmp_path / "shapes.py")]
    return McpServerConfig(name="shapes", command=sys.executable, args=arguments, auto_approve=["corners"])


def add(a: Annotated[int, Field(ge=0, le=99)], b: Annotated[int, Field(ge=0, le=99)]) -> int:
    """Adds two numbers."""
    return a + b


async def weather(city: Literal["Rome", "Bonn"]) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


async def check_led_conversation(session: ResponsesSession) -> None:
    """Each tool in turn, then an answer; what was streamed is what the transcript has."""
    say = [user("Add 2 and 3, tell the weather in Rome, and count the corners of a square.")]
    for name in ("add", "weather", "shapes__corners"):
        options = ConversationOptions(max_turns=1, request={**GREEDY, "tool_choice": named(name)})
        streamed: list[str] = []
        async with aclosing(session.stream_conversation(say, options)) as events:
            async for event in events:
                if isinstance(event, CallArgumentsDelta):
                    streamed.append(event.delta)
                elif isinstance(event, TurnFinished):
                    (call,) = event.message["tool_calls"]
                elif isinstance(event, ToolFinished):
                    result = event.result
                elif isinstance(event, ConversationFinished):
                    assert event.result.stop_reason == "max_turns"
        assert (call["function"]["name"], call["function"]["arguments"]) == (name, "".join(streamed))
        assert (result.call.id, result.status) == (call["id"], "completed")
        given = json.loads(result.call.arguments)
        expected = {
            "add": lambda given: str(given["a"] + given["b"]),
            "weather": lambda given: f"It rains in {given['city']}.",
            "shapes__corners": lambda given: {"triangle": "3", "square": "4"}[given["shape"]],
        }[name](given)
        assert result.text == expected
        say = []
    end = ConversationOptions(request={**GREEDY, "tool_choice": "none"})
    result = await session.run_conversation([user("Now answer in one sentence.")], end)
    assert result.stop_reason in ("stop", "length")
    assert result.final_message
    assert [message["role"] for message in session.messages] == [
        "user",
        *["assistant", "tool"] * 3,
        "user",
        "assistant",
    ]
    assert result.usage.prompt_tokens > 0


async def test_in_the_process(engine: InferenceEngine, shapes: McpServerConfig) -> None:
    async with ResponsesSession(engine, tools=[add, weather], mcp_servers=[shapes], strict_servers=True) as session:
        await check_led_conversation(session)
    assert engine.stats().num_running == 0


async def test_over_http(engine: InferenceEngine, shapes: McpServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(engine) as url:
        session = ResponsesSession(f"{url}/v1", tools=[add, weather], mcp_servers=[shapes], strict_servers=True)
        async with session:
            await check_led_conversation(session)
            assert (await session.call_tool("shapes", "corners", {"shape": "triangle"})).text == "3"


async def test_required_calls_in_one_turn(engine: InferenceEngine) -> None:
    session = ResponsesSession(engine, tools=[add, weather])
    options = ConversationOptions(max_turns=1, request={**GREEDY, "tool_choice": "required", "max_tokens": 200})
    result = await session.run_conversation([user("Add 2 and 3.")], options)
    assert result.stop_reason == "max_turns"
    assert result.tool_calls
    assert {one.status for one in result.tool_calls} == {"completed"}


@pytest.mark.peer
@pytest.mark.timeout(600)
async def test_a_model_that_chooses_by_itself(coder: InferenceEngine) -> None:
    session = ResponsesSession(OpenAIAdapter(coder), tools=[add, weather])
    options = ConversationOptions(max_turns=1, request=GREEDY)
    result = await session.run_conversation([user("What is 17 plus 25? Use the tool.")], options)
    (done,) = result.tool_calls
    assert (done.call.name, done.text) == ("add", "42")
