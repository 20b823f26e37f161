# SPDX-License-Identifier: MIT
"""`/v1/responses` with the servers of mcp.json, and with URLs that the operator allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from packages.server.tests.mcp_fakes import Seen, call_text, stdio_config, turns
from packages.server.tests.server_fakes import PacedEngine

Start = Callable[..., Any]
ASK: dict[str, Any] = {"model": "default", "input": "Say hi."}
ECHO = call_text("web__echo", text="hi")


def tool(**more: Any) -> Any:
    return {"type": "mcp", "server_label": "web", "require_approval": "never", **more}


def test_with_a_key_a_client_uses_the_servers_by_their_labels(start_mcp: Start, web: Any, seen: Seen) -> None:
    engine = PacedEngine(turns(ECHO, "Done."))
    running = start_mcp(engine, [web.config(auto_approve=[])], api_key=("k",))
    client = running.openai("k")
    made = client.responses.create(**ASK, tools=[tool(allowed_tools=["echo"])])
    assert [item.type for item in made.output] == ["mcp_list_tools", "mcp_call", "message"]
    assert [one.name for one in made.output[0].tools] == ["echo"]
    assert (made.output[1].output, made.output[1].error) == ("hi", None)
    assert seen.texts == ["hi"]
    engine._script = turns(ECHO, "Done.")
    asked = client.responses.create(**ASK, tools=[tool(require_approval="always")])
    assert asked.output[-1].type == "mcp_approval_request"
    assert seen.texts == ["hi"]
    with running.http(headers={"authorization": "Bearer k"}) as http:
        assert 'mcp_tool_calls_total{server="web",status="completed"} 1.0' in http.get("/metrics").text


def test_without_keys_tools_run_only_where_the_operator_says_so(start_mcp: Start, web: Any, seen: Seen) -> None:
    running = start_mcp(PacedEngine(turns(ECHO, "Done.")), [web.config()])
    with pytest.raises(openai.BadRequestError) as refusal:
        running.openai().responses.create(**ASK, tools=[tool()])
    assert refusal.value.param == "tools.0.server_label"
    assert "--api-key" in str(refusal.value)
    assert "--mcp-execute" in str(refusal.value)
    assert seen.texts == []


def test_without_keys_the_approved_ones_run(start_mcp: Start, web: Any, seen: Seen) -> None:
    both = call_text("web__slow", seconds=0) + ECHO
    running = start_mcp(PacedEngine(turns(both, "Done.")), [web.config(auto_approve=["echo"])], execute=True)
    made = running.openai().responses.create(**ASK, tools=[tool()])
    assert [one.name for one in made.output[0].tools] == ["echo"]
    assert made.output[-1].content[0].text == "Done."
    assert seen.texts == ["hi"]
    assert seen.begun == 0
    choice: Any = {"type": "mcp", "server_label": "web", "name": "slow"}
    with pytest.raises(openai.BadRequestError, match=r"mcp\.json does not approve it"):
        running.openai().responses.create(**ASK, tools=[tool()], tool_choice=choice)


def test_without_keys_and_without_approved_tools(start_mcp: Start, web: Any) -> None:
    running = start_mcp(PacedEngine("Done."), [web.config(auto_approve=[])], execute=True)
    made = running.openai().responses.create(**ASK, tools=[tool()])
    assert made.output[0].tools == []
    assert "approves none" in str(made.output[0].error)


def test_a_label_that_is_not_configured_and_a_server_that_is_not_there(
    start_mcp: Start, web: Any, tmp_path: Path
) -> None:
    bad = stdio_config(tmp_path, "bad", command="no-such-program")
    off = stdio_config(tmp_path, "off", enabled=False)
    running = start_mcp(PacedEngine("Done."), [web.config(), bad, off], api_key=("k",))
    client = running.openai("k")
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(**ASK, tools=[tool(server_label="other")])
    assert refusal.value.param == "tools.0.server_label"
    for label, told in (("bad", "no-such-program"), ("off", "disabled")):
        made = client.responses.create(**ASK, tools=[tool(server_label=label)])
        assert told in str(made.output[0].error), label
        assert made.output[-1].type == "message"
        with pytest.raises(openai.BadRequestError, match=f"server_label cannot be '{label}': .*{told}"):
            client.responses.create(
                **ASK, tools=[tool(server_label=label)], tool_choice={"type": "mcp", "server_label": label}
            )


def test_urls_that_the_operator_allows(start_mcp: Start, start: Start, web: Any, seen: Seen) -> None:
    asked = tool(server_url=web.url)
    for running in (
        start_mcp(PacedEngine(turns(ECHO, "Done.")), [], mcp_allow_urls=(web.url,), settled=False),
        start(PacedEngine(turns(ECHO, "Done.")), mcp_allow_urls=(web.url,), tool_parser="hermes"),
    ):
        made = running.openai().responses.create(**ASK, tools=[asked])
        assert [item.type for item in made.output] == ["mcp_list_tools", "mcp_call", "message"]
        with pytest.raises(openai.BadRequestError) as refusal:
            running.openai().responses.create(**ASK, tools=[tool(server_url="https://elsewhere.example/mcp")])
        assert refusal.value.param == "tools.0.server_url"
        with running.http() as client:  # labels of requests are no labels of metrics
            assert "candle_vllm:mcp_tool_calls_total{" not in client.get("/metrics").text
    assert seen.texts == ["hi", "hi"]
