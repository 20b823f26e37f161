# SPDX-License-Identifier: MIT
"""What the icons of a message say: at hovering and focus, by their names, and in words on touch screens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.web.actions import ask, button, said
from tests.web.ui_server import Site

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TIPS = {
    "Copy message": "Copy message",
    "Answer again": "Answer again. This answer stays as a version.",
    "Edit answer": "Edit this answer. It stays as a version.",
    "Continue": "Continue where this answer stopped",
    "Delete message": "Delete message",
}


@pytest.fixture
def phone(site: Site, open_page: Callable[..., Any]) -> Any:
    """A page on a phone with an answer."""
    page = open_page(site.url, **PHONE)
    page.locator("#composer").fill("Hello")
    button(page, "Send").tap()
    said(page, "You said: Hello")
    page.locator(".answer[aria-busy=true]").wait_for(state="detached")
    return page


def shown_tip(page: Any) -> str:
    """The text of the tooltip that is shown."""
    page.locator(".tip").wait_for()
    return str(page.locator(".tip").inner_text())


def test_every_icon_says_what_it_does_at_hovering(chat: Any) -> None:
    ask(chat, "Hello")
    for name, tip in TIPS.items():
        chat.mouse.move(5, 5)
        chat.locator(".tip").wait_for(state="hidden")
        chat.locator(".answer").get_by_role("button", name=name).hover()
        assert shown_tip(chat) == tip
        box = chat.locator(".tip").bounding_box()
        icon = chat.locator(".answer").get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0
        assert 0 < box["y"] - icon["y"] - icon["height"] < 10
    chat.keyboard.press("Escape")
    chat.locator(".tip").wait_for(state="hidden")
    chat.locator(".answer .numbers summary").hover()
    assert shown_tip(chat) == "Show the statistics of this answer"
    icons = chat.locator(".message-tools button, .message-tools summary")
    assert all(icons.evaluate_all("(all) => all.map((one) => one.hasAttribute('data-tip') && !one.title)"))


def test_tips_come_with_the_focus_and_follow_what_changes(chat: Any) -> None:
    ask(chat, "Hello")
    again = chat.locator(".answer").get_by_role("button", name="Answer again")
    chat.locator(".answer").get_by_role("button", name="Copy message").focus()
    chat.keyboard.press("Tab")
    assert shown_tip(chat) == TIPS["Answer again"]
    assert (
        again.evaluate("(one) => document.getElementById(one.getAttribute('aria-describedby')).textContent")
        == (TIPS["Answer again"])
    )
    chat.keyboard.press("Shift+Tab")
    assert shown_tip(chat) == "Copy message"
    assert again.get_attribute("aria-describedby") is None
    chat.keyboard.press("Enter")
    chat.locator(".tip").get_by_text("Copied").wait_for()
    chat.keyboard.press("Escape")
    chat.locator(".tip").wait_for(state="hidden")


def test_a_touch_screen_has_the_same_in_words(phone: Any, site: Site) -> None:
    assert phone.locator(".answer").get_by_role("button", name="Answer again").count() == 0
    phone.locator(".answer").get_by_role("button", name="Actions").tap()
    menu = phone.locator(".menu:popover-open")
    menu.wait_for()
    assert [text.strip() for text in menu.locator("button").all_inner_texts()] == [*TIPS, "Source"]
    box = menu.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 844
    menu.get_by_role("button", name="Answer again").tap()
    phone.locator(".menu:popover-open").wait_for(state="detached")
    phone.get_by_label("version 2 of 2").wait_for()
    phone.locator(".answer[aria-busy=true]").wait_for(state="detached")
    phone.locator(".answer").get_by_role("button", name="Actions").tap()
    phone.locator(".menu:popover-open").get_by_role("button", name="Previous version").tap()
    phone.get_by_label("version 1 of 2").wait_for()
    phone.locator(".question").get_by_role("button", name="Actions").tap()
    phone.locator(".menu:popover-open").get_by_role("button", name="Edit").tap()
    phone.get_by_role("textbox", name="Edit").wait_for()
