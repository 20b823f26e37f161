# SPDX-License-Identifier: MIT
"""Responses over a scripted engine: whole and streamed alike, with tools that run here, memory, limits and failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import (
    CandleVllmError,
    EngineOverloadedError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import GenerationFailedError, OpenAIAdapter, to_json_bytes
from candle_vllm.openai.errors import ErrorBody, UnsupportedParameterError
from candle_vllm.openai.protocol.fields import MAX_MESSAGES
from candle_vllm.responses.api.conversations import ConversationCreateRequest, Conversations
from candle_vllm.responses.api.mcp_source import McpServers, OpenServer
from candle_vllm.responses.api.responder import Responder, ResponderOptions
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.conversation.chat_model import InProcessModel
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.store.backend import StoreOptions
from candle_vllm.responses.store.entries import Entry, NotStoredError
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Report, ToolDefinition, ToolError, ToolOutput, ToolUnavailableError
from tests.response_judges import judge_events, judge_response
from tests.waiting import skip, until

TEMPLATE = "{{ tools }}<tool_call>"  # writes calls, so that tools can be called
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
SERVER = {"type": "mcp", "server_label": "s", "require_approval": "never"}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Clock:
    """A tool of the server "s"."""

    def __init__(self, name: str = "time", *, seconds: float = 0.0) -> None:
        self.definition = ToolDefinition(name=f"s__{name}", server="s", original_name=name, read_only=name == "time")
        self.seconds = seconds
        self.runs = 0
        self.cancelled = 0

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        self.runs += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return ToolOutput.of_text(f"noon {json.dumps(arguments)}")


class Servers:
    """One server with these tools, or none that answers."""

    def __init__(self, *tools: Clock, error: str | None = None) -> None:
        self.tools = tools
        self.error = error
        self.open_now = 0

    def check(self, tool: McpTool, path: str) -> None:
        if tool.server_label != "s":
            raise InvalidParameterError(f"{path}.server_label is not there", f"{path}.server_label")

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncIterator[OpenServer]:
        self.open_now += 1
        try:
            yield OpenServer(tool.server_label, self.tools, self.error)
        finally:
            self.open_now -= 1


async def conversation(kept: ResponseStore) -> str:
    """A new one without items, of nobody."""
    return (await Conversations(kept).create("", ConversationCreateRequest())).id


def responder(engine: ScriptedEngine, **options: Any) -> Responder:
    adapter = OpenAIAdapter(engine, tool_parser="hermes", reasoning_parser="think")
    return Responder(InProcessModel(adapter), count=adapter.count_tokens, **options)


def engine(script: Any = "Good day!", **options: Any) -> ScriptedEngine:
    return ScriptedEngine(script, chat_template=TEMPLATE, **options)


async def streamed(answering: Responder, request: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    events = [json.loads(to_json_bytes(event)) async for event in await answering.create_stream(request)]
    return events, judge_events(events)


def alike(response: dict[str, Any]) -> Any:
    """A response without what differs from one to the next."""
    text = json.dumps(response["output"])
    for item in response["output"]:
        for name in ("id", "call_id"):
            text = text.replace(item.get(name) or item["id"], "")
    return text, response["usage"], response["status"], response["incomplete_details"]


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() if not task.done()} - before
    assert left <= {asyncio.current_task()}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tools": [FUNCTION]},
        {"max_output_tokens": 9, "tools": [FUNCTION]},
        {"top_logprobs": 2},
        {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "string"}}}},
        {"tools": [FUNCTION, {"type": "web_search"}], "instructions": "Be brief.", "metadata": {"a": "b"}},
    ],
)
async def test_whole_and_streamed_are_alike(change: dict[str, Any]) -> None:
    answering = responder(engine("<think>Hm.</think>\n\nI call. " + call("f", a=1)))
    request = {"input": "Hi", **change}
    whole = msgspec.to_builtins(await answering.create(request))
    judge_response(whole)
    _, last = await streamed(answering, request)
    assert alike(whole) == alike(last)


@pytest.mark.parametrize("thoughts", ["", "<think>Hm.</think>"])
async def test_log_probabilities(thoughts: str) -> None:
    events, made = await streamed(responder(engine(f"{thoughts}Hi")), {"input": "x", "top_logprobs": 1})
    entries = made["output"][-1]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["H", "i", "<|eos|>"]  # as in chat answers
    assert [len(entry["top_logprobs"]) for entry in entries] == [1, 1, 1]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries
    assert len(deltas) == len(entries)


async def test_what_the_model_is_asked() -> None:
    scripted = engine()
    request = {
        "input": [{"role": "user", "content": "Hi"}], "instructions": "Be brief.", "temperature": 0.5, "seed": 7,
        "tools": [{"type": "namespace", "name": "n", "description": "Tools.", "tools": [FUNCTION]}],
        "max_output_tokens": 30, "reasoning": {"effort": "low"},
    }  # fmt: skip
    made = await responder(scripted, options=ResponderOptions(model="m", sampling_defaults={"top_p": 0.9})).create(
        request
    )
    asked = scripted.template_calls[-1]
    assert asked.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert asked.options["reasoning_effort"] == "low"
    function = asked.options["tools"][0]["function"]
    assert (function["name"], function["description"]) == ("n__f", "One of the tools of n: Tools.")
    params = scripted.requests[-1].params
    assert (params.temperature, params.seed, params.max_tokens, params.top_p) == (0.5, 7, 30, 0.9)
    assert (made.model, made.temperature, made.top_p, made.max_output_tokens) == ("m", 0.5, 0.9, 30)


async def test_tools_of_servers_run_here() -> None:
    clock, scripted = (
        Clock(),
        engine(lambda prompt: "It is noon." if "tool\nnoon" in prompt else call("s__time", zone="Z")),
    )
    servers = Servers(clock)
    answering = responder(scripted, servers=servers)
    events, made = await streamed(answering, {"input": "What time is it?", "tools": [SERVER, FUNCTION]})
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools", "mcp_call", "message"]
    listed, ran, _ = made["output"]
    assert [tool["name"] for tool in listed["tools"]] == ["time"]
    assert (ran["name"], ran["arguments"], ran["output"]) == ("time", '{"zone": "Z"}', 'noon {"zone": "Z"}')
    assert (clock.runs, servers.open_now) == (1, 0)
    first, second = [request.prompt_token_ids for request in scripted.requests]
    assert made["usage"]["input_tokens"] == len(first) + len(second)
    assert len([event for event in events if event["type"] == "response.created"]) == 1
    # The next request brings the items along: the server is not listed again, and the call has its result.
    again = [{"role": "user", "content": "What time is it?"}, *made["output"], {"role": "user", "content": "Sure?"}]
    after = await answering.create({"input": again, "tools": [SERVER]})
    assert [item.__struct_config__.tag for item in after.output] == ["message"]
    roles = [message["role"] for message in scripted.template_calls[-1].messages]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]


@pytest.mark.parametrize("limits", [{}, {"max_output_tokens": 3000}, {"truncation": "auto"}])
async def test_a_result_that_is_too_long_for_the_context_is_shortened(
    limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object) -> ToolOutput:
        return ToolOutput.of_text("noon " + "z" * 9000)

    monkeypatch.setattr(Clock, "run", run)
    scripted = engine(lambda prompt: "It is noon." if "tool\nnoon" in prompt else call("s__time"))
    answering, request = responder(scripted, servers=Servers(Clock())), {"input": "?", "tools": [SERVER], **limits}
    _, made = await streamed(answering, request)
    assert (made["status"], made["output"][-1]["content"][0]["text"]) == ("completed", "It is noon.")
    shown = scripted.template_calls[-1].messages[-1]["content"]
    assert shown == "noon " + "z" * (2251 - 49) + "\n[cut: the whole output has 9005 characters]"
    # So is it in the conversation that goes on, but what the client's own tool gave is not.
    scripted._script = lambda _: "Yes."
    asked = {"role": "user", "content": "?"}
    later = await answering.create({**request, "input": [asked, *made["output"], {"role": "user", "content": "Sure?"}]})
    assert later.output[-1].content[0].text == "Yes."
    if not limits:
        assert scripted.template_calls[-1].messages[2]["content"] == shown
        given = {"type": "function_call_output", "call_id": "c", "output": "z" * 9000}
        called = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        with pytest.raises(PromptTooLongError):
            await answering.create({**request, "input": [asked, called, given], "tools": [SERVER, FUNCTION]})


async def test_a_server_that_cannot_be_reached_is_told() -> None:
    made = await responder(engine(), servers=Servers(error="nobody answers")).create({"input": "Hi", "tools": [SERVER]})
    listed, said = msgspec.to_builtins(made.output)
    assert (listed["error"], listed["status"], said["type"]) == ("nobody answers", "failed", "message")


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({}, {"time", "set"}),
        ({"allowed_tools": ["set"]}, {"set"}),
        ({"allowed_tools": {"read_only": True}}, {"time"}),
        ({"allowed_tools": {"tool_names": ["time"], "read_only": False}}, set()),
    ],
)
async def test_allowed_tools(change: dict[str, Any], seen: set[str]) -> None:
    scripted = engine()
    answering = responder(scripted, servers=Servers(Clock(), Clock("set")))
    await answering.create({"input": "Hi", "tools": [{**SERVER, **change}]})
    shown = scripted.template_calls[-1].options.get("tools") or []
    assert {tool["function"]["name"].removeprefix("s__") for tool in shown} == seen


async def test_an_approved_call_that_cannot_run_names_its_approval() -> None:
    answering = responder(engine("Sorry."), servers=Servers(Clock()))
    asked = {"type": "mcp_approval_request", "id": "r", "server_label": "s", "name": "time", "arguments": "{"}
    answered = {"type": "mcp_approval_response", "approval_request_id": "r", "approve": True}
    given = [{"role": "user", "content": "Hi"}, asked, answered]
    made = await answering.create({"input": given, "tools": [{**SERVER, "require_approval": "always"}]})
    (ran,) = (item for item in msgspec.to_builtins(made.output) if item["type"] == "mcp_call")
    assert (ran["status"], ran["approval_request_id"]) == ("failed", "r")


async def test_a_server_s_tool_that_the_tool_choice_does_not_allow_does_not_run() -> None:
    clock = Clock()
    answering = responder(
        engine(lambda prompt: "Sorry." if "tool\n" in prompt else call("s__time")), servers=Servers(clock)
    )
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": FUNCTION["name"]}]}
    tools = [{**SERVER, "require_approval": "never"}, FUNCTION]
    made = await answering.create({"input": "Hi", "tools": tools, "tool_choice": choice})
    assert [item.__struct_config__.tag for item in made.output] == ["mcp_list_tools", "mcp_call", "message"]
    assert (made.output[1].status, clock.runs) == ("failed", 0)


@pytest.mark.parametrize(
    ("require", "asks"),
    [
        (None, True),
        ("always", True),
        ("never", False),
        ({"never": {"tool_names": ["time"]}}, False),
        ({"never": {"tool_names": ["set"]}}, True),
        ({"always": {"read_only": True}, "never": {}}, True),
    ],
)
async def test_agreement(require: Any, asks: bool) -> None:
    clock = Clock()
    scripted = engine(lambda prompt: "Noon." if "tool\n" in prompt else call("s__time"))
    answering = responder(scripted, servers=Servers(clock))
    tools = [{**SERVER, "require_approval": require}]
    _, made = await streamed(answering, {"input": "Hi", "tools": tools})
    assert [item["type"] for item in made["output"]][1:] == (
        ["mcp_approval_request"] if asks else ["mcp_call", "message"]
    )
    assert clock.runs == (not asks)
    if not asks:
        return
    given = [{"role": "user", "content": "Hi"}, *made["output"]]
    request = made["output"][-1]["id"]
    agreed = {"type": "mcp_approval_response", "approval_request_id": request, "approve": True}
    _, after = await streamed(answering, {"input": [*given, agreed], "tools": tools})
    assert [item["type"] for item in after["output"]] == ["mcp_call", "message"]
    assert (after["output"][0]["approval_request_id"], clock.runs) == (request, 1)
    _, denied = await streamed(answering, {"input": [*given, {**agreed, "approve": False}], "tools": tools})
    assert ([item["type"] for item in denied["output"]], clock.runs) == (["message"], 1)


async def test_tools_of_the_caller_and_of_servers_in_one_turn() -> None:
    clock = Clock()
    answering = responder(engine(call("s__time") + "\n" + call("f", a=1)), servers=Servers(clock))
    _, made = await streamed(answering, {"input": "Hi", "tools": [SERVER, FUNCTION]})
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools", "mcp_call", "function_call"]
    assert (made["status"], clock.runs) == ("completed", 1)


async def test_a_limit_of_calls() -> None:
    clock = Clock()
    answering = responder(engine(call("s__time")), servers=Servers(clock))
    _, made = await streamed(answering, {"input": "Hi", "tools": [SERVER], "max_tool_calls": 2})
    assert (made["incomplete_details"], clock.runs) == ({"reason": "max_tool_calls"}, 2)
    assert [item["status"] for item in made["output"][1:]] == ["completed", "completed", "incomplete"]


async def test_a_limit_of_tokens_is_one_of_all_turns() -> None:
    turn = call("s__time")
    scripted = engine(turn)
    answering = responder(scripted, servers=Servers(Clock()))
    limit = 2 * len(turn) + 10
    _, made = await streamed(answering, {"input": "Hi", "tools": [SERVER], "max_output_tokens": limit})
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert made["usage"]["output_tokens"] <= limit
    limits = [request.params.max_tokens or 0 for request in scripted.requests]
    assert limits[0] == limit
    assert limits == sorted(limits, reverse=True)
    spent = made["usage"]["output_tokens"]
    _, exact = await streamed(answering, {"input": "Hi", "tools": [SERVER], "max_output_tokens": len(turn) + 1})
    assert exact["incomplete_details"] == {"reason": "max_output_tokens"}, spent


async def test_results_of_tools_leave_a_later_turn_the_rest_of_the_context() -> None:
    def answering(**options: Any) -> tuple[ScriptedEngine, Responder]:
        scripted = engine(lambda prompt: "Noon." if "tool\n" in prompt else call("s__time"), **options)
        return scripted, responder(scripted, servers=Servers(Clock()))

    request = {"input": "Hi", "tools": [SERVER]}
    scripted, plain = answering()
    await plain.create(request)
    first, second = (len(each.prompt_token_ids) for each in scripted.requests)
    scripted, narrow = answering(max_model_len=second + 20)
    _, made = await streamed(narrow, {**request, "max_output_tokens": second + 20 - first})
    assert (made["status"], made["output"][-1]["content"][0]["text"]) == ("completed", "Noon.")
    assert scripted.requests[-1].params.max_tokens is None
    _, full = answering(max_model_len=second)
    _, made = await streamed(full, request)
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in made["output"]][1:] == [("mcp_call", "completed")]


async def test_the_result_of_an_approved_call_leaves_the_first_turn_the_rest_of_the_context() -> None:
    asked = {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "s", "name": "time", "arguments": "{}"}
    approved = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    request = {"input": [{"role": "user", "content": "Hi"}, asked, approved], "tools": [SERVER]}
    scripted = engine("Noon.")
    await responder(scripted, servers=Servers(Clock())).create(request)
    most = len(scripted.requests[0].prompt_token_ids) + 20
    narrow = responder(engine("Noon.", max_model_len=most), servers=Servers(Clock()))
    _, made = await streamed(narrow, {**request, "max_output_tokens": 30})
    assert (made["status"], made["output"][-1]["content"][0]["text"]) == ("completed", "Noon.")
    full = responder(engine("Noon.", max_model_len=most - 20), servers=Servers(Clock()))
    _, made = await streamed(full, request)
    assert (made["status"], made["output"][-1]["type"]) == ("incomplete", "mcp_call")


async def test_a_forced_call_is_forced_once() -> None:
    scripted = engine(lambda prompt: "Noon." if "tool\n" in prompt else call("s__time"))
    answering = responder(scripted, servers=Servers(Clock()))
    made = await answering.create(
        {"input": "Hi", "tools": [SERVER], "tool_choice": {"type": "mcp", "server_label": "s"}}
    )
    assert made.status == "completed"


async def test_a_timeout_ends_tools() -> None:
    clock = Clock(seconds=60)
    answering = responder(engine(call("s__time")), servers=Servers(clock), options=ResponderOptions(timeout=30))
    answer = asyncio.create_task(streamed(answering, {"input": "Hi", "tools": [SERVER]}))
    await until(lambda: clock.runs)
    await skip(30)
    _, made = await answer
    assert (made["incomplete_details"], clock.cancelled) == ({"reason": "timeout"}, 1)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_a_reader_that_leaves_ends_everything(seconds: float) -> None:
    clock, scripted = Clock(seconds=seconds), engine(call("s__time") + "a long text " * 30)
    servers = Servers(clock)
    answering = responder(scripted, servers=servers)
    stream = await answering.create_stream({"input": "Hi", "tools": [SERVER]})
    async for event in stream:
        if event.event_name.endswith(("text.delta", "mcp_call_arguments.done")):
            break
    await stream.aclose()
    await stream.aclose()
    assert servers.open_now == 0
    assert scripted.stats().num_running == 0
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_request_that_is_never_started_leaves_nothing() -> None:
    servers = Servers(Clock())
    stream = await responder(engine(), servers=servers).prepare({"input": "Hi", "tools": [SERVER]})
    assert [event.event_name for event in stream.opening()] == ["response.created", "response.in_progress"]
    await stream.aclose()
    assert servers.open_now == 0


@pytest.mark.parametrize("error", [ToolError("no clock"), ToolUnavailableError("no server")])
async def test_a_failed_call_is_the_same_text_in_the_next_response(kept: ResponseStore, error: ToolError) -> None:
    class Broken(Clock):
        async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
            raise error

    scripted = engine(lambda prompt: "Sorry." if "tool\n" in prompt else call("s__time"))
    answering = responder(scripted, servers=Servers(Broken()), store=kept)
    first = await answering.create({"input": "Hi", "tools": [SERVER]})
    await answering.create({"input": "And?", "tools": [SERVER], "previous_response_id": first.id})
    for made in scripted.template_calls[-2:]:
        assert [one["content"] for one in made.messages if one["role"] == "tool"] == [str(error)]


async def test_a_server_that_could_not_be_listed_is_listed_later(kept: ResponseStore) -> None:
    servers = Servers(Clock(), error="nobody answers")
    servers.tools = ()
    answering = responder(engine(), servers=servers, store=kept)
    first = await answering.create({"input": "Hi", "tools": [SERVER]})
    servers.tools, servers.error = (Clock(),), None
    for listed in (["mcp_list_tools", "message"], ["message"]):
        first = await answering.create({"input": "Hi", "tools": [SERVER], "previous_response_id": first.id})
        assert [msgspec.to_builtins(item)["type"] for item in first.output] == listed


@pytest.mark.parametrize(
    ("options", "request_", "error", "param"),
    [
        ({"submit_error": EngineOverloadedError("full")}, {}, EngineOverloadedError, None),
        ({"max_model_len": 64}, {"input": "x" * 100}, PromptTooLongError, "input"),
        ({"max_model_len": 64}, {"max_output_tokens": 100}, PromptTooLongError, "max_output_tokens"),
        ({"has_chat_template": False}, {}, RequestError, "input"),
        ({}, {"chat_template_kwargs": {"tools": 1}}, InvalidParameterError, "chat_template_kwargs.tools"),
        ({}, {"store": True}, UnsupportedParameterError, "store"),
        ({}, {"background": True}, UnsupportedParameterError, "background"),
        ({}, {"previous_response_id": "resp_1"}, UnsupportedParameterError, "previous_response_id"),
        ({}, {"tools": [{**SERVER, "server_label": "other"}]}, InvalidParameterError, "tools.0.server_label"),
        ({}, {"tools": [SERVER, FUNCTION, SERVER]}, InvalidParameterError, "tools.2.server_label"),
        ({}, {"tools": [{"type": "web_search"}], "tool_choice": "required"}, InvalidParameterError, "tool_choice"),
        ({}, {"tools": [FUNCTION, FUNCTION]}, InvalidParameterError, "tools.1.name"),
    ],
)
async def test_refused_before_the_first_event(
    options: dict[str, Any], request_: dict[str, Any], error: type[Exception], param: str | None
) -> None:
    servers = Servers(Clock())
    answering = responder(engine(**options), servers=servers)
    for ask in (answering.create, answering.create_stream):
        with pytest.raises(error) as refusal:
            await ask({"input": "Hi", **request_})
        assert getattr(refusal.value, "param", None) == param
    assert servers.open_now == 0


async def test_a_failure_in_the_middle() -> None:
    answering = responder(engine("abcdef", fail_after=3, failure="secret path"))
    events, made = await streamed(answering, {"input": "Hi"})
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert made["error"] == {"code": "server_error", "message": "The engine failed on this request."}
    assert made["output"][0]["status"] == "incomplete"
    with pytest.raises(GenerationFailedError):
        await answering.create({"input": "Hi"})


async def test_old_turns_are_left_out_where_that_is_asked_for() -> None:
    scripted = engine("ok", max_model_len=300)
    answering = responder(scripted)
    turns = [
        message
        for number in range(20)
        for message in ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "answer"})
    ]
    request = {"instructions": "Be brief.", "input": [*turns, {"role": "user", "content": "the last one"}]}
    with pytest.raises(PromptTooLongError):
        await answering.create(request)
    made = await answering.create({**request, "truncation": "auto"})
    assert (made.status, made.truncation) == ("completed", "auto")
    shown = scripted.template_calls[-1].messages
    assert shown[0] == {"role": "system", "content": "Be brief."}
    assert (shown[1]["role"], shown[-1]["content"]) == ("user", "the last one")
    assert 3 < len(shown) < len(turns)
    with pytest.raises(PromptTooLongError):
        await answering.create({"input": "x" * 400, "truncation": "auto"})


async def test_responses_follow_each_other(kept: ResponseStore) -> None:
    scripted = engine(lambda prompt: f"answer {prompt.count('user')}")
    answering = responder(scripted, store=kept)
    first = await answering.create({"input": "one", "instructions": "Only now."}, owner="a")
    second = await answering.create({"input": "two", "previous_response_id": first.id}, owner="a")
    third = await answering.create({"input": "three", "previous_response_id": second.id, "store": False}, owner="a")
    assert [message["content"] for message in scripted.template_calls[-1].messages] == [
        "one", "answer 1", "two", "answer 2", "three",
    ]  # fmt: skip
    assert (first.store, third.store) == (True, False)
    with pytest.raises(NotStoredError):
        await kept.get("a", third.id)
    assert second.previous_response_id == first.id
    with pytest.raises(NotStoredError):
        await answering.create({"input": "x", "previous_response_id": first.id}, owner="b")
    (given,) = json.loads((await kept.get("a", first.id)).given)
    assert given["id"].startswith("msg_")


async def test_conversations_and_references(kept: ResponseStore) -> None:
    scripted, name = engine("ok"), await conversation(kept)
    answering = responder(scripted, store=kept)
    first = await answering.create({"input": "one", "conversation": name})
    assert first.conversation is not None
    await answering.create({"input": "two", "conversation": {"id": name}})
    assert [message["content"] for message in scripted.template_calls[-1].messages] == ["one", "ok", "two"]
    assert len(await kept.conversation_items("", name)) == 4
    third = await answering.create({"input": "three", "conversation": name, "store": False})
    assert len(await kept.conversation_items("", name)) == 6
    with pytest.raises(NotStoredError):
        await kept.get("", third.id)
    reference = {"type": "item_reference", "id": msgspec.to_builtins(first.output[0])["id"]}
    items = [{"role": "user", "content": "x"}, reference, {"role": "user", "content": "y"}]
    await answering.create({"input": items, "store": False})
    assert [message["content"] for message in scripted.template_calls[-1].messages] == ["x", "ok", "y"]
    with pytest.raises(InvalidParameterError) as refusal:
        await answering.create({"input": [{"type": "item_reference", "id": "nothing"}]})
    assert refusal.value.param == "input.0.id"


async def test_what_cannot_be_kept_is_told() -> None:
    class Full(ResponseStore):
        async def put(self, entry: Entry) -> None:
            raise CandleVllmError("no room")

    answering = responder(engine(), store=Full(StoreOptions()))
    events, made = await streamed(answering, {"input": "Hi"})
    assert (made["status"], events[-2]["type"]) == ("failed", "error")
    with pytest.raises(CandleVllmError, match="no room"):
        await answering.create({"input": "Hi"})


async def test_tokens_are_counted_without_an_answer() -> None:
    scripted = engine()
    answering = responder(scripted, servers=Servers(Clock()))
    request = {"input": "Hi", "instructions": "Be brief.", "tools": [SERVER]}
    counted = await answering.count_input_tokens(request)
    assert not scripted.requests
    made = await answering.create(request)
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens
    with pytest.raises(UnsupportedParameterError):
        await Responder(InProcessModel(OpenAIAdapter(scripted))).count_input_tokens(request)


async def test_more_messages_than_a_model_is_shown(kept: ResponseStore) -> None:
    scripted, name = engine("ok", max_model_len=1 << 20), await conversation(kept)
    answering = responder(scripted, store=kept)
    many = [{"id": f"msg_{n}", "type": "message", "role": "user" if n % 2 else "assistant", "content": "x"}
            for n in range(MAX_MESSAGES + 9)]  # fmt: skip
    await kept.append("", name, many)
    with pytest.raises(InvalidParameterError, match="truncation: auto") as refusal:
        await answering.create({"input": "Hi", "conversation": name})
    assert refusal.value.param == "conversation"
    made = await answering.create({"input": "Hi", "conversation": name, "truncation": "auto"})
    assert made.status == "completed"
    assert MAX_MESSAGES - 8 < len(scripted.template_calls[-1].messages) <= MAX_MESSAGES
    stream = await answering.prepare(
        {"input": "Hi", "previous_response_id": made.id, "truncation": "auto", "background": True}, at_once=True
    )
    await stream.aclose()


async def test_an_agreement_to_a_call_that_cannot_run_is_refused() -> None:
    clock = Clock()
    answering = responder(engine(call("s__time")), servers=Servers(clock))
    asking = {**SERVER, "require_approval": "always"}
    _, response = await streamed(answering, {"input": "Hi", "tools": [asking]})
    made = response["output"]
    agreed = {"type": "mcp_approval_response", "approval_request_id": made[-1]["id"], "approve": True}
    given = [{"role": "user", "content": "Hi"}, *made, agreed]
    for tools in ([], [{**asking, "allowed_tools": ["other"]}]):
        with pytest.raises(InvalidParameterError, match="no such tool") as refusal:
            await answering.create({"input": given, "tools": tools})
        assert refusal.value.param == f"input.{len(given) - 1}.approval_request_id"
    assert clock.runs == 0


async def test_an_approval_does_not_outlive_an_answer_without_its_call(kept: ResponseStore) -> None:
    """While the server was down, the approved call could not run; the conversation goes on without it."""
    clock = Clock()
    servers = Servers(clock)
    scripted = engine(lambda prompt: "It is down." if "tool\n" in prompt else call("s__time"))
    answering = responder(scripted, store=kept, servers=servers)
    request = {"tools": [{**SERVER, "require_approval": "always"}]}
    _, asked = await streamed(answering, {**request, "input": "Hi"})
    servers.tools, servers.error = (), "no route"
    agreed = {"type": "mcp_approval_response", "approval_request_id": asked["output"][-1]["id"], "approve": True}
    _, down = await streamed(answering, {**request, "input": [agreed], "previous_response_id": asked["id"]})
    listed, said = down["output"]
    assert (listed["type"], listed["error"], said["type"]) == ("mcp_list_tools", "no route", "message")
    servers.tools, servers.error = (clock,), None
    _, after = await streamed(answering, {**request, "input": "And now?", "previous_response_id": down["id"]})
    assert ([item["type"] for item in after["output"]], clock.runs) == (["message"], 0)


@pytest.mark.parametrize("stored", [True, False])
async def test_an_approved_call_beyond_a_limit_does_not_end_the_conversation(kept: ResponseStore, stored: bool) -> None:
    """It can still run in the next response; once the user goes on, it counts as not run."""
    scripted = engine(lambda prompt: "Done." if "tool\n" in prompt else call("s__time") + call("s__date"))
    answering = responder(scripted, store=kept, servers=Servers(clock := Clock(), date := Clock("date")))
    tools = {"tools": [{**SERVER, "require_approval": "always"}]}
    given: list[Any] = [{"role": "user", "content": "Hi"}]
    last: dict[str, Any] = {}

    async def ask(*items: Any, **fields: Any) -> dict[str, Any]:
        before = {"previous_response_id": last["id"]} if stored and last else {}
        given.extend(items)
        request = {**tools, **before, **fields, "input": list(items) if before else given}
        last.update(json.loads(to_json_bytes(await answering.create(request))))
        given.extend(last["output"])
        return last

    asked = [item["id"] for item in (await ask())["output"] if item["type"] == "mcp_approval_request"]
    agreed = [{"type": "mcp_approval_response", "approval_request_id": name, "approve": True} for name in asked]
    assert (await ask(*agreed, max_tool_calls=1))["incomplete_details"] == {"reason": "max_tool_calls"}
    assert (await ask({"role": "user", "content": "And now?"}))["output"][-1]["content"][0]["text"] == "Done."
    assert (clock.runs, date.runs) == (1, 0)
    results = [message["content"] for message in scripted.template_calls[-1].messages if message["role"] == "tool"]
    assert results == ["noon {}", "This call was not run."]


async def test_a_queued_response_waits_for_nothing_that_takes_time(kept: ResponseStore) -> None:
    """Neither for its conversation's turn nor for servers; what is wrong from there on is told in events."""
    opened = asyncio.Event()

    class Hanging(Servers):
        @asynccontextmanager
        async def open(self, tool: McpTool) -> AsyncIterator[OpenServer]:
            await opened.wait()
            async with super().open(tool) as server:
                yield server

    name, servers = await conversation(kept), Hanging(Clock())
    answering = responder(engine("ok"), store=kept, servers=servers)
    asked = {"input": "Hi", "conversation": name, "background": True, "tools": [SERVER]}
    async with asyncio.timeout(60):
        stream = await answering.prepare(asked, at_once=True)
        assert stream.response.status == "queued"
        assert [item["role"] for item in stream.input_items] == ["user"]
        opening = stream.opening()
        await stream.start()
        opened.set()
        events = [*opening, *[event async for event in stream]]
    made = judge_events([json.loads(to_json_bytes(event)) for event in events])
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools", "message"]
    assert servers.open_now == 0
    async with asyncio.timeout(60), kept.turn("", name):  # it was given back
        pass

    wrong = {**asked, "input": [{"type": "function_call_output", "call_id": "none", "output": "x"}]}
    stream = await answering.prepare(wrong, at_once=True)
    opening = stream.opening()
    await stream.start()
    events = [*opening, *[event async for event in stream]]
    made = judge_events([json.loads(to_json_bytes(event)) for event in events])
    assert (made["status"], made["error"]["code"]) == ("failed", "invalid_prompt")
    assert servers.open_now == 0
    async with asyncio.timeout(60), kept.turn("", name):  # it was given back
        pass


