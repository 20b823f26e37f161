# SPDX-License-Identifier: MIT
"""The API key in the page: where it is asked for, shown and kept, and that it leaves by no other way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.actions import ask, button
from tests.web.ui_server import Site, ui_server


@pytest.fixture(scope="module")
def locked_site(browser: Any) -> Iterator[Site]:
    """A server that needs a key."""
    with ui_server(api_key=("sesame",)) as served:
        yield served


@pytest.fixture
def page(locked_site: Site, open_page: Callable[..., Any]) -> Any:
    """A page whose settings are open where the key is."""
    opened = open_page(locked_site.url)
    opened.get_by_text("This server needs an API key.").wait_for()
    opened.keyboard.press("Control+,")
    opened.get_by_role("tab", name="Access").click()
    return opened


def kept(page: Any, storage: str) -> bool:
    """Whether the key is in a storage of the browser."""
    return "sesame" in str(page.evaluate(f"JSON.stringify({storage})"))


def test_the_key_stands_apart_and_says_where_it_is_kept(page: Any) -> None:
    settings = page.get_by_role("dialog")
    field = settings.get_by_label("API key", exact=True)
    assert field.get_attribute("type") == "password"
    field.fill("\u200bsesame\u00a0")  # what comes along when a key is copied, and no header can have
    settings.get_by_role("button", name="Show the key").click()
    assert field.get_attribute("type") == "text"
    settings.get_by_role("button", name="Show the key").click()
    assert field.get_attribute("type") == "password"
    settings.get_by_text("Kept in this tab until it is closed").wait_for()
    settings.get_by_role("button", name="Use").click()
    page.get_by_text("This server needs an API key.").wait_for(state="detached")
    page.locator(".model-button", has_text="demo-model").wait_for()
    assert (kept(page, "sessionStorage"), kept(page, "localStorage")) == (True, False)
    settings.get_by_label("Remember on this device").check()
    settings.get_by_text("Kept in this browser until you take it out").wait_for()
    settings.get_by_role("button", name="Use").click()
    assert (kept(page, "sessionStorage"), kept(page, "localStorage")) == (False, True)
    for tab in ("This chat", "All chats", "Data"):
        settings.get_by_role("tab", name=tab).click()
        assert settings.get_by_label("API key", exact=True).count() == 0
    settings.get_by_role("tab", name="Access").click()
    settings.get_by_role("button", name="Forget the key").click()
    page.get_by_text("This server needs an API key.").wait_for()
    assert not kept(page, "sessionStorage")
    assert not kept(page, "localStorage")


def test_the_key_is_in_no_export(page: Any, tmp_path: Path) -> None:
    settings = page.get_by_role("dialog")
    settings.get_by_label("API key", exact=True).fill("sesame")
    settings.get_by_label("Remember on this device").check()
    settings.get_by_role("button", name="Use").click()
    page.keyboard.press("Escape")
    assert ask(page, "Hello") == "You said: Hello"
    page.keyboard.press("Control+,")
    page.get_by_role("tab", name="Data").click()
    with page.expect_download() as download:
        button(page, "Export all (1)").click()
    download.value.save_as(tmp_path / "export.json")
    written = (tmp_path / "export.json").read_text()
    assert "You said: Hello" in written
    assert "sesame" not in written
