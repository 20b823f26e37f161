# SPDX-License-Identifier: MIT
"""Tools of MCP servers in chat requests whose calls go back to the client, and the life of the servers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.responses.mcp import processes
from candle_vllm.server.mcp.options import McpOptions
from candle_vllm.server.mcp.service import McpService
from packages.server.tests.mcp_fakes import call_text, is_alive, stdio_config
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE

Start = Callable[..., Any]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200}
TOOL = {"type": "function", "function": {"name": "own", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that do not end by themselves are not waited for as long as in earnest."""
    monkeypatch.setattr(processes, "GRACE", 0.4)


def shown(engine: PacedEngine) -> list[str]:
    """The tools that the last prompt was made with."""
    return [tool["function"]["name"] for tool in engine.template_calls[-1].options.get("tools") or ()]


def test_a_request_without_tools_is_given_those_of_the_servers(start_mcp: Start, web: Any, tmp_path: Path) -> None:
    engine = PacedEngine(call_text("numbers__double", n=21))
    running = start_mcp(engine, [web.config(), stdio_config(tmp_path, excluded_tools=["die"])])
    answer = running.openai().chat.completions.create(model="default", messages=CHAT["messages"])
    assert shown(engine) == ["web__echo", "web__slow", "web__fail", "numbers__double"]
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("numbers__double", {"n": 21})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert "mcp_calls" not in answer.choices[0].model_dump()
    stream = running.openai().chat.completions.create(model="default", messages=CHAT["messages"], stream=True)
    deltas = [choice for chunk in stream for choice in chunk.choices]
    assert "numbers__double" in [call.function.name for one in deltas for call in one.delta.tool_calls or ()]
    assert deltas[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"tools": []}, []),
        ({"tool_choice": "none"}, []),
        ({"tools": [TOOL]}, ["own"]),
        ({"tools": None}, ["web__echo"]),
        ({"tool_choice": "auto"}, ["web__echo"]),
        ({"response_format": {"type": "json_object"}}, []),  # the answer could not be a call
        ({"response_format": {"type": "text"}}, ["web__echo"]),
        ({"tool_choice": "required"}, ["web__echo"]),
        ({"tool_choice": {"type": "function", "function": {"name": "web__echo"}}}, ["web__echo"]),
    ],
)
def test_who_is_given_tools(start_mcp: Start, web: Any, more: dict[str, Any], expected: list[str]) -> None:
    engine = PacedEngine("Hello!")
    with start_mcp(engine, [web.config(allowed_tools=["echo"])]).http() as client:
        answer = client.post("/v1/chat/completions", json={**CHAT, **more})
        assert answer.status_code == 200, answer.text
        assert shown(engine) == expected


