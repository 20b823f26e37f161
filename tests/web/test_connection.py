# SPDX-License-Identifier: MIT
"""A server that goes, comes back, or is another one then: the page notices by itself. What it refuses is explained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.web.actions import ask, button, eventually, said, say
from tests.web.ui_server import Site, ui_server

ROOT = Path(__file__).parents[2]
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
        assert page.locator("[aria-live=polite]").first.text_content() == "The server is reachable again."
        assert ask(page, "Again") == "You said: Again"
        assert page.evaluate("window.same")


def test_nothing_is_said_to_be_ready_while_the_server_is_gone(open_page: Callable[..., Any]) -> None:
    with ui_server() as site:
        page = open_page(site.url)
        page.get_by_text("demo-model is running").wait_for()
        button(page, "Model: demo-model").click()
        button(page, "Unload demo-model").wait_for()
        assert page.locator(".dot.good").count() > 0
    page.get_by_role("alert").get_by_text("The server cannot be reached.").wait_for(timeout=SOON)
    row = page.locator(".model-row").first
    row.get_by_text("no connection").wait_for()
    assert page.locator(".dot.good").count() == 0
    assert page.get_by_role("button", name=re.compile("^(Unload|Load)")).count() == 0
    page.get_by_role("link", name="Models", exact=True).click()
    page.locator(".stock").get_by_text("no connection").first.wait_for()
    assert page.locator(".stock").get_by_text("ready", exact=True).count() == 0


def test_a_server_that_was_started_with_another_model_is_noticed(open_page: Callable[..., Any]) -> None:
    with ui_server() as site:
        page = open_page(site.url)
        ask(page, "Hello")
        port = port_of(site)
    with ui_server(port=port, served_model_name=("new-model",)) as site:
        page.get_by_text("The server's models have changed. Answers come from new-model").wait_for(timeout=SOON)
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


def test_tools_of_an_mcp_server_that_comes_later_are_asked_for(chat: Any) -> None:
    server = {"name": "clock", "transport": "stdio", "state": "failed", "error": "it did not answer", "log": []}
    tool = {"type": "function", "function": {"name": "clock__now", "parameters": {}}, "server": "clock"}
    chat.route("**/v1/mcp/servers", lambda route: route.fulfill(json={"object": "list", "data": [server]}))
    chat.route("**/v1/mcp/tools", lambda route: route.fulfill(json={"object": "list", "data": tools}))
    tools: list[dict[str, Any]] = []
    chat.clock.install()
    chat.reload()
    chat.get_by_role("link", name="Tools").wait_for()
    assert button(chat, "Tools off").count() == 0
    server["state"], tools = "ready", [tool]
    for _ in range(6):
        chat.clock.run_for(3_000)
        chat.wait_for_timeout(100)  # for the answers
    button(chat, "Tools off").wait_for()


def test_a_network_that_is_back_is_noticed_at_once(chat: Any) -> None:
    chat.get_by_text("demo-model is running").wait_for()
    chat.clock.install()
    chat.context.set_offline(True)
    chat.get_by_role("alert").get_by_text("The server cannot be reached.").wait_for()
    chat.clock.pause_at(chat.evaluate("Date.now()") + 1000)  # from now on no timer ends
    chat.context.set_offline(False)
    chat.get_by_role("alert").wait_for(state="detached")


def test_the_page_asks_seldom_while_nobody_looks(chat: Any) -> None:
    asked: list[str] = []
    chat.on("request", lambda request: asked.append(request.url) if request.url.endswith("/v1/models") else None)
    chat.get_by_text("demo-model is running").wait_for()
    chat.clock.install()
    look = "(hidden) => Object.defineProperty(document, 'hidden', { value: hidden, configurable: true })"
    chat.evaluate(look, True)
    chat.locator(".model-button").click()
    eventually(chat, lambda: asked)
    before = len(asked)
    chat.clock.run_for(25_000)
    chat.wait_for_timeout(300)
    assert len(asked) == before
    chat.clock.run_for(6_000)
    eventually(chat, lambda: len(asked) > before)
    assert len(asked) == before + 1
    chat.evaluate(look, False)
    chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    eventually(chat, lambda: len(asked) > before + 1)
    assert len(asked) == before + 2


REFUSALS = [
    (
        400,
        "context_length_exceeded",
        "prompt",
        "the prompt has 9012 tokens and this model's maximum context length is 4096 tokens: larger --max-model-len",
        "longer than the model's context. Shorten it, or begin a new chat. It has 9,012 tokens, and the context has",
    ),
    (400, "context_length_exceeded", "max_tokens", "ask for at most 12", "Lower Maximum tokens"),
    (
        400,
        "invalid_request",
        "messages",
        "x has no chat template: pass one (--chat-template)",
        "has no chat template. Choose",
    ),
    (400, "unsupported_parameter", "priority", "unless it is started with --some-flag", "The server refused this."),
    (401, "invalid_api_key", None, "send the header `Authorization: Bearer <key>` with a key", "needs an API key"),
    (
        404,
        "model_not_found",
        "model",
        "The model 'x' does not exist here; served: y.",
        "does not have that model any more",
    ),
    (413, "request_too_large", None, "Send less, or raise --max-body-mb.", "more than the server takes at once"),
    (503, "overloaded", None, "12 sequences are running (--max-queued-requests)", "The server is busy."),
    (504, "timeout", None, "The request took longer (--request-timeout).", "took longer than this server allows"),
    (400, "invalid_value", "temperature", "temperature must be at most 2", "temperature must be at most 2"),
]


@pytest.mark.parametrize(("status", "code", "param", "message", "words"), REFUSALS)
def test_refusals_are_in_words_of_the_page(
    chat: Any, status: int, code: str, param: str | None, message: str, words: str
) -> None:
    error = {"message": message, "type": "x", "param": param, "code": code}
    chat.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, json={"error": error}))
    say(chat, "Hello")
    alert = chat.locator(".answer").get_by_role("alert")
    alert.get_by_text(words).wait_for()
    assert " --" not in alert.inner_text()
    assert alert.locator("code").all_inner_texts() == (["temperature"] if message == words else [])


def test_texts_have_no_flags() -> None:
    for path in sorted((ROOT / "packages/server/webui/src/i18n").glob("*.ts")):
        assert not re.search(r"--[a-z]", path.read_text("utf-8")), path


def test_refusals_have_the_codes_of_the_server() -> None:
    sources = [path.read_text("utf-8") for name in ("server", "openai") for path in
               (ROOT / "packages" / name / "src").rglob("*.py")]  # fmt: skip
    text = (ROOT / "packages/server/webui/src/i18n/en.ts").read_text("utf-8")
    words = re.search(r"  refusals: \{(.*?)\n  \}", text, re.DOTALL)
    assert words is not None
    for code in re.findall(r"(\w+): \"", words[1]):
        assert any(f'"{code}"' in source for source in sources), code


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
