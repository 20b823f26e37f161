# SPDX-License-Identifier: MIT
"""Themes, phone, keyboard, languages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.web.actions import act, ask, button, eventually, findings, said, say, wait_idle
from tests.web.ui_server import Site, ui_server

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.one_of_each
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("phone", [False, True])
def test_axe_finds_nothing_in_the_list(
    site: Site, open_page: Callable[..., Any], axe: str, scheme: str, phone: bool
) -> None:
    page = open_page(site.url, color_scheme=scheme, reduced_motion="reduce", **(PHONE if phone else {}))
    page.locator("#composer").fill("Hello")
    button(page, "Send").click()
    said(page, "You said: Hello")
    if phone:
        button(page, "Show conversations").tap()
    button(page, "New folder").click()
    page.get_by_label("Name of the folder").fill("Work")
    assert findings(page, axe) == []
    page.keyboard.press("Enter")
    act(page, "Hello", "Pin")
    page.locator(".conversation", has_text="Hello").hover()
    button(page, "Actions for Hello").click()
    page.get_by_role("menu").wait_for()
    assert findings(page, axe) == []
    page.get_by_role("menuitem", name="Move to folder").click()
    page.get_by_role("textbox", name="New folder").wait_for()
    assert findings(page, axe) == []
    page.keyboard.press("Escape")
    act(page, "Hello", "Export")
    button(page, "Download").wait_for()
    assert findings(page, axe) == []
    page.keyboard.press("Escape")
    page.locator(".sidebar").get_by_role("button", name="Prompts").click()
    button(page, "New prompt").click()
    page.get_by_label("Name", exact=True).fill("Sum up")
    page.get_by_label("Text", exact=True).fill("Sum up.")
    assert findings(page, axe) == []
    button(page, "Save").click()
    button(page, "Edit Sum up").wait_for()
    assert findings(page, axe) == []
    page.keyboard.press("Escape")
    if phone:
        button(page, "Hide conversations").tap()
    page.locator("#composer").press_sequentially("/")
    page.get_by_role("option").wait_for()
    assert findings(page, axe) == []


def background(page: Any) -> str:
    """The page's colour."""
    return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))


def test_dark_mode(site: Site, open_page: Callable[..., Any]) -> None:
    light, dark = (open_page(site.url, color_scheme=scheme) for scheme in ("light", "dark"))
    bright, dim = background(light), background(dark)
    assert bright != dim
    light.keyboard.press("Control+,")
    light.get_by_label("Theme").select_option("dark")
    assert background(light) == dim
    light.reload()
    light.get_by_text("What can I help with?").wait_for()
    assert background(light) == dim
    light.keyboard.press("Control+,")
    light.get_by_label("Theme").select_option("system")
    assert background(light) == bright


def test_phone(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, **PHONE)
    page.locator("#composer").tap()
    page.keyboard.type("markdown")
    page.keyboard.press("Enter")  # a new line: phones have no Shift
    assert page.locator("#composer").input_value() == "markdown\n"
    button(page, "Send").tap()
    said(page, "A title")
    page.locator(".answer[aria-busy=true]").wait_for(state="detached")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(
        "[...document.querySelectorAll('.blocks > *')].every((one) => one.getBoundingClientRect().right <= 390)"
    )
    assert not page.locator(".sidebar").is_visible()
    button(page, "Show conversations").tap()
    page.locator(".sidebar").wait_for()
    page.get_by_role("link", name="New chat").tap()
    page.get_by_text("What can I help with?").wait_for()
    assert not page.locator(".sidebar").is_visible()


def test_a_phone_that_is_turned_over_its_list_goes_on(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, **PHONE)
    button(page, "Show conversations").tap()
    page.locator(".sidebar").wait_for()
    page.set_viewport_size({"width": 844, "height": 390})
    page.locator("#composer").tap()
    page.keyboard.type("Hello")
    button(page, "Send").tap()
    said(page, "You said: Hello")


