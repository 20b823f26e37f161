# SPDX-License-Identifier: MIT
"""`/v1/responses` over HTTP, with the official client: whole, streamed, in the background, and how it fails."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import uvicorn
from mcp.server import MCPServer
from pydantic import BaseModel

from candle_vllm.core.errors import EngineOverloadedError, ModelLoadError
from candle_vllm.responses.api.mcp_source import McpServers
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.server import Settings
from candle_vllm.server.mailbox.policy import MAILBOX_MODE
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import FakeLoader, PacedEngine
from tests.response_judges import judge_events, judge_response

Start = Callable[..., Any]
ASK: dict[str, Any] = {"model": "scripted", "input": "Hi"}
TEMPLATE = "{{ tools }}<tool_call>"
FUNCTION: dict[str, Any] = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def calling(text: str = CALL, **options: Any) -> PacedEngine:
    return PacedEngine(text, chat_template=TEMPLATE, **options)


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of a stream's events; each has its type as its name, and [DONE] is the end."""
    *blocks, done = [block for block in text.split("\n\n") if block]
    assert done == "data: [DONE]"
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_whole_and_streamed_are_the_same(start: Start) -> None:
    client = start(PacedEngine("Good day!")).openai()
    whole = client.responses.create(**ASK)
    judge_response(whole.to_dict())
    with client.responses.stream(**ASK) as stream:
        events = [event for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    assert whole.output_text == "".join(event.delta for event in events) == streamed.output_text == "Good day!"
    assert events[-1].snapshot == "Good day!"
    assert whole.usage == streamed.usage


def test_every_event_is_judged(start: Start) -> None:
    engine = calling("<think>Hm.</think>\n\nI call. " + CALL)
    with start(engine, reasoning_parser="think").http() as client:
        answer = client.post("/v1/responses", json={**ASK, "stream": True, "tools": [FUNCTION, {"type": "web_search"}]})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-warning"] == "tools.1: a tool of type 'web_search' does not run here and is left out"
    made = judge_events(events_of(answer.text))
    assert [item["type"] for item in made["output"]] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_sender_should_know_is_in_the_headers(start: Start, stream: bool) -> None:
    schema = {"type": "object", "properties": {"é\nß": {"maxLenght": 3}}}
    chat = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ours = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    with start(PacedEngine("{}")).http() as client:
        answers = [
            client.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "Hi"}], "response_format": chat, "stream": stream},
            ),
            client.post("/v1/completions", json={"prompt": "Hi", "response_format": chat, "stream": stream}),
            client.post("/v1/responses", json={**ASK, "text": ours, "stream": stream}),
        ]
        plain = client.post("/v1/completions", json={"prompt": "Hi", "stream": stream})
    place = "#/properties/\\xe9\\u000a\\xdf"
    told = f"the JSON schema has 'maxLenght' (at {place}), which is unknown and has no effect: "
    told += "did you mean 'maxLength'?"
    assert [answer.headers.get("x-warning") for answer in answers] == [told] * 3
    assert "x-warning" not in plain.headers


def test_calls_of_other_services_are_kept_and_not_shown(start: Start) -> None:
    engine = PacedEngine("Good day!")
    search = {
        "type": "web_search_call",
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "q"},
    }
    shell = {"type": "local_shell_call_output", "id": "sh_1", "output": "secret"}
    with start(engine).http() as client:
        plain = client.post("/v1/responses", json={"input": [{"role": "user", "content": "Hi"}]})
        made = client.post("/v1/responses", json={"input": [search, {"role": "user", "content": "Hi"}, shell]})
        assert (made.status_code, "x-warning" in plain.headers) == (200, False)
        assert made.headers["x-warning"].startswith("items of the type 'web_search_call' have no effect")
        kept = client.get(f"/v1/responses/{made.json()['id']}/input_items", params={"order": "asc"}).json()["data"]
        assert (kept[0], kept[2]["output"]) == (search, "secret")
        follow = {"input": "And?", "previous_response_id": made.json()["id"]}
        assert client.post("/v1/responses", json=follow).status_code == 200
    first, second, third = (each.prompt_token_ids for each in engine.requests)
    assert first == second == third[: len(first)]