async def test_nobody_works_on_a_background_response_that_is_only_created() -> None:
    with pytest.raises(UnsupportedParameterError) as refusal:
        await responder(engine(), store=ResponseStore(StoreOptions())).create({"input": "Hi", "background": True})
    assert refusal.value.param == "background"


async def test_a_stream_that_is_ended_while_it_is_kept_has_failed() -> None:
    """Its last event has not been sent: it says what became of the response."""
    keeping = asyncio.Event()

    class Slow(ResponseStore):
        async def put(self, entry: Entry) -> None:
            keeping.set()
            await asyncio.sleep(60)

    stream = await responder(engine("ok"), store=Slow(StoreOptions())).create_stream({"input": "Hi"})
    events: list[Any] = []

    async def read() -> None:
        async for event in stream:
            events.append(event)

    reading = asyncio.create_task(read())
    await keeping.wait()
    await until(lambda: events and type(events[-1]).__name__ == "OutputItemDone")
    events += stream.stop(ErrorBody(type="server_error", code="timeout", message="too late", param=None))
    await stream.aclose()
    await reading
    made = judge_events([json.loads(to_json_bytes(event)) for event in events])
    assert (made["status"], made["error"]["message"]) == ("failed", "too late")


async def test_servers_by_url_are_bounded_in_number() -> None:
    servers = McpServers(ToolRegistry(), allowed_urls=("https://example.com/*",))
    tools = [{"type": "mcp", "server_label": f"s{n}", "server_url": "https://example.com/mcp"} for n in range(17)]
    with pytest.raises(InvalidParameterError) as refusal:
        await responder(engine(), servers=servers).create({"input": "Hi", "tools": tools})
    assert refusal.value.param == "tools.16.server_url"


async def test_a_stop_string_ends_the_answer_and_not_the_thoughts() -> None:
    answering = responder(engine("<think>Paris is it. Or not?</think>\n\nParis. It is."))
    request = {"input": "Where?", "stop": ["."]}
    whole = json.loads(to_json_bytes(await answering.create(request)))
    assert [item["content"][0]["text"] for item in whole["output"]] == ["Paris is it. Or not?", "Paris"]
    _, response = await streamed(answering, request)
    assert alike(response) == alike(whole)
