"""A server that goes, comes back, or is another one then: the page notices by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actions import ask, button, said
from ui_server import Site, ui_server

SOON = 20_000  # ms: far more than the page takes, on a busy machine too


def port_of(site: Site) -> int:
    return int(site.url.rsplit(":", 1)[1].strip("/"))


def test_a_server_that_comes_back_is_noticed_without_a_reload(open_page: Callable[..., Any]) -> None:
    with ui_server() as site:
        page = open_page(site.url)
        assert ask(page, "Hello") == "You said: Hello"
        page.evaluate("window.same = true")
        port = port_of(site)
    page.get_by_role("alert").get_by_text("The server cannot be reached.").wait_for(timeout=SOON)
    page.get_by_text("No connection to the server.").wait_for()
    page.locator("#composer").fill("kept")
    with ui_server(port=port):
        page.get_by_role("alert").wait_for(state="detached", timeout=SOON)
        assert page.locator("#composer").input_value() == "kept"
        assert page.locator(".notice").count() == 0
        assert page.locator("[aria-live=polite]").first.text_content() == "The server is there again."
        assert ask(page, "Again") == "You said: Again"
        assert page.evaluate("window.same")


def test_a_server_that_was_started_with_another_model_is_noticed(open_page: Callable[..., Any]) -> None:
    with ui_server() as site:
        page = open_page(site.url)
        ask(page, "Hello")
        port = port_of(site)
    with ui_server(port=port, served_model_name=("new-model",)) as site:
        page.get_by_text("The server has other models than before. Answers come from new-model").wait_for(timeout=SOON)
        button(page, "Model: new-model").wait_for()
        assert ask(page, "Again") == "You said: Again"
        assert len(site.engine.requests) >= 1
        page.get_by_role("article", name="Answer of new-model").wait_for()


def test_tools_of_a_server_that_was_started_again_are_asked_for(chat: Any) -> None:
    server = {"name": "clock", "transport": "stdio", "state": "ready", "error": None, "log": []}
    chat.get_by_text("demo-model is running").wait_for()
    assert chat.get_by_role("link", name="Tools").count() == 0
    chat.context.set_offline(True)
    chat.get_by_role("alert").get_by_text("The server cannot be reached.").wait_for()
    chat.route("**/v1/mcp/servers", lambda route: route.fulfill(json={"object": "list", "data": [server]}))
    chat.route("**/v1/mcp/tools", lambda route: route.fulfill(json={"object": "list", "data": []}))
    chat.context.set_offline(False)
    chat.get_by_role("link", name="Tools").wait_for()


def test_a_network_that_is_back_is_noticed_at_once(chat: Any) -> None:
    chat.get_by_text("demo-model is running").wait_for()
    chat.clock.install()
    chat.context.set_offline(True)
    chat.get_by_role("alert").get_by_text("The server cannot be reached.").wait_for()
    chat.clock.pause_at(chat.evaluate("Date.now()") + 1000)  # from now on no timer ends
    chat.context.set_offline(False)
    chat.get_by_role("alert").wait_for(state="detached")


def test_a_first_page_without_the_server_s_models_says_so_and_goes_on(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page(site.url)
    page.route("**/v1/models", lambda route: route.fulfill(status=502, body="bad gateway"))
    page.reload()
    page.get_by_role("alert").get_by_text("The server answered with status 502.").wait_for()
    page.unroute("**/v1/models")
    page.get_by_text("demo-model is running").wait_for(timeout=SOON)
    ask(page, "Hello")
    said(page, "You said: Hello")
