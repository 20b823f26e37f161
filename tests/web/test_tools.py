# SPDX-License-Identifier: MIT
"""Tool calls in the page: cards, approval before each run, and the panel with MCP servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.web.actions import archive, ask, button, conversation, import_file, said, say, tools_on, wait_idle
from tests.web.ui_server import Site

SERVERS = [
    {
        "name": "clock", "transport": "stdio", "state": "ready", "error": None, "protocol_version": "2026-07-28",
        "tools_count": 2, "reconnects": 1, "log": ["started", "<b>ready</b>"],
    },
    {
        "name": "broken", "transport": "http", "state": "failed", "error": "connection refused",
        "protocol_version": None, "tools_count": 0, "reconnects": 0, "log": [],
    },
]  # fmt: skip


def tool(name: str) -> dict[str, Any]:
    """A tool of the clock server as `/v1/mcp/tools` lists it."""
    function = {
        "name": f"clock__{name}",
        "description": f"Says {name}.",
        "parameters": {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function, "server": "clock", "original_name": name, "read_only": True}


class Mcp:
    """What the page sees of a server's MCP routes, and what it asked of them."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {
            "status": "completed",
            "content": [{"kind": "text", "text": "12:00"}],
            "is_error": False,
            "text": "12:00",
            "seconds": 0.25,
        }

    def serve(self, page: Any) -> None:
        """Answers the page's requests; it has to be loaded again after that."""
        page.route("**/v1/mcp/servers", lambda route: route.fulfill(json={"object": "list", "data": SERVERS}))
        page.route(
            "**/v1/mcp/tools",
            lambda route: route.fulfill(json={"object": "list", "data": [tool("now"), tool("zones")]}),
        )
        page.route("**/v1/mcp/call", self._call)
        page.evaluate("sessionStorage.setItem('candle-vllm.page-key', 'k'.repeat(32))")
        page.reload()
        page.get_by_text("Tools off").wait_for()

    def _call(self, route: Any) -> None:
        self.calls.append(route.request.post_data_json)
        route.fulfill(json=self.result)


@pytest.fixture
def mcp() -> Mcp:
    """Two servers with two tools."""
    return Mcp()


@pytest.fixture
def plain(site: Site, open_page: Callable[..., Any], mcp: Mcp) -> Any:
    """A page whose server has MCP servers."""
    opened = open_page(site.url)
    mcp.serve(opened)
    return opened


@pytest.fixture
def page(plain: Any) -> Any:
    """The same with tools on in its new chat."""
    tools_on(plain)
    return plain


def test_without_a_key_nothing_can_be_turned_on(plain: Any) -> None:
    plain.evaluate("sessionStorage.clear()")
    plain.reload()
    button(plain, "Tools off").click()
    plain.locator(".popover").get_by_text("which ends in #key=").wait_for()
    assert plain.get_by_role("switch", name="Use tools in this chat").is_disabled()
    assert plain.locator(".popover").get_by_role("checkbox", disabled=False).count() == 0


def offered(site: Site) -> list[str]:
    """The tools that the last prompt was made with."""
    return [one["function"]["name"] for one in site.engine.template_calls[-1].options.get("tools") or []]


def test_nothing_of_tools_shows_without_mcp(chat: Any) -> None:
    chat.get_by_text("demo-model is running").wait_for()
    assert chat.get_by_role("link", name="Tools").count() == 0
    assert chat.get_by_text("Tools ").count() == 0


def test_allow_once(page: Any, mcp: Mcp, site: Site) -> None:
    say(page, "clock")
    card = page.locator(".tool-card")
    card.get_by_text("May clock__now run").wait_for()
    assert '"zone": "Europe/Berlin"' in card.inner_text()
    assert mcp.calls == []
    button(page, "Allow once").click()
    assert card.evaluate("card => card === document.activeElement"), "the keyboard is not where the buttons were"
    said(page, "The tool said: 12:00")
    assert mcp.calls == [{"name": "clock__now", "arguments": {"zone": "Europe/Berlin"}, "approved": True}]
    assert "done · 250 ms" in card.inner_text()
    assert site.engine.template_calls[-1].options["tools"][0]["function"]["name"] == "clock__now"
    ask(page, "clock")  # once is once
    page.get_by_text("May clock__now run").wait_for()
    assert len(mcp.calls) == 1


def test_deny(page: Any, mcp: Mcp) -> None:
    say(page, "clock")
    button(page, "Deny").click()
    said(page, "The tool said: The user did not allow this call")
    assert mcp.calls == []


