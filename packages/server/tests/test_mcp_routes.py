# SPDX-License-Identifier: MIT
"""`/v1/mcp`: servers, tools, and calls of clients."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from candle_vllm.server.app import create_app
from candle_vllm.server.mcp.service import McpService
from candle_vllm.server.routes import mcp as routes
from candle_vllm.server.routes.webui import new_page_key
from packages.server.tests.mcp_fakes import HttpMcpServer, Seen, stdio_config
from packages.server.tests.server_fakes import PacedEngine
from packages.server.tests.wrong_requests.rows import GONE, LONG, Route, Row, changed
from tests.waiting import PATIENCE, wait_for

Start = Callable[..., Any]
KEY = {"authorization": "Bearer k"}
CALL = {"name": "web__echo", "arguments": {"text": "hi"}, "approved": True}
ROUTE = Route(
    "/v1/mcp/call",
    CALL,
    [
        Row("name", GONE), Row("name", None), Row("name", ""), Row("name", 1), Row("name", LONG), Row("name", ["a"]),
        Row("name", "web__ech", status=404, code="tool_not_found"),
        Row("arguments", "{}"), Row("arguments", []), Row("arguments", 1),
        Row("approved", GONE), Row("approved", False), Row("approved", None), Row("approved", "true"),
        Row("approved", 1),
        Row("argumants", {}, code="unknown_parameter"), Row("server", "web", code="unknown_parameter"),
        Row("", [], ""), Row("", 1, ""),
    ],
)  # fmt: skip


@pytest.fixture
def client(start_mcp: Start, web: HttpMcpServer) -> Iterator[httpx.Client]:
    with start_mcp(PacedEngine(), [web.config(auto_approve=["e*"])], api_key=("k",)).http(headers=KEY) as client:
        yield client


def check(path: str, method: str, value: Any) -> None:
    """The answer is as the document says, and has nothing else."""
    document = create_app(PacedEngine()).openapi()
    for schema in document["components"]["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
    whole = {**schema, "components": document["components"]}
    assert [str(error) for error in jsonschema_rs.Draft202012Validator(whole).iter_errors(value)] == []


def test_servers(start_mcp: Start, web: HttpMcpServer, tmp_path: Path) -> None:
    configs = [
        web.config(),
        stdio_config(tmp_path, "off", enabled=False),
        stdio_config(tmp_path, "bad", command="no-such-program", args=["--token", "hunter2"], env={"A": "hunter3"}),
    ]
    with start_mcp(PacedEngine(), configs).http() as client:
        answer = client.get("/v1/mcp/servers")
        check("/v1/mcp/servers", "get", answer.json())
        first, off, bad = answer.json()["data"]
        assert (first["name"], first["transport"], first["state"]) == ("web", "http", "ready")
        assert (first["error"], first["tools_count"], first["reconnects"]) == (None, 3, 0)
        assert first["protocol_version"] == "2026-07-28"
        assert first["log"]
        assert (off["state"], off["tools_count"]) == ("disabled", 0)
        assert bad["state"] in ("failed", "connecting")
        assert "no-such-program" in bad["error"]
        assert "hunter" not in answer.text


def test_a_call_waits_for_a_server_that_is_starting(
    start_mcp: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, settled = threading.Event(), McpService.settled

    async def seen(service: McpService) -> None:
        waits.set()
        await settled(service, PATIENCE)

    monkeypatch.setattr(McpService, "settled", seen)
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import pathlib, runpy, sys, time\n"
        "gate, program, *sys.argv[1:] = sys.argv[1:]\n"
        "while not pathlib.Path(gate).exists():\n"
        "    time.sleep(0.01)\n"
        "runpy.run_path(program, run_name='__main__')\n"
    )
    usual = stdio_config(tmp_path)
    config = dataclasses.replace(usual, args=["-S", str(slow), str(tmp_path / "gate"), *usual.args[1:]])
    call = {"name": "numbers__double", "arguments": {"n": 21}, "approved": True}
    with (
        start_mcp(PacedEngine(), [config], api_key=("k",), settled=False).http(headers=KEY) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.post, "/v1/mcp/call", json=call)
        assert waits.wait(PATIENCE)
        (tmp_path / "gate").touch()
        assert (answer.result().status_code, answer.result().json()["text"]) == (200, "42")


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"api_key": ("one",)}, True),
        ({"api_key": ("one", "other")}, True),  # each of them is an operator's key as well
        ({"api_key": ("one",), "management_key": ("operator",)}, True),
        ({"api_key": ("one", "other"), "management_key": ("operator",)}, False),
        ({"management_key": ("operator",)}, False),  # clients need no key, so anybody may have made the calls
        ({"management_key": ("one",)}, True),
    ],
)
def test_a_log_may_tell_of_the_calls_of_other_keys(
    start_mcp: Start, web: HttpMcpServer, keys: dict[str, tuple[str, ...]], shown: bool
) -> None:
    with start_mcp(PacedEngine(), [web.config()], **keys).http(headers={"x-api-key": "one"}) as client:
        [server] = client.get("/v1/mcp/servers").json()["data"]
    assert server["tools_count"] == 3
    assert bool(server["log"]) == shown


def test_tools(client: httpx.Client) -> None:
    answer = client.get("/v1/mcp/tools").json()
    check("/v1/mcp/tools", "get", answer)
    echo, slow, _ = answer["data"]
    assert (echo["type"], echo["server"], echo["original_name"], echo["read_only"]) == (
        "function",
        "web",
        "echo",
        False,
    )
    assert echo["function"]["name"] == "web__echo"
    assert echo["function"]["description"] == "Says it again."
    assert echo["function"]["parameters"]["properties"]["text"]["type"] == "string"
    assert (echo["auto_approve"], slow["auto_approve"]) == (True, False)


def test_a_call(client: httpx.Client, seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = client.post("/v1/mcp/call", json={**CALL, "arguments": {"text": "secret words"}}).json()
    check("/v1/mcp/call", "post", answer)
    assert answer.pop("seconds") >= 0
    assert answer == {
        "status": "completed",
        "content": [{"kind": "text", "text": "secret words"}],
        "structured": {"result": "secret words"},
        "is_error": False,
        "text": "secret words",
    }
    assert seen.texts == ["secret words"]
    assert any("web__echo" in line for line in caplog.messages)
    assert not any("secret words" in line for line in caplog.messages)
    assert 'server="web",status="completed"} 1.0' in client.get("/metrics").text


def test_calls_that_fail_are_answers(client: httpx.Client) -> None:
    failed = client.post("/v1/mcp/call", json={"name": "web__fail", "approved": True})
    assert (failed.status_code, failed.json()["status"], failed.json()["is_error"]) == (200, "failed", True)
    check("/v1/mcp/call", "post", failed.json())
    wrong = client.post("/v1/mcp/call", json={**CALL, "arguments": {"text": 3}})
    assert (wrong.status_code, wrong.json()["status"], wrong.json()["seconds"]) == (200, "invalid_arguments", 0)
    assert "schema" in wrong.json()["text"]


def test_wrong_requests(client: httpx.Client, seen: Seen) -> None:
    assert client.post(ROUTE.path, json=ROUTE.right).status_code == 200
    for row in ROUTE.rows:
        answer = client.post(ROUTE.path, json=changed(ROUTE.right, row))
        assert answer.status_code == row.status, (str(row), answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == (row.blamed or None), str(row)
        assert row.code in (None, error["code"])
    assert len(seen.texts) == 1
    assert "web__echo" in client.post(ROUTE.path, json={**CALL, "name": "web__ech"}).json()["error"]["message"]
    assert client.post(ROUTE.path, content=b"{}").status_code == 415
    assert client.get("/v1/mcp/call").status_code == 405


def test_large_arguments(start_mcp: Start, web: HttpMcpServer) -> None:
    running = start_mcp(PacedEngine(), [web.config()], api_key=("k",), max_body_mb=2)
    with running.http(headers=KEY) as client:
        large = client.post("/v1/mcp/call", json={**CALL, "arguments": {"text": "x" * (1 << 20)}})
        assert large.json()["status"] == "invalid_arguments"
        assert client.post("/v1/mcp/call", json={**CALL, "arguments": {"text": "x" * (3 << 20)}}).status_code == 413


def test_without_servers_there_is_nothing(start: Start) -> None:
    with start(api_key=("k",)).http(headers=KEY) as client:
        for method, path in (("GET", "/v1/mcp/servers"), ("GET", "/v1/mcp/tools"), ("POST", "/v1/mcp/call")):
            answer = client.request(method, path, json=CALL if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "mcp_off")
            assert "--mcp-config" in answer.json()["error"]["message"]


def test_a_call_needs_a_server_with_keys(start_mcp: Start, web: HttpMcpServer, seen: Seen) -> None:
    with start_mcp(PacedEngine(), [web.config()]).http() as client:
        assert client.get("/v1/mcp/tools").status_code == 200
        answer = client.post("/v1/mcp/call", json=CALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "api_key_needed")
        assert "--api-key" in answer.json()["error"]["message"]
    with start_mcp(PacedEngine(), [web.config()], api_key=("k",)).http() as client:
        for path in ("/v1/mcp/servers", "/v1/mcp/tools"):
            assert client.get(path).status_code == 401
        assert client.post("/v1/mcp/call", json=CALL).status_code == 401
    assert seen.texts == []


def test_the_key_of_the_printed_address(start_mcp: Start, web: HttpMcpServer, seen: Seen) -> None:
    running = start_mcp(PacedEngine(), [web.config()], ui_server=True)
    state = running.server.config.app.state
    key = state.page_key = new_page_key(state.settings, True)
    right = {"authorization": f"Bearer {key}"}
    with running.http() as client:
        headers = ("Bearer", f"Bearer {key}x", key, f"Basic {key}", b"Bearer \xff")
        for wrong in ({}, {"x-api-key": key}, *({"authorization": value} for value in headers)):
            answer = client.post("/v1/mcp/call", json=CALL, headers=wrong)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "api_key_needed"), wrong
            assert key not in answer.text
            assert "#key=" in answer.json()["error"]["message"]
        twice = [("authorization", "Bearer x"), *right.items()]
        assert client.post("/v1/mcp/call", json=CALL, headers=twice).status_code == 403
        refused = client.post("/v1/mcp/call", json={**CALL, "approved": False}, headers=right)
        assert refused.status_code == 400
        assert seen.texts == []
        own = {**right, "origin": f"http://127.0.0.1:{running.port}"}
        assert client.post("/v1/mcp/call", json=CALL, headers=own).json()["status"] == "completed"
        assert client.post("/v1/mcp/call", json=CALL, headers=right).status_code == 200
    assert len(seen.texts) == 2


def test_calls_are_bounded_and_end_with_their_clients(
    client: httpx.Client, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MAX_CALLS", 2)
    body = {"name": "web__slow", "arguments": {"seconds": 60}, "approved": True}

    def leave() -> None:
        patience = httpx.Timeout(10, read=1.5)
        mine = httpx.Client(base_url=client.base_url, timeout=patience, trust_env=False)
        with mine, pytest.raises(httpx.ReadTimeout):
            mine.post("/v1/mcp/call", json=body, headers=KEY)

    threads = [threading.Thread(target=leave) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: seen.begun == 2)
    refused = client.post("/v1/mcp/call", json=CALL)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    for thread in threads:
        thread.join()
    wait_for(lambda: seen.cancelled == 2)
    wait_for(lambda: client.post("/v1/mcp/call", json=CALL).status_code == 200)


def test_a_call_ends_with_the_time_of_the_request(start_mcp: Start, web: HttpMcpServer, seen: Seen) -> None:
    running = start_mcp(PacedEngine(), [web.config()], api_key=("k",), request_timeout=3)
    with running.http(headers=KEY) as client:
        answer = client.post("/v1/mcp/call", json={"name": "web__slow", "arguments": {"seconds": 60}, "approved": True})
        assert answer.status_code == 504
    wait_for(lambda: seen.cancelled == 1)


def test_a_call_ends_with_the_time_of_the_tool(start_mcp: Start, web: HttpMcpServer) -> None:
    running = start_mcp(PacedEngine(), [web.config(timeout=0.5)], api_key=("k",))
    with running.http(headers=KEY) as client:
        answer = client.post("/v1/mcp/call", json={"name": "web__slow", "arguments": {"seconds": 60}, "approved": True})
        assert answer.json()["status"] == "timed_out"
        assert "0.5 seconds" in answer.json()["text"]
        assert 'server="web",status="timed_out"} 1.0' in client.get("/metrics").text
