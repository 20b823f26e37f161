# SPDX-License-Identifier: MIT
"""Fleets: servers together, their tools in one registry, and one that fails beside those that do not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.mcp.fleet import McpFleet
from candle_vllm.responses.mcp.peer import McpServerError
from candle_vllm.responses.tools.approval import decide
from candle_vllm.responses.tools.execution import call_directly
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolCall, ToolUnavailableError
from packages.responses.tests.mcp.http_apps import Seen, scripted_app
from tests.waiting import skip, until

Scripted = Callable[..., Any]


def double(number: int) -> int:
    """Twice the number."""
    return 2 * number


def names(registry: ToolRegistry) -> list[str]:
    return [definition.name for definition in registry.definitions()]


async def test_servers_together(scripted: Scripted, serve: Any, config: Any, notes: Any) -> None:
    registry = ToolRegistry([double])
    server = serve(lambda: scripted_app("plain", Seen()))
    configs = [
        scripted("plain", name="one"),
        config("two", url=server.url),
        config("off", url="http://[${HOST}]/mcp", auth="${TOKEN}", enabled=False),  # as variables that are not set stay
        scripted("plain", name="bad", command="no-such-command"),
    ]
    async with McpFleet(configs, registry) as fleet:
        assert names(registry)[:2] == ["double", "one__echo"]
        assert names(registry)[2].startswith("one__say_more_")
        assert names(registry)[3:] == ["two__echo"]
        tool = registry.find("one__echo")
        assert tool is not None
        assert (tool.definition.server, tool.definition.original_name, tool.definition.read_only) == (
            "one",
            "echo",
            True,
        )
        assert tool.definition.description == "Says it again"
        output = await tool.run({"text": "hi"}, lambda progress: None)
        assert output.content[0].text == "hi"
        call = ToolCall(id="1", name="one__echo", arguments="{}")
        assert await decide("never", call, tool.definition) == "allow"
        one, two, off, bad = fleet.status()
        assert (one.state, one.transport, one.protocol_version) == ("ready", "stdio", "2025-11-25")
        assert (one.server, one.instructions, one.reconnects, one.error) == ("scripted 1", "Be kind.", 0, None)
        assert one.tools == ("one__echo", names(registry)[2])
        assert (two.state, two.transport, two.tools) == ("ready", "http", ("two__echo",))
        assert (off.state, off.tools, off.error) == ("disabled", (), None)
        assert bad.state == "failed"
        assert bad.error is not None
        assert "no-such-command" in bad.error
        assert bad.log
        assert msgspec.json.encode(fleet.status())
        assert list(fleet.links) == ["one", "two", "off", "bad"]
    assert names(registry) == ["double"]
    assert not notes.alive
    with pytest.raises(ToolUnavailableError):
        await tool.run({"text": "hi"}, lambda progress: None)
    await fleet.aclose()


async def test_a_strict_fleet_starts_whole_or_not_at_all(scripted: Scripted, notes: Any) -> None:
    configs = [scripted("plain", name="one"), scripted("exit", name="bad")]
    fleet = McpFleet(configs, strict=True)
    with pytest.raises(McpServerError, match="MCP server 'bad'"):
        await fleet.start()
    assert names(fleet.registry) == []
    assert not notes.alive


async def test_a_start_that_is_cancelled_leaves_nothing(scripted: Scripted, notes: Any) -> None:
    fleet = McpFleet([scripted("plain", name="one"), scripted("silent", name="two")])
    start = asyncio.create_task(fleet.start())
    await until(lambda: len(notes.alive) == 2)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not notes.alive
    assert names(fleet.registry) == []


async def test_changes_reach_the_registry(scripted: Scripted) -> None:
    async with McpFleet([scripted("renames", name="one")]) as fleet:
        tool = fleet.registry.find("one__echo")
        assert tool is not None
        revision = fleet.registry.revision
        await tool.run({}, lambda progress: None)
        await until(lambda: names(fleet.registry) == ["one__renamed"])
        assert fleet.registry.revision > revision


async def test_a_server_that_returns_without_tools_has_none(scripted: Scripted) -> None:
    async with McpFleet([scripted("forgets", name="one")]) as fleet:
        tool = fleet.registry.find("one__echo")
        assert tool is not None
        with pytest.raises(ToolUnavailableError):
            await tool.run({}, lambda progress: None)
        await until(lambda: fleet.status()[0].reconnects == 1 and fleet.status()[0].state == "ready")
        assert names(fleet.registry) == []


async def test_a_caller_may_give_a_tool_more_time_than_its_configuration(scripted: Scripted, notes: Any) -> None:
    async with McpFleet([scripted("hang", name="one", timeout=30)]) as fleet:
        call = asyncio.create_task(call_directly(fleet.registry, "one", "echo", {}, timeout=90))
        await until(lambda: notes.count("called") == 1)
        await skip(80)
        for _ in range(2):
            assert (await fleet.links["one"].call("echo", {"text": "fine"})).content[0].text == "fine"
        assert not call.done()
        await skip(10)
        result = await call
        assert result.status == "timed_out"
        assert "within 90 seconds" in result.text


async def test_a_failure_that_stays_is_logged_once(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with McpFleet([scripted("plain", name="bad", command="no-such-command")]) as fleet:
        await until(lambda: sum("could not connect" in line for line in fleet.status()[0].log) > 1)
    assert [(one.levelname, "'bad'" in one.message) for one in caplog.records] == [("WARNING", True)]


async def test_tools_of_a_server_that_comes_later(scripted: Scripted, tmp_path: Path) -> None:
    """As if it had come at once: the order of the configuration does not depend on who is faster."""
    late = scripted("plain", name="one", cwd=str(tmp_path / "later"))
    async with McpFleet([late, scripted("plain", name="two")]) as fleet:
        second = names(fleet.registry)
        assert [name.partition("__")[0] for name in second] == ["two", "two"]
        (tmp_path / "later").mkdir()
        await until(lambda: len(names(fleet.registry)) == 4)
        assert names(fleet.registry)[2:] == second
        assert fleet.status()[0].state == "ready"


def test_limits(config: Any) -> None:
    with pytest.raises(ConfigError, match="65 MCP servers; at most 64"):
        McpFleet(config(str(number), command="x") for number in range(65))
    with pytest.raises(ConfigError, match="two MCP servers are named 'one'"):
        McpFleet([config("one", command="x"), config("one", command="y")])