def focused(page: Any) -> str:
    """What has the focus, as a screen reader would name it."""
    return str(
        page.evaluate(
            "(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent).trim()"
        )
    )


def test_enter_begins_a_line_in_the_fields_of_a_phone(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator("#composer").fill("one")
    page.locator("#composer").press("Enter")
    assert page.locator("#composer").input_value() == "one\n"
    button(page, "Send").click()
    wait_idle(page)
    button(page, "Actions").first.click()
    button(page, "Edit").first.click()
    page.locator(".editor textarea").press("Enter")
    assert page.locator(".editor textarea").input_value() == "one\n"


_RIGHT_TO_LEFT = """# כותרת, ABC!

מה שלומך?

- אחת, `code`
- שתיים

> ציטוט.

| שם | ערך |
|---|---|
| א | $x + 1$ |

```python
x = 1
```

English again.
"""
_SIDES = """(all) => all.map((one) => [one.localName, getComputedStyle(one).direction])"""


def test_texts_have_the_direction_of_their_language(open_page: Callable[..., Any]) -> None:
    with ui_server(lambda prompt: _RIGHT_TO_LEFT) as site:
        page = open_page(site.url)
        ask(page, "שלום, ABC?")
        blocks = page.locator(".markdown").locator("h3, p, ul, blockquote, table, pre, math")
        found = blocks.evaluate_all(_SIDES)
        left = [("pre", "ltr"), ("math", "ltr"), ("p", "ltr")]
        assert sorted(map(tuple, found)) == sorted(
            [("h3", "rtl"), ("p", "rtl"), ("p", "rtl"), ("ul", "rtl"), ("blockquote", "rtl"), ("table", "rtl"), *left]
        )
        assert page.locator(".bubble").evaluate_all(_SIDES) == [["div", "rtl"]]
        button(page, "Edit").click()
        assert page.locator(".editor textarea").evaluate_all(_SIDES) == [["textarea", "rtl"]]
        page.locator("#composer").fill("مرحبا")
        assert page.locator("#composer").evaluate_all(_SIDES) == [["textarea", "rtl"]]
        assert page.locator(".conversation-link").evaluate_all(_SIDES) == [["a", "rtl"]]


def test_keyboard_only(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url)
    page.get_by_text("demo-model is running").wait_for()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    said(page, "You said: Hello")
    assert page.locator(".answer .markdown").inner_text() == "You said: Hello\nyou"
    page.locator(".answer[aria-busy=true]").wait_for(state="detached")
    page.keyboard.press("ArrowUp")  # edits the last question
    page.keyboard.press("Control+a")
    page.keyboard.type("Changed")
    page.keyboard.press("Enter")
    said(page, "You said: Changed")
    page.keyboard.press("Control+Shift+O")
    page.get_by_text("What can I help with?").wait_for()
    eventually(page, lambda: focused(page) == "Message")
    page.keyboard.press("Control+k")
    eventually(page, lambda: focused(page) == "Search conversations")
    page.keyboard.press("Tab")
    assert focused(page) == "Hello"
    page.keyboard.press("Enter")
    said(page, "You said: Changed")
    page.locator("body").press("Control+/")
    page.get_by_role("heading", name="Keyboard shortcuts").wait_for()
    for _ in range(5):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Keyboard shortcuts").wait_for(state="detached")
    page.keyboard.press("Control+b")
    page.locator(".sidebar").wait_for(state="hidden")


def test_the_focus_stays_where_the_work_is(chat: Any) -> None:
    ask(chat, "Hello")
    chat.keyboard.press("ArrowUp")
    chat.keyboard.press("Escape")
    assert focused(chat) == "Message"
    edit = chat.locator(".question").get_by_role("button", name="Edit")
    edit.focus()
    chat.keyboard.press("Enter")
    chat.keyboard.press("Escape")
    assert focused(chat) == "Edit"
    chat.keyboard.press("Enter")
    chat.keyboard.type(" you")
    chat.keyboard.press("Enter")
    said(chat, "You said: Hello you")
    wait_idle(chat)
    assert focused(chat) == "Message"
    again = chat.get_by_role("button", name="Answer again")
    again.focus()
    chat.keyboard.press("Enter")
    chat.get_by_label("version 2 of 2").last.wait_for()
    wait_idle(chat)
    assert focused(chat) == "Message"


def test_attached_files_stand_apart_on_a_phone(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, **PHONE)
    file = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"}
    page.locator("#attach-file").set_input_files([file, file])
    chips = page.locator(".composer .file")
    chips.nth(1).wait_for()
    inside = [chips.first.locator(each) for each in (".file-title", ".faint")]
    for pair in ([chips.nth(0), chips.nth(1)], inside):
        left, right = (one.bounding_box() for one in pair)
        assert right["x"] - (left["x"] + left["width"]) >= 3


def test_a_closing_dialog_takes_the_focus_from_nothing_else(chat: Any) -> None:
    button(chat, "Settings of this chat").click()
    chat.locator("dialog[open]").wait_for()
    went = """async () => {
        document.querySelector("dialog").dispatchEvent(new Event("cancel", { cancelable: true }));
        await new Promise((done) => setTimeout(done));
        const before = document.activeElement.getAttribute("aria-label");
        document.getElementById("composer").focus();
        await new Promise((done) => setTimeout(done, 400));
        return [before, document.activeElement.id];
    }"""
    assert chat.evaluate(went) == ["Settings of this chat", "composer"]


def test_the_focus_goes_everywhere(chat: Any) -> None:
    ask(chat, "markdown")
    chat.locator("body").click(position={"x": 700, "y": 5})
    seen = set()
    for _ in range(40):
        chat.keyboard.press("Tab")
        seen.add(focused(chat))
    wanted = {
        "Skip to the message field",
        "New chat",
        "Search conversations",
        "Settings",
        "Model: demo-model",
        "Copy code",
        "Answer again",
        "Message",
    }
    assert wanted <= seen


def test_answers_are_announced(chat: Any) -> None:
    ask(chat, "Hello")
    assert chat.locator("[aria-live=polite]").first.text_content() == "You said: Hello"


def test_german(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, locale="de-AT")
    page.get_by_text("Womit kann ich helfen?").wait_for()
    assert page.evaluate("document.documentElement.lang") == "de"
    page.keyboard.press("Control+,")
    page.get_by_label("Sprache").select_option("en")
    page.get_by_role("heading", name="Settings").wait_for()


def test_motion_can_be_reduced(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url, reduced_motion="reduce")
    say(page, "think slowly")
    page.locator(".pulse").wait_for()
    assert page.evaluate("document.getAnimations().length") == 0
    said(page, "The number is 42.")


def test_panels_stay_on_a_phone(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator(".model-button").tap()
    page.locator(".popover").wait_for()
    panel = page.locator(".popover").bounding_box()
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= 390
    page.keyboard.press("Escape")
    page.keyboard.press("Control+/")
    page.locator("dialog").wait_for()
    sheet = page.locator("dialog").bounding_box()
    assert sheet["height"] < 700
    page.keyboard.press("Escape")
    page.keyboard.press("Control+,")
    page.get_by_label("Structured output").scroll_into_view_if_needed()
    assert page.get_by_role("heading", name="Settings").bounding_box()["y"] >= 0  # stays in sight


def test_nothing_gapes_below_a_question(chat: Any) -> None:
    ask(chat, "Hello")
    bubble, answer = (chat.locator(name).bounding_box() for name in (".bubble", ".answer"))
    assert answer["y"] - bubble["y"] - bubble["height"] < 32


def test_tools_of_a_message_hide_while_an_answer_is_written(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "slowly")
    page.locator(".answer[aria-busy=true]").wait_for()
    page.mouse.move(5, 5)
    opacities = page.locator(".question .message-tools > *").evaluate_all(
        "(all) => all.map((one) => getComputedStyle(one).opacity)"
    )
    assert opacities
    assert set(opacities) == {"0"}
    page.keyboard.press("Escape")