def test_a_tool_of_the_client(start: Start) -> None:
    client = start(calling()).openai()
    first = client.responses.create(**ASK, tools=[FUNCTION])
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"a": 1}
    with client.responses.stream(**ASK, tools=[FUNCTION]) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "one"}
    second = client.responses.create(model="scripted", previous_response_id=first.id, input=[result])  # type: ignore[list-item]
    assert second.previous_response_id == first.id
    replayed = client.responses.create(
        model="scripted", store=False, input=[{"role": "user", "content": "Hi"}, call.to_dict(), result]  # type: ignore[list-item]
    )  # fmt: skip
    assert replayed.usage is not None
    assert second.usage is not None
    assert replayed.usage.input_tokens == second.usage.input_tokens


def test_a_parsed_answer(start: Start) -> None:
    class Answer(BaseModel):
        city: str

    client = start(PacedEngine('{"city": "Paris"}')).openai()
    parsed = client.responses.parse(**ASK, text_format=Answer)
    assert parsed.output_parsed == Answer(city="Paris")


def test_in_the_background(start: Start) -> None:
    running = start(PacedEngine("Good day!", pause=0.01))
    client = running.openai()
    queued = client.responses.create(**ASK, background=True)
    assert (queued.status, queued.background, queued.output) == ("queued", True, [])
    running.wait_for(lambda: client.responses.retrieve(queued.id).status == "completed")
    assert client.responses.retrieve(queued.id).output_text == "Good day!"
    events = [event.to_dict() for event in client.responses.create(**ASK, background=True, stream=True)]
    made = judge_events(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert client.responses.retrieve(made["id"]).to_dict() == made
    with running.http() as http:
        stored = http.post("/v1/responses", json={**ASK, "background": True, "store": False})
    assert (stored.status_code, stored.json()["error"]["param"]) == (400, "store")


def test_a_background_response_that_the_engine_refuses(start: Start) -> None:
    running = start(PacedEngine(submit_error=EngineOverloadedError("full")))
    client = running.openai()
    queued = client.responses.create(**ASK, background=True)
    running.wait_for(lambda: client.responses.retrieve(queued.id).status == "failed")
    error = client.responses.retrieve(queued.id).error
    assert error is not None
    assert error.message == "full"


def test_tokens_are_counted(start: Start) -> None:
    running = start(calling("ok"))
    client = running.openai()
    counted = client.responses.input_tokens.count(**ASK, tools=[FUNCTION])
    usage = client.responses.create(**ASK, tools=[FUNCTION]).usage
    assert usage is not None
    assert counted.input_tokens == usage.input_tokens


def test_without_a_store(start: Start) -> None:
    running = start(responses_store="off")
    client = running.openai()
    made = client.responses.create(**ASK)
    assert made.to_dict()["store"] is False
    for change in ({"store": True}, {"background": True}, {"previous_response_id": made.id}):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.responses.create(**ASK, **change)  # type: ignore[call-overload]
        assert refusal.value.param == next(iter(change))


def test_a_key_is_needed_and_separates_owners(start: Start) -> None:
    running = start(api_key=("one", "two"))
    made = running.openai("one").responses.create(**ASK)
    with pytest.raises(openai.AuthenticationError):
        running.openai("wrong").responses.create(**ASK)
    with running.http() as http:
        assert http.post("/v1/responses/input_tokens", json=ASK).status_code == 401
    follow = {**ASK, "previous_response_id": made.id}
    with pytest.raises(openai.BadRequestError) as refusal:
        running.openai("two").responses.create(**follow)
    assert refusal.value.code == "previous_response_not_found"
    assert running.openai("one").responses.create(**follow).previous_response_id == made.id


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "max_output_tokens"),
        (
            {"tools": [{**FUNCTION, "parameters": {"$ref": "http://a/b"}}]},
            openai.BadRequestError,
            "tools.0.parameters.$ref",
        ),
        ({"input": "x" * 5000}, openai.BadRequestError, "input"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"stream": True}], ids=["whole", "stream"])