def test_a_model_whose_template_shows_no_tools(start_mcp: Start, web: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = PacedEngine("Hello!")
    with start_mcp(engine, [web.config()], tool_parser=None).http() as client:
        for _ in range(3):
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert answer.json()["choices"][0]["message"]["content"] == "Hello!"
            assert shown(engine) == []
        refused = client.post("/v1/chat/completions", json={**CHAT, "tool_choice": "required"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    lines = [one for one in caplog.messages if "gets no MCP tools" in one]
    assert len(lines) == 1


def test_a_wrong_choice_of_their_tools_is_refused_by_name(start_mcp: Start, web: Any) -> None:
    with start_mcp(PacedEngine(), [web.config()]).http() as client:
        choice = {"type": "function", "function": {"name": "web__ech"}}
        answer = client.post("/v1/chat/completions", json={**CHAT, "tool_choice": choice})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "tool_choice.function.name")
        assert "web__echo" in error["message"]
        for body, param in (({"messages": []}, "messages"), ({**CHAT, "temprature": 1}, "temprature")):
            answer = client.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        for content in (b"[]", b"{", b"1"):
            answer = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400


def test_a_required_tool_that_models_do_not_get(start_mcp: Start, web: Any, tmp_path: Path) -> None:
    bad = stdio_config(tmp_path, "bad", command="no-such-program")
    with start_mcp(PacedEngine(), [web.config(auto_approve=["echo"]), bad], execute=True).http() as client:
        for name, told in (("bad__hang", "the MCP server 'bad' is not connected: "), ("web__slow", "(autoApprove)")):
            choice = {"type": "function", "function": {"name": name}}
            answer = client.post("/v1/chat/completions", json={**CHAT, "tool_choice": choice})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice.function.name")
            assert told in answer.json()["error"]["message"]


def test_a_prompt_that_the_tools_make_too_long_says_so(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(max_model_len=60)
    engine.render_messages = lambda messages, **options: "x" * (100 if options.get("tools") else 10)  # type: ignore[method-assign]
    with start_mcp(engine, [web.config()]).http() as client:
        body = {**CHAT, "max_tokens": 10}
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert "3 tools of MCP servers are part of the prompt: send tools: []" in refused.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json={**body, "tools": []}).status_code == 200


def test_servers_end_with_the_application(start_mcp: Start, tmp_path: Path) -> None:
    running = start_mcp(PacedEngine(), [stdio_config(tmp_path, sdk=True)])
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    running.stop()
    assert not is_alive(pid)


@pytest.mark.usefixtures("movable_clock")
def test_a_server_that_cannot_be_reached_holds_nobody_up(
    start_mcp: Start, web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, settled = threading.Event(), McpService.settled

    async def seen(service: McpService) -> None:
        waits.set()
        await settled(service, 600.0)  # longer than the clock is moved

    monkeypatch.setattr(McpService, "settled", seen)
    hanging = tmp_path / "hang.py"
    hanging.write_text("import time\ntime.sleep(60)\n")
    slow = stdio_config(tmp_path, "slow", args=[str(hanging)], connect_timeout=60.0)
    bad = stdio_config(tmp_path, "bad", command="no-such-program")
    engine = PacedEngine("Hello!")
    running = start_mcp(engine, [slow, bad, web.config()], settled=False)
    with running.http() as client:
        assert client.get("/ready").status_code == 200

        def servers() -> dict[str, dict[str, Any]]:
            return {one["name"]: one for one in client.get("/v1/mcp/servers").json()["data"]}

        running.wait_for(lambda: servers()["web"]["state"] == "ready")
        assert servers()["slow"]["state"] == "connecting"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.post, "/v1/chat/completions", json=CHAT)
            assert waits.wait(PATIENCE)
            running.skip(60)
            assert asked.result().status_code == 200  # it waits for the slow one
        assert shown(engine) == ["web__echo", "web__slow", "web__fail"]
        assert "no-such-program" in servers()["bad"]["error"]
        assert servers()["web"]["state"] == "ready"
        metrics = client.get("/metrics").text
        assert 'candle_vllm:mcp_servers{state="ready"} 1.0' in metrics


def test_a_server_that_is_stopped_while_they_connect_leaves_nothing(start_mcp: Start, tmp_path: Path) -> None:
    hanging = tmp_path / "hang.py"
    hanging.write_text("import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    config = stdio_config(tmp_path, args=[str(hanging), str(tmp_path / "pid")])
    running = start_mcp(PacedEngine(), [config], settled=False)
    pid = tmp_path / "pid"
    running.wait_for(lambda: pid.exists() and pid.read_text())
    running.stop()
    assert not is_alive(int(pid.read_text()))


STUBBORN = """
import os, signal, sys, threading, time
from mcp.server import MCPServer

signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=lambda: time.sleep(60)).start()
open(sys.argv[1], "w").write(str(os.getpid()))
MCPServer("stubborn").run(transport="stdio")
"""


HASTE = """
import asyncio, sys
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.server.mcp.options import McpOptions
from candle_vllm.server.mcp.service import McpService

async def hurry():
    server = McpServerConfig(name="s", command=sys.executable, args=sys.argv[1:], connect_timeout=50.0)
    service = McpService(McpOptions((server,)))
    await service.start()
    await service.settled(100)
    assert service.states() == ["ready"]
    closing = asyncio.create_task(service.close())
    await asyncio.sleep(0.1)
    return closing

assert asyncio.run(hurry()).cancelled()
"""


def test_an_end_in_haste_leaves_nothing(tmp_path: Path) -> None:
    """After a second signal the event loop ends while the servers are being closed."""
    stubborn, pid = tmp_path / "stubborn.py", tmp_path / "pid"
    stubborn.write_text(STUBBORN)
    command = [sys.executable, "-c", HASTE, str(stubborn), str(pid)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    assert not is_alive(int(pid.read_text()))


def test_tools_that_no_request_may_have_are_left_out(web: Any, caplog: pytest.LogCaptureFixture) -> None:
    from candle_vllm.responses.tools.tool import ToolDefinition

    class Odd:
        def __init__(self, name: str, schema: Any) -> None:
            self.definition = ToolDefinition(name=f"web__{name}", server="web", original_name=name, parameters=schema)

    deep: Any = {"type": "string"}
    for _ in range(30):
        deep = {"type": "object", "properties": {"a": deep}}
    service = McpService(McpOptions((web.config(),)))
    odd = [Odd("good", {"type": "object"}), Odd("deep", deep), Odd("list", {"type": "object", "required": 3})]
    service.registry.replace("web", odd)  # type: ignore[arg-type]
    assert service.offer().names == ("web__good",)
    assert service.offer() is service.offer()
    assert sum("models do not get the tool" in one for one in caplog.messages) == 2
    service.registry.replace("web", ())
    assert service.offer().names == ()


def test_the_sdk_is_imported_only_where_there_are_servers(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom candle_vllm.server.serve import open_mcp\n"
        "from candle_vllm.server import Settings, create_app\n"
        "from candle_vllm.core.testing import ScriptedEngine\n"
        "create_app(ScriptedEngine(), Settings(mcp_allow_urls=('https://a.example/*',)), mcp=open_mcp(Settings()))\n"
        "sys.exit('mcp' in sys.modules)\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "CANDLE_VLLM_MCP_CONFIG"}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=False).returncode == 0
