# SPDX-License-Identifier: MIT
"""The library of prompts: made, changed, used, kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.web.actions import ask, button, said
from tests.web.ui_server import Site


def make(page: Any, name: str, text: str, kind: str = "Message") -> None:
    """Adds a prompt in the dialog, which is opened and closed."""
    page.locator(".sidebar").get_by_role("button", name="Prompts").click()
    button(page, "New prompt").click()
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Use", exact=True).select_option(kind)
    page.get_by_label("Text", exact=True).fill(text)
    button(page, "Save").click()
    page.locator(".prompts li", has_text=name).wait_for()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")


def message(page: Any) -> str:
    """What is in the message field."""
    return str(page.locator("#composer").input_value())


def names(page: Any) -> list[str]:
    """The prompts that the dialog shows."""
    page.locator(".sidebar").get_by_role("button", name="Prompts").click()
    page.get_by_role("dialog").wait_for()
    found = list(page.locator(".prompts h3").all_inner_texts())
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    return found


def test_a_prompt_is_made_changed_and_deleted(chat: Any) -> None:
    make(chat, "Sum up", "Sum up what follows.")
    chat.reload()
    chat.locator(".sidebar").get_by_role("button", name="Prompts").click()
    button(chat, "Edit Sum up").click()
    chat.get_by_label("Name", exact=True).fill("Shorten")
    chat.keyboard.press("Enter")
    button(chat, "Delete Shorten").click()
    button(chat, "Cancel").click()
    button(chat, "Delete Shorten").click()
    button(chat, "Delete").click()
    chat.get_by_text("Texts that you use again and again can be kept here.").wait_for()
    chat.keyboard.press("Escape")
    chat.reload()
    chat.get_by_text("What can I help with?").wait_for()
    assert names(chat) == []


def test_a_selection_that_ends_outside_closes_no_dialog(chat: Any) -> None:
    chat.locator(".sidebar").get_by_role("button", name="Prompts").click()
    button(chat, "New prompt").click()
    field = chat.get_by_label("Text", exact=True)
    field.fill("a long text")
    box = field.bounding_box()
    chat.mouse.move(box["x"] + 40, box["y"] + 15)
    chat.mouse.down()
    chat.mouse.move(5, box["y"] + 15, steps=4)
    chat.mouse.up()
    chat.wait_for_timeout(200)
    assert field.input_value() == "a long text"
    chat.mouse.click(5, box["y"] + 15)
    button(chat, "New prompt").wait_for()  # the list is below the form


def test_tab_goes_through_the_parts_of_a_prompt(chat: Any) -> None:
    make(chat, "Translate", "Translate {{text}} into {{language}}.")
    chat.locator("#composer").press_sequentially("/tra")
    chat.get_by_role("option").wait_for()
    chat.keyboard.press("Enter")
    chat.keyboard.type("bread")
    chat.keyboard.press("Enter")
    chat.get_by_role("dialog").get_by_text("{{language}}").wait_for()
    button(chat, "Cancel").click()
    chat.locator("#composer").evaluate("(field) => field.setSelectionRange(12, 12)")
    chat.locator("#composer").press("Tab")
    chat.keyboard.type("German")
    assert message(chat) == "Translate bread into German."
    chat.keyboard.press("Enter")
    said(chat, "You said: Translate bread into German.")


def test_a_slash_chooses_by_keyboard(chat: Any) -> None:
    for name, text in (
        ("Sum up", "Sum up {{text}} in one line."),
        ("Translate", "Translate: "),
        ("Sum of numbers", "Add."),
    ):
        make(chat, name, text)
    options = chat.get_by_role("option")
    chat.locator("#composer").press_sequentially("/sum")
    options.nth(1).wait_for()
    assert [one.split("\n")[0] for one in options.all_inner_texts()] == ["Sum of numbers", "Sum up"]
    chat.keyboard.press("ArrowDown")
    assert options.nth(1).get_attribute("aria-selected") == "true"
    active = chat.locator("#composer").get_attribute("aria-activedescendant")
    assert active == options.nth(1).get_attribute("id")
    chat.keyboard.press("Enter")
    assert message(chat) == "Sum up {{text}} in one line."
    chat.keyboard.type("the news")  # over the variable
    assert message(chat) == "Sum up the news in one line."
    assert options.count() == 0
    chat.keyboard.press("Enter")
    said(chat, "You said: Sum up the news in one line.")


def test_a_slash_that_is_no_prompt_is_a_message(chat: Any) -> None:
    make(chat, "Sum up", "Sum up.")
    field = chat.locator("#composer")
    field.press_sequentially("/s")
    chat.get_by_role("option").wait_for()
    chat.keyboard.press("Escape")
    assert chat.get_by_role("option").count() == 0
    chat.keyboard.press("Enter")
    said(chat, "You said: /s")
    assert ask(chat, "/usr/bin is a folder") == "You said: /usr/bin is a folder"
    field.press_sequentially("a /")
    assert chat.get_by_role("option").count() == 0


def test_the_menu_inserts_where_the_cursor_is(chat: Any) -> None:
    make(chat, "Polite", "please")
    chat.locator("#composer").fill("Answer  now")
    chat.keyboard.press("Home")
    for _ in range(7):
        chat.keyboard.press("ArrowRight")
    chat.locator(".composer").get_by_role("button", name="Prompts").click()
    chat.get_by_role("menuitem", name="Polite").click()
    assert message(chat) == "Answer please now"
    chat.keyboard.type(",")
    assert message(chat) == "Answer please, now"


def test_a_system_prompt_is_for_the_chat(chat: Any, site: Site) -> None:
    make(chat, "Brief", "Be brief.", "System prompt")
    make(chat, "Long", "Be long.", "System prompt")
    chat.locator("#composer").press_sequentially("/brief")
    chat.get_by_role("option").click()
    chat.get_by_text("“Brief” is now the system prompt of this chat.").wait_for()
    assert message(chat) == ""
    ask(chat, "Hello")
    assert site.engine.template_calls[-1].messages[0] == {"role": "system", "content": "Be brief."}
    chat.locator(".composer").get_by_role("button", name="Prompts").click()
    chat.get_by_role("menuitem", name="Long").click()
    chat.get_by_text("This chat has another system prompt.").wait_for()
    button(chat, "Replace").click()
    ask(chat, "Hello")
    assert site.engine.template_calls[-1].messages[0] == {"role": "system", "content": "Be long."}


def test_prompts_go_out_and_come_in(site: Site, open_page: Callable[..., Any], tmp_path: Path) -> None:
    first, second = open_page(site.url), open_page(site.url)
    make(first, "Sum up", "Sum up.")
    make(second, "Mine", "Mine.")
    path = tmp_path / "all.json"
    first.keyboard.press("Control+,")
    first.get_by_role("tab", name="Data").click()
    with first.expect_download() as download:
        button(first, "Export all (0)").click()
    download.value.save_as(path)
    assert [one["name"] for one in json.loads(path.read_text())["prompts"]] == ["Sum up"]
    for expected in ("No new conversations and 1 prompt imported.", "No new conversations imported."):
        second.keyboard.press("Control+,")
        second.get_by_role("tab", name="Data").click()
        second.locator("#import-file").set_input_files(str(path))
        second.locator(".said", has_text=expected).wait_for()
        second.keyboard.press("Escape")
    assert names(second) == ["Mine", "Sum up"]
    second.keyboard.press("Control+,")
    second.get_by_role("tab", name="Data").click()
    button(second, "Delete all conversations, prompts and folders").click()
    second.get_by_role("dialog").get_by_role("button", name="Delete all conversations, prompts and folders").click()
    second.reload()
    second.get_by_text("What can I help with?").wait_for()
    assert names(second) == []