def test_always_and_back(page: Any, mcp: Mcp) -> None:
    say(page, "clock")
    button(page, "Always allow this tool").click()
    said(page, "The tool said: 12:00")
    ask(page, "clock")
    assert len(mcp.calls) == 2
    page.get_by_role("link", name="Tools").click()
    button(page, "Always allowed: ask again").click()
    page.go_back()
    ask(page, "clock")
    page.get_by_text("May clock__now run").wait_for()
    assert len(mcp.calls) == 2


def test_a_waiting_call_outlives_a_reload(page: Any, mcp: Mcp) -> None:
    ask(page, "clock")
    page.get_by_text("May clock__now run").wait_for()
    page.reload()
    button(page, "Allow once").click()
    said(page, "The tool said: 12:00")
    assert len(mcp.calls) == 1


def test_a_tool_that_fails(page: Any, mcp: Mcp) -> None:
    mcp.result = {"status": "failed", "content": [], "is_error": True, "text": "no such <zone>", "seconds": 1}
    say(page, "clock")
    button(page, "Allow once").click()
    said(page, "The tool said: no such <zone>")
    assert "failed · 1.0 s" in page.locator(".tool-card").inner_text()
    wait_idle(page)


def test_the_panel(page: Any, site: Site) -> None:
    page.get_by_role("link", name="Tools").click()
    page.get_by_text("connection refused").wait_for()
    page.get_by_text("Log (2)").click()
    page.get_by_text("<b>ready</b>").wait_for()
    page.get_by_label("clock__now").uncheck()
    page.get_by_role("link", name="New chat").click()
    page.get_by_text("Tools: 1 of 1 on").wait_for()
    ask(page, "Hello")
    assert offered(site) == ["clock__zones"]


def test_tools_are_off_until_they_are_turned_on_and_belong_to_their_chat(plain: Any, site: Site) -> None:
    ask(plain, "Hello")
    assert offered(site) == []
    tools_on(plain)
    ask(plain, "Hello again")
    assert offered(site) == ["clock__now", "clock__zones"]
    plain.reload()
    said(plain, "You said: Hello again")
    button(plain, "Tools: 2 of 2 on").click()
    plain.get_by_label("clock__zones").uncheck()
    button(plain, "Tools: 1 of 2 on").wait_for()
    ask(plain, "Once more")
    assert offered(site) == ["clock__now"]
    plain.get_by_role("link", name="New chat").click()
    plain.get_by_text("Tools off").wait_for()
    ask(plain, "Elsewhere")
    assert offered(site) == []
    plain.get_by_role("link", name="Hello", exact=True).click()
    button(plain, "Tools: 1 of 2 on").click()
    plain.get_by_role("switch", name="Use tools in this chat").uncheck()
    button(plain, "Tools off").wait_for()


def test_the_new_chat_after_one_with_tools_starts_without(page: Any, site: Site) -> None:
    ask(page, "Hello")
    assert offered(site) == ["clock__now", "clock__zones"]
    page.get_by_role("link", name="New chat").click()
    button(page, "Tools off").wait_for()


def test_a_tool_that_is_always_allowed_does_not_run_where_it_is_off(page: Any, mcp: Mcp) -> None:
    say(page, "clock")
    button(page, "Always allow this tool").click()
    said(page, "The tool said: 12:00")
    page.get_by_role("link", name="New chat").click()
    button(page, "Tools off").wait_for()
    ask(page, "clock")
    assert page.locator(".tool-card").count() == 0
    assert len(mcp.calls) == 1


def test_arguments_that_do_not_fit_are_told_to_the_model_without_asking(page: Any, mcp: Mcp) -> None:
    strict = tool("now")
    strict["function"]["parameters"] = {"type": "object", "properties": {"zone": {"enum": ["UTC"]}}}
    page.route("**/v1/mcp/tools", lambda route: route.fulfill(json={"object": "list", "data": [strict]}))
    page.reload()
    tools_on(page)
    say(page, "clock")
    said(page, "The tool said: The arguments do not fit the tool's schema: zone: 'Europe/Berlin' is not one of ['UTC']")
    assert mcp.calls == []


def test_what_is_imported_has_no_tools_on(plain: Any, tmp_path: Path) -> None:
    other = conversation("Other", 2)
    other["conversation"]["tools"] = ["clock__now"]
    import_file(plain, archive(tmp_path / "x.json", [other]))
    plain.locator(".conversation-link").click()
    said(plain, "Answer 1")
    button(plain, "Tools off").wait_for()
