# SPDX-License-Identifier: MIT
"""What axe-core says of every page, dialog and state: nothing, of whatever weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidFileError
from tests.web.actions import button, findings, said, tools_on
from tests.web.test_manager import managed, row
from tests.web.test_models import SteppedLoader, two_models
from tests.web.test_tools import Mcp
from tests.web.ui_server import BIG, REPO, TOY, Site, ui_server

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

on_every_screen = pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {**screen, "color_scheme": scheme, "reduced_motion": "reduce"},
            id=scheme + where,
            marks=[] if common == scheme else [pytest.mark.every_case],
        )
        for screen, where, common in (({}, "", "light"), (PHONE, "-phone", "dark"))
        for scheme in ("light", "dark")
    ],
)


class Views:
    """Looks at a page's views, and keeps what was found under their names."""

    def __init__(self, page: Any, axe: str) -> None:
        self.found: dict[str, list[str]] = {}
        self._page = page
        self._axe = axe

    def look(self, name: str) -> None:
        found = findings(self._page, self._axe)
        if found:
            self.found[name] = found


def send(page: Any, text: str) -> None:
    """Sends a message, on phones too, and waits for the answer's end or a question about it."""
    before = page.locator(".answer").count()
    page.locator("#composer").fill(text)
    button(page, "Send").click()
    page.locator(".answer").nth(before).wait_for()
    page.locator(".answer[aria-busy=true]").wait_for(state="detached")


@on_every_screen
def test_axe_finds_nothing_in_a_chat(
    site: Site, open_page: Callable[..., Any], axe: str, options: dict[str, Any]
) -> None:
    page = open_page(site.url, **options)
    views = Views(page, axe)
    page.get_by_text("What can I help with?").wait_for()
    views.look("welcome")
    page.locator(".model-button").click()
    page.locator(".model-row").first.wait_for()
    views.look("picker")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+,")
    page.get_by_role("tab", name="All chats").click()
    page.get_by_label("Token probabilities").select_option("on")
    page.get_by_label("Top k", exact=True).fill("1.5")
    page.keyboard.press("Tab")
    page.get_by_text("Must be between").wait_for()
    for tab in ("This chat", "All chats", "Access", "Data"):
        page.get_by_role("tab", name=tab).click()
        views.look(f"settings, {tab}")
    page.keyboard.press("Escape")
    send(page, "headings")
    ranks = (
        page.locator(".answer")
        .last.locator("h2, h3, h4, h5, h6")
        .evaluate_all("(all) => all.map((one) => one.localName)")
    )
    assert ranks == ["h2", "h3", "h3", "h4"]  # that of the answer, then each at most one below the one before
    views.look("headings that skip ranks")
    send(page, "markdown please")
    send(page, "think")
    said(page, "The number is 42.")
    page.locator(".reasoning summary").click()
    page.locator(".numbers summary").last.click()
    views.look("answers")
    is_phone = "is_mobile" in options
    if is_phone:
        button(page, "Actions").last.click()
        views.look("actions of a message")
    button(page, "Probabilities").last.click()
    page.locator(".token").first.click()
    if is_phone:
        button(page, "Actions").first.click()
    button(page, "Edit").first.click()
    views.look("probabilities and editor")
    page.keyboard.press("Escape")
    if is_phone:
        button(page, "Actions").last.click()
    button(page, "Delete message").last.click()
    page.get_by_role("dialog").wait_for()
    views.look("question before deleting")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+/")
    page.get_by_role("heading", name="Keyboard shortcuts").wait_for()
    views.look("shortcuts")
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '#/server'")
    page.locator(".chart polyline").last.wait_for(state="attached")
    views.look("server")
    assert views.found == {}


