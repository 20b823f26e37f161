# SPDX-License-Identifier: MIT
"""Tools end to end: the command with the page, an MCP server in a process of its own, and a browser."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.common_run import few
from tests.scripted_server import ScriptedServer
from tests.waiting import wait_for
from tests.web.actions import button, said, say, tools_on

PROGRAM = """
from mcp.server import MCPServer

server = MCPServer("clock")


@server.tool()
def now(zone: str) -> str:
    "The time in a zone."
    return f"noon in {zone}"


server.run(transport="stdio")
"""
CALL = '<tool_call>\n{"name": "clock__now", "arguments": {"zone": "Berlin"}}\n</tool_call>'
ANSWERS = {"noon in Berlin": "It is noon.", "clock": CALL}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an MCP server and its configuration."""
    (tmp_path / "clock.py").write_text(PROGRAM)
    clock = {"command": sys.executable, "args": [str(tmp_path / "clock.py")]}
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"clock": clock}}))
    return tmp_path


def test_a_tool_runs_after_approval(browser: Any, open_page: Callable[..., Any], folder: Path) -> None:
    server = ScriptedServer(folder, ANSWERS, "--ui-server", "--mcp-config", "servers.json", "--api-key", "sesame")
    try:
        page = open_page(server.url + "/")
        page.set_default_timeout(20_000)
        page.get_by_label("API key", exact=True).fill("sesame")
        button(page, "Use").click()
        tools_on(page)
        say(page, "Ask the clock")
        button(page, "Allow once").click()
        said(page, "It is noon.")
        page.locator(".tool-card .result summary").click()
        page.get_by_text("noon in Berlin").wait_for()
        page.get_by_role("link", name="Tools").click()
        page.get_by_text("ready · stdio").wait_for()
        page.get_by_text("The time in a zone.").wait_for()
    finally:
        server.stop()


def test_the_printed_address_runs_tools_without_a_configured_key(
    browser: Any, open_page: Callable[..., Any], folder: Path
) -> None:
    server = ScriptedServer(folder, ANSWERS, "--ui-server", "--mcp-config", "servers.json")
    try:
        (address,) = [line.split()[-1] for line in server.banner if line.startswith("web UI")]
        page = open_page(address)
        page.set_default_timeout(20_000)
        tools_on(page)
        assert page.url == server.url + "/#/"
        say(page, "Ask the clock")
        button(page, "Allow once").wait_for()
        page.reload()  # the key stays with the tab
        button(page, "Allow once").click()
        said(page, "It is noon.")
        page.get_by_role("link", name="Tools").click()
        page.get_by_text("ready · stdio").wait_for()
        assert page.get_by_text("#key=").count() == 0
        page.go_back()
        assert "key" not in page.url
        assert address.split("key=")[1] not in page.evaluate("JSON.stringify(localStorage)")
    finally:
        server.stop()
    assert address.split("key=")[1] not in (folder / "server.log").read_text()


def test_without_the_key_the_page_says_where_the_address_is(
    browser: Any, open_page: Callable[..., Any], folder: Path
) -> None:
    server = ScriptedServer(folder, ANSWERS, "--ui-server", "--mcp-config", "servers.json")
    try:
        (address,) = [line.split()[-1] for line in server.banner if line.startswith("web UI")]
        page = open_page(f"{server.url}/#key={'x' * 32}")  # that of a server that is gone
        page.set_default_timeout(20_000)
        tools_on(page)
        say(page, "Ask the clock")
        button(page, "Allow once").click()
        page.locator(".answer").get_by_text("open this page at its full address").wait_for()
        button(page, "Allow once").wait_for()  # the call still waits
        page.get_by_role("link", name="Tools").click()
        page.get_by_text("which ends in #key=").last.wait_for()
        page.go_back()
        page.evaluate("(hash) => { location.hash = hash; }", address.split("/")[-1])  # pasted into the open page
        button(page, "Allow once").click()
        said(page, "It is noon.")
        assert "key" not in page.url
    finally:
        server.stop()


@pytest.mark.parametrize("flags", few([((),), (("--mcp-execute",),)], (("--mcp-execute",),)))
def test_tools_that_are_off_are_off(
    browser: Any, open_page: Callable[..., Any], folder: Path, flags: tuple[str, ...]
) -> None:
    """A server offers its MCP servers' tools to requests that do not say which tools they want."""
    clock = json.loads((folder / "servers.json").read_text())["mcpServers"]["clock"]
    (folder / "servers.json").write_text(json.dumps({"mcpServers": {"clock": {**clock, "autoApprove": ["now"]}}}))
    answers = {"clock__now": CALL, "Hello": "Good day."}
    server = ScriptedServer(folder, answers, "--ui-server", "--mcp-config", "servers.json", *flags)
    try:
        (address,) = [line.split()[-1] for line in server.banner if line.startswith("web UI")]
        page = open_page(address, titles=True)
        page.set_default_timeout(20_000)
        page.get_by_text("Tools off").wait_for()
        say(page, "Hello")
        said(page, "Good day.")
        wait_for(lambda: len(server.prompts) == 2)  # the answer and the title
        assert not [prompt for prompt in server.prompts if "clock__now" in prompt]
        assert page.locator(".tool-card").count() == 0
    finally:
        server.stop()