def test_wrong_requests(start: Start, change: Any, kind: type[openai.APIStatusError], param: str, mode: Any) -> None:
    with pytest.raises(kind) as refusal:
        start(calling(), strict_model_names=True).openai().responses.create(**{**ASK, **change, **mode})
    assert refusal.value.body["param"] == param  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "max_output_tokens"),
        ({"tools": [FUNCTION, FUNCTION]}, openai.BadRequestError, "tools.1.name"),
        ({"previous_response_id": "resp_x"}, openai.BadRequestError, "previous_response_id"),
        ({"conversation": "conv_x"}, openai.NotFoundError, "conversation"),
    ],
)
def test_wrong_requests_in_the_background(
    start: Start, change: Any, kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as refusal:
        start(calling(), strict_model_names=True).openai().responses.create(**{**ASK, **change, "background": True})
    assert refusal.value.body["param"] == param  # type: ignore[index]


def test_the_server_s_own_refusals(start: Start) -> None:
    running = start(PacedEngine(submit_error=EngineOverloadedError("full")), max_body_mb=1)
    with running.http() as client:
        for response, status in [
            (client.post("/v1/responses", content=b"{"), 415),
            (client.post("/v1/responses", content=b"{", headers={"content-type": "application/json"}), 400),
            (client.post("/v1/responses", json={"input": "y" * (2 << 20)}), 413),
            (client.post("/v1/responses", json=ASK), 503),
            (client.post("/v1/responses", json={**ASK, "stream": True}), 503),
            (client.post("/v1/responses", json=ASK, headers={MAILBOX_MODE: "always"}), 400),
            (client.post("/v1/responses/nothing", json=ASK), 404),
        ]:
            assert response.status_code in (status, 405 if status == 404 else status), response.text
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_model_that_cannot_be_loaded(start: Start) -> None:
    loader = FakeLoader()
    loader.broken["scripted"] = ModelLoadError("broken")
    running = start(ModelManager(Catalogue([ModelEntry("scripted", Settings())]), loader))
    with running.http() as client:
        for mode in ({}, {"stream": True}, {"background": True}):
            assert client.post("/v1/responses", json={**ASK, **mode}).status_code == 503


def test_a_stream_that_fails_says_so_to_the_end(start: Start) -> None:
    with start(PacedEngine("abcdef", fail_after=3)).http() as client:
        made = judge_events(events_of(client.post("/v1/responses", json={**ASK, "stream": True}).text))
        assert client.post("/v1/responses", json=ASK).status_code == 500
    assert (made["status"], made["error"]["code"]) == ("failed", "server_error")
    assert made["output"][0]["status"] == "incomplete"


def test_a_stream_that_takes_too_long(start: Start) -> None:
    running = start(PacedEngine("a long answer " * 50, pause=0.05), request_timeout=1)
    with running.http() as client:
        made = judge_events(events_of(client.post("/v1/responses", json={**ASK, "stream": True}).text))
    assert made["status"] in ("failed", "incomplete")
    running.wait_for(lambda: running.engine.stats().num_running == 0)


@pytest.fixture
def clock() -> Iterator[tuple[str, list[str]]]:
    """A real MCP server at a URL, and the tokens that it is asked with."""
    server, tokens = MCPServer("clock"), list[str]()

    @server.tool()
    async def time(zone: str) -> str:
        return f"noon in {zone}"

    app = server.streamable_http_app()

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        tokens.extend(value.decode() for name, value in scope.get("headers", ()) if name == b"authorization")
        await app(scope, receive, send)

    uvicorn_server = uvicorn.Server(uvicorn.Config(noting, port=0, log_config=None, timeout_graceful_shutdown=0))
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    Running.wait_for(lambda: uvicorn_server.started)
    yield f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}/mcp", tokens
    uvicorn_server.should_exit = uvicorn_server.force_exit = True
    thread.join(60)
    assert not thread.is_alive()