@on_every_screen
def test_axe_finds_nothing_around_tools(
    site: Site, open_page: Callable[..., Any], axe: str, options: dict[str, Any]
) -> None:
    page = open_page(site.url, **options)
    views = Views(page, axe)
    Mcp().serve(page)
    tools_on(page)
    button(page, "Tools: 2 of 2 on").click()
    views.look("tools of a chat")
    page.keyboard.press("Escape")
    send(page, "clock")
    button(page, "Allow once").wait_for()
    views.look("question before a tool")
    button(page, "Allow once").click()
    said(page, "The tool said: 12:00")
    page.locator(".tool-card summary").last.click()
    views.look("result of a tool")
    page.evaluate("location.hash = '#/tools'")
    page.get_by_text("connection refused").wait_for()
    page.locator(".log summary").click()
    views.look("tools")
    assert views.found == {}


@on_every_screen
def test_axe_finds_nothing_where_something_is_wrong(
    open_page: Callable[..., Any], axe: str, options: dict[str, Any]
) -> None:
    loader = SteppedLoader()
    with ui_server(manager=two_models(loader)) as site:
        page = open_page(site.url, **options)
        views = Views(page, axe)
        button(page, "Load it now").wait_for()
        views.look("nothing loaded")
        button(page, "Load it now").click()
        loader.steps.put(("loading the weights", 43, 100))
        page.locator(".welcome").get_by_text("loading the weights, 43 %").wait_for()
        page.locator(".model-button").click()
        page.locator(".model-row progress").wait_for()
        views.look("loading")
        page.keyboard.press("Escape")
        loader.steps.put(InvalidFileError("tensor 7 ends behind the file"))
        page.locator(".welcome").get_by_text("could not be loaded").wait_for()
        page.get_by_text("What the server says").click()
        page.locator(".model-button").click()
        page.locator(".model-row .notice").wait_for()
        views.look("failed")
        page.keyboard.press("Escape")
        page.locator("#composer").fill("Hello")
        button(page, "Send").click()
        page.locator(".answer").get_by_role("alert").wait_for()
        views.look("not sent")
        page.context.set_offline(True)
        page.locator(".notices").get_by_text("The server cannot be reached.").wait_for()
        views.look("server gone")
        page.context.set_offline(False)
        page.route("**/v1/models", lambda route: route.fulfill(status=401, json={"error": {"message": "no"}}))
        page.reload()
        page.get_by_text("This server needs an API key.").wait_for()
        views.look("locked")
    assert views.found == {}


@on_every_screen
def test_axe_finds_nothing_in_the_model_manager(
    hub: Any,
    tmp_path: Path,
    open_page: Callable[..., Any],
    axe: str,
    options: dict[str, Any],
) -> None:
    released = threading.Event()
    hub.held = (BIG // 2, released)
    hub.sums[REPO, "model-Q8_0.gguf"] = "0" * 64
    with managed(tmp_path) as site:
        page = open_page(f"{site.url}#/models", **options)
        views = Views(page, axe)
        field = page.get_by_label("Model on Hugging Face")
        for name in (f"{REPO}:Q8_0", TOY, f"{REPO}:Q2_K"):
            button(page, "Download").wait_for()  # it is asked for one at a time
            field.fill(name)
            button(page, "Download").click()
        page.get_by_text("The download does not match the files on Hugging Face").wait_for()
        row(page, TOY).get_by_text("tokens of context").wait_for()
        page.locator("form").get_by_role("alert").wait_for()
        views.look("models, a refusal, and a download that failed")
        field.fill(f"{REPO}:Q4_K_M")
        button(page, "Download").click()
        row(page, f"{REPO}:Q4_K_M").get_by_text("% of 1 MiB").wait_for()
        button(page, f"Actions for {TOY}").click()
        views.look("a download, and a menu")
        released.set()
    with managed(tmp_path, allow_model_changes=False) as site:
        page = open_page(f"{site.url}#/models", **options)
        page.get_by_text("For whoever runs this server", exact=True).click()
        other = Views(page, axe)
        other.look("models that stay")
    assert {**views.found, **other.found} == {}