def test_an_mcp_server_at_a_url(start: Start, clock: tuple[str, list[str]]) -> None:
    url, tokens = clock
    order = '<tool_call>\n{"name": "s__time", "arguments": {"zone": "UTC"}}\n</tool_call>'
    running = start(PacedEngine(lambda prompt: "Noon." if "tool\nnoon" in prompt else order, chat_template=TEMPLATE))
    client = running.openai()
    tool: Any = {"type": "mcp", "server_label": "s", "server_url": url, "authorization": "tok"}
    tool["require_approval"] = "never"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(**ASK, tools=[tool])
    assert refusal.value.param == "tools.0.server_label"  # there is no such feature until the operator allows it
    running.server.config.app.state.response_servers = McpServers(ToolRegistry(), allowed_urls=(url,))
    with client.responses.stream(**ASK, tools=[tool]) as stream:
        types = [event.type for event in stream]
    made = client.responses.create(**ASK, tools=[tool])
    judge_response(made.to_dict())
    assert [item.type for item in made.output] == ["mcp_list_tools", "mcp_call", "message"]
    assert made.output[1].output == "noon in UTC"  # type: ignore[union-attr]
    assert "response.mcp_call.completed" in types
    assert set(tokens) == {"Bearer tok"}
    assert "tok" not in json.dumps(made.to_dict()["tools"])
    asked = client.responses.create(**ASK, tools=[{**tool, "require_approval": "always"}])
    request = asked.output[-1]
    assert request.type == "mcp_approval_request"
    agreed: Any = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
    after = client.responses.create(
        model="scripted", previous_response_id=asked.id, input=[agreed], tools=[{**tool, "require_approval": "always"}]
    )
    assert [item.type for item in after.output] == ["mcp_call", "message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts(start: Start, stream: bool) -> None:
    running = start(PacedEngine("word " * 500, pause=0.01))
    running.leave("/v1/responses", {**ASK, "stream": stream}, lambda: running.engine.stats().generation_tokens)
    running.wait_for(lambda: running.engine.aborted)
    running.wait_for(lambda: running.engine.stats().num_running == 0)


def test_many_at_once(start: Start) -> None:
    running = start(PacedEngine(lambda prompt: f"answer to {prompt.split('user')[1].split()[0]}", pause=0.001))
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        with running.http() as client:
            body = {**ASK, "input": f"q{number} please", "store": number % 2 == 0}
            made = client.post("/v1/responses", json=body).json()
            answers[number] = made["output"][0]["content"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {number: f"answer to q{number}" for number in range(20)}


def test_the_only_model_answers_by_every_name_and_says_who_it_is(start: Start) -> None:
    client = start().openai()
    assert client.responses.create(**{**ASK, "model": "gpt-4.1"}).model == "scripted"
    assert client.responses.create(**{**ASK, "model": "scripted"}).model == "scripted"
    assert client.responses.create(**{**ASK, "model": ""}).model == "scripted"


@pytest.mark.usefixtures("movable_clock")
@pytest.mark.parametrize("way", ["responses", "background", "messages"])
def test_silence_is_broken_by_events_that_clients_count(start: Start, way: str) -> None:
    """Codex and Claude Code give up a stream on which no event has come for a while; a comment is none to them."""
    running = start(PacedEngine("abc", first_pause=60))
    body: dict[str, Any] = {**ASK, "background": way == "background"}
    if way == "messages":
        body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    path = "/v1/messages" if way == "messages" else "/v1/responses"
    with running.http() as client, client.stream("POST", path, json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        running.wait_for(lambda: running.engine.pausing)
        for _ in range(3):
            running.skip(20.5)
        text = "\n".join(lines)
    assert ": keep-alive" not in text
    if way == "messages":
        assert re.findall("event: (.*)", text)[:4] == ["message_start", "ping", "ping", "ping"]
        return
    data = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    silent = [place for place, event in enumerate(data) if event["type"] == "keepalive"]
    assert len(silent) >= 2
    assert all(data[place]["sequence_number"] == data[place - 1]["sequence_number"] for place in silent)
    judge_events([event for event in data if event["type"] != "keepalive"])
