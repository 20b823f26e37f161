# SPDX-License-Identifier: MIT
"""Talking: first chat, stop, reload, edit and branch, continue, delete, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.engine.outputs import RequestMetrics
from tests.web.actions import archive, ask, button, conversation, eventually, import_file, said, say, wait_idle
from tests.web.ui_server import MARKDOWN, Site


def test_first_chat_from_an_empty_profile(chat: Any, site: Site) -> None:
    chat.get_by_text("What can I help with?").wait_for()
    assert ask(chat, "Hello") == "You said: Hello"
    chat.locator(".conversation-link").get_by_text("Hello", exact=True).wait_for()
    assert chat.locator("#composer").input_value() == ""
    assert "#/chat/" in chat.url
    chat.get_by_text("16 tokens", exact=True).wait_for()
    chat.locator(".gauge").wait_for()
    assert ask(chat, "More") == "You said: More"
    assert chat.locator(".question").count() == 2
    assert len(site.engine.template_calls[-1].messages) == 3


def test_markdown(chat: Any) -> None:
    ask(chat, "markdown please")
    answer = chat.locator(".answer")
    assert answer.locator("h3").inner_text() == "A title"
    assert answer.locator("table tbody tr").count() == 2
    assert answer.locator("math").count() == 2
    assert answer.locator("figure.code .language").inner_text() == "python"
    answer.locator(".hl-keyword").first.wait_for()
    assert answer.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
    assert answer.locator("input[type=checkbox]").count() == 2
    button(chat, "Source").click()
    assert answer.locator("pre.raw").inner_text().strip() == MARKDOWN.strip()


def test_lines_of_an_answer_end_where_the_model_ended_them(chat: Any) -> None:
    ask(chat, "An *old\npond*<br>\nfrog\\\njumps\n- in\n  water\n> a\n> splash")
    shown = chat.locator(".answer .markdown").inner_text()
    assert shown.split("\n\n") == ["You said: An old\npond\nfrog\njumps", "in\nwater", "a\nsplash"]


def test_the_page_says_how_an_answer_ended_that_the_model_did_not_end(chat: Any) -> None:
    choices = (
        '[{"index": 0, "delta": {"content": "It is "}}]',
        '[{"index": 0, "delta": {}, "finish_reason": "refusal"}]',
    )
    body = "".join(f'data: {{"choices": {each}}}\n\n' for each in choices) + "data: [DONE]\n\n"
    chat.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    say(chat, "What is it?")
    chat.get_by_text("The answer ended early (refusal).").wait_for()


def test_copy(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "markdown please")
    button(page, "Copy code").click()
    button(page, "Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("def longest")
    button(page, "Copy code").wait_for()  # "Copied" is said for a moment
    page.locator(".answer").get_by_role("button", name="Copy message").click()
    page.locator(".answer").get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("# A title")


def test_reasoning_folds_out(chat: Any) -> None:
    assert "The number is 42." in ask(chat, "think of one")
    summary = chat.locator(".reasoning summary")
    assert summary.inner_text().startswith("Thought")
    assert chat.get_by_text("I take 42").count() == 0
    summary.click()
    chat.get_by_text("I take 42").wait_for()


def test_stop_in_the_middle(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "slowly")
    said(page, "word5")
    button(page, "Stop").click()
    said(page, "Stopped.")
    kept = page.locator(".answer .markdown").inner_text()
    assert "word5" in kept
    assert "word399" not in kept
    page.wait_for_timeout(300)
    assert page.locator(".answer .markdown").inner_text() == kept
    assert slow_site.engine.aborted
    page.keyboard.type("x")  # the field has the focus again
    assert page.locator("#composer").input_value() == "x"


_IS_SAVED = """async (text) => {
  const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await done(indexedDB.open((await indexedDB.databases())[0].name));
  const messages = await done(database.transaction("messages").objectStore("messages").getAll());
  database.close();
  return JSON.stringify(messages).includes(text);
}"""


def test_escape_stops_and_a_reload_loses_nothing(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "slowly")
    said(page, "word9 ")
    eventually(page, lambda: page.evaluate(_IS_SAVED, "word9 "))  # `wait_for_function` takes a promise for a yes
    page.locator("#composer").fill("half a thought")
    page.reload()
    said(page, "Stopped.")
    assert "word9" in page.locator(".answer .markdown").inner_text()
    assert page.locator("#composer").input_value() == "half a thought"
    page.get_by_role("button", name="Continue").click()  # there is one
    said(page, "and it goes on.")
    assert "word9" in page.locator(".answer .markdown").inner_text()
    assert page.locator(".answer").count() == 1
    wait_idle(page)
    page.locator("#composer").fill("")
    say(page, "slowly")
    page.locator(".answer").nth(1).get_by_text("word3").wait_for()
    page.keyboard.press("Escape")
    said(page, "Stopped.")


def test_escape_stops_no_answer_where_it_closes_a_dialog_or_clears_the_search(
    slow_site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page(slow_site.url)
    page.locator("#attach-file").set_input_files([{"name": "a.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    page.locator(".composer .file").wait_for()
    say(page, "slowly")
    said(page, "word3")
    page.locator(".question .file-name").click()
    page.locator("dialog .file-text").wait_for()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    page.keyboard.press("Control+k")
    page.keyboard.type("slow")
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == ""
    said(page, "word30")
    assert page.locator(".answer[aria-busy=true]").count() == 1
    page.keyboard.press("Escape")
    said(page, "Stopped.")


def test_an_answer_is_saved_while_its_tab_is_hidden(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "slowly")
    said(page, "word3")
    page.evaluate("window.requestAnimationFrame = () => 0")  # a hidden page has no frames
    page.wait_for_timeout(100)
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true })")
    eventually(page, lambda: page.evaluate(_IS_SAVED, "word60 ") and not page.evaluate(_IS_SAVED, "word399"))


_CONFIRM = """(field) => field.dispatchEvent(
  new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""


def test_enter_that_confirms_a_composition_sends_nothing(chat: Any) -> None:
    """In Safari the composition has ended before the key that ends it: 229 is the code of a key of an input method."""
    ask(chat, "Hello")
    chat.locator("#composer").fill("日本")
    assert chat.locator("#composer").evaluate(_CONFIRM)  # the default is not prevented
    assert chat.locator("#composer").input_value() == "日本"
    button(chat, "Edit").click()
    assert chat.locator(".editor textarea").evaluate(_CONFIRM)
    chat.locator(".editor").wait_for()
    chat.locator(".editor textarea").press("Escape")
    chat.locator(".conversation-link").dblclick()
    chat.locator(".conversation input").evaluate(_CONFIRM)
    chat.locator(".conversation input").wait_for()
    assert chat.locator(".question").count() == 1


_GIVE_UP = """(field) => field.dispatchEvent(
  new KeyboardEvent("keydown", { key: "Escape", isComposing: true, bubbles: true, cancelable: true }))"""


def test_escape_that_ends_a_composition_closes_nothing(chat: Any) -> None:
    ask(chat, "Hello")
    button(chat, "Edit").click()
    editor, search = chat.locator(".editor textarea"), chat.locator("#search")
    editor.fill("日本")
    editor.evaluate(_GIVE_UP)
    assert editor.input_value() == "日本"
    editor.press("Escape")
    chat.locator(".editor").wait_for(state="detached")
    chat.locator(".conversation-link").dblclick()
    chat.locator(".conversation input").evaluate(_GIVE_UP)
    chat.locator(".conversation input").press("Escape")
    chat.locator(".conversation input").wait_for(state="detached")
    search.fill("日本")
    search.evaluate(_GIVE_UP)
    assert search.input_value() == "日本"


_SLOW_DATABASE = """
const open = IDBFactory.prototype.open;
IDBFactory.prototype.open = function (...given) {
  const request = open.apply(this, given);
  const late = (handler) => request.addEventListener("success", (event) => setTimeout(() => handler(event), 1500));
  Object.defineProperty(request, "onsuccess", { set: late });
  return request;
};
"""


def test_what_is_sent_before_the_database_is_open_is_kept(chat: Any) -> None:
    ask(chat, "First")
    chat.add_init_script(_SLOW_DATABASE)
    chat.reload()
    assert ask(chat, "Second") == "You said: Second"
    chat.goto(chat.url.split("#")[0])
    chat.reload()
    assert ask(chat, "Third") == "You said: Third"
    chat.reload()
    said(chat, "You said: Third")
    assert chat.locator(".conversation-link").count() == 2  # the second went to the first's, where the page was


def test_reload_keeps_a_finished_chat(chat: Any) -> None:
    ask(chat, "Hello")
    chat.reload()
    said(chat, "You said: Hello")
    assert ask(chat, "Again") == "You said: Again"


def test_edit_makes_a_branch_and_siblings_lead_back(chat: Any) -> None:
    ask(chat, "One")
    ask(chat, "Two")
    chat.locator(".question").first.hover()
    chat.locator(".question").first.get_by_role("button", name="Edit").click()
    editor = chat.get_by_role("textbox", name="Edit")
    assert editor.input_value() == "One"
    editor.fill("Three")
    editor.press("Enter")
    said(chat, "You said: Three")
    wait_idle(chat)
    assert chat.locator(".question").count() == 1
    chat.get_by_label("version 2 of 2").wait_for()
    button(chat, "Previous version").click()
    said(chat, "You said: Two")
    assert chat.locator(".question").count() == 2
    chat.reload()
    said(chat, "You said: Two")  # the branch that was shown
    button(chat, "Next version").click()
    said(chat, "You said: Three")


def test_regenerate_makes_a_sibling(chat: Any) -> None:
    ask(chat, "One")
    button(chat, "Answer again").click()
    chat.get_by_label("version 2 of 2").wait_for()
    wait_idle(chat)
    assert chat.locator(".answer").count() == 1
    button(chat, "Previous version").click()
    chat.get_by_label("version 1 of 2").wait_for()


def test_settings_of_unknown_defaults_and_in_german(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url, locale="de-DE")
    card = {"id": "m", "object": "model", "created": 0, "root": "m", "status": "unloaded", "default": True}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [card]}))
    page.reload()
    page.get_by_role("button", name="Modell: m").wait_for()
    page.keyboard.press("Control+,")
    slider = page.get_by_role("slider", name="Temperatur, Schieberegler")
    field = page.get_by_role("textbox", name="Temperatur", exact=True)
    assert slider.get_attribute("aria-valuetext") == "nicht gesetzt"
    field.fill("0,7")
    field.blur()
    assert (slider.get_attribute("aria-valuetext"), slider.input_value(), field.input_value()) == (None, "0.7", "0,7")
    field.fill("viel")
    field.blur()
    page.get_by_text("Muss zwischen 0 und 100 liegen.").wait_for()
    assert slider.input_value() == "0.7"
    heights = set()
    for tab in ("Dieser Chat", "Alle Chats", "Zugang", "Daten"):
        page.get_by_role("tab", name=tab).click()
        heights.add(page.get_by_role("dialog").bounding_box()["height"])
    assert len(heights) == 1


def test_the_way_to_the_end_goes_where_there_is_none(chat: Any) -> None:
    ask(chat, "markdown")
    chat.locator(".messages-frame").evaluate("(frame) => frame.scrollTo({ top: 0 })")
    button(chat, "Go to the newest message").wait_for()
    chat.locator(".question").get_by_role("button", name="Edit").click()
    chat.keyboard.press("Control+a")
    chat.keyboard.type("short")
    chat.keyboard.press("Enter")
    said(chat, "You said: short")
    button(chat, "Go to the newest message").wait_for(state="detached")


def test_another_version_is_shown_where_the_old_one_was(chat: Any, tmp_path: Path) -> None:
    long = conversation("long", 80)
    messages = long["messages"]
    messages.insert(5, {**messages[4], "id": "other", "text": "Another question", "created": 4})
    import_file(chat, archive(tmp_path / "two.json", [long]))
    chat.get_by_role("link", name="long").click()
    said(chat, "Question 78 of long")
    frame, versions = chat.locator(".messages-frame"), chat.get_by_role("group", name="Versions")
    for _ in range(3):
        frame.evaluate("(frame) => frame.scrollTo({ top: 0 })")
        chat.wait_for_timeout(200)  # for earlier messages
    for name, there in (("Previous version", "version 1 of 2"), ("Next version", "version 2 of 2")):
        button(chat, name).click()
        chat.get_by_label(there).wait_for()
        chat.wait_for_timeout(200)  # for what would scroll
        assert 0 < versions.bounding_box()["y"] < 800
    said(chat, "Question 78 of long")
    ask(chat, "Last")
    button(chat, "Go to the newest message").wait_for(state="detached")


def test_an_answer_is_edited_as_a_version(chat: Any) -> None:
    ask(chat, "One")
    button(chat, "Edit answer").click()
    chat.get_by_role("textbox", name="Edit", exact=True).fill("In my words")
    button(chat, "Save").click()
    said(chat, "In my words")
    chat.get_by_label("version 2 of 2").wait_for()
    chat.reload()
    said(chat, "In my words")
    button(chat, "Previous version").click()
    said(chat, "You said: One")


def test_continue_appends(chat: Any) -> None:
    ask(chat, "One")
    chat.locator(".answer").get_by_role("button", name="Continue").click()
    said(chat, "You said: One and it goes on.")


def test_what_came_of_guesses_stands_among_the_numbers(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = chat.locator(".numbers li")
    ask(chat, "One")
    chat.locator(".numbers summary").click()
    assert lines.get_by_text("Generated: 14 tokens").count() == 1
    assert chat.get_by_text("Draft tokens:").count() == 0
    counted = partial(RequestMetrics, draft_tokens=12, accepted_draft_tokens=9)
    monkeypatch.setattr("candle_vllm.core.testing.scripted_sequence.RequestMetrics", counted)
    chat.locator(".answer").get_by_role("button", name="Continue").click()
    lines.get_by_text("Draft tokens: 12, 9 of them accepted").wait_for()
    wait_idle(chat)
    chat.locator(".answer").get_by_role("button", name="Continue").click()
    lines.get_by_text("Draft tokens: 24, 18 of them accepted").wait_for()
    wait_idle(chat)
    chat.reload()
    chat.locator(".numbers summary").click()
    lines.get_by_text("Draft tokens: 24, 18 of them accepted").wait_for()


def test_delete_a_message(chat: Any) -> None:
    ask(chat, "One")
    ask(chat, "Two")
    chat.locator(".question").nth(1).hover()
    chat.locator(".question").nth(1).get_by_role("button", name="Delete message").click()
    chat.get_by_text("everything that follows").wait_for()
    button(chat, "Delete").click()
    chat.locator(".question").nth(1).wait_for(state="detached")
    chat.reload()
    said(chat, "You said: One")
    assert chat.locator(".question").count() == 1


def test_settings_reach_the_engine_and_can_be_reset(chat: Any, site: Site) -> None:
    button(chat, "Settings of this chat").click()
    chat.get_by_label("Temperature", exact=True).fill("0.25")
    chat.get_by_label("System prompt").fill("Be brief.")
    chat.get_by_label("Top k", exact=True).fill("1.5")
    chat.get_by_label("Seed", exact=True).fill("7")
    chat.get_by_text("Must be between").wait_for()
    chat.keyboard.press("Escape")
    ask(chat, "Hello")
    params = site.engine.requests[-1].params
    assert (params.temperature, params.seed) == (0.25, 7)
    assert site.engine.template_calls[-1].messages[0] == {"role": "system", "content": "Be brief."}
    button(chat, "Settings of this chat").click()
    button(chat, "Reset all").click()
    chat.keyboard.press("Escape")
    ask(chat, "Hello")
    assert site.engine.template_calls[-1].messages[0]["role"] == "user"
    assert site.engine.requests[-1].params.seed is None


def test_settings_say_what_counts_where_nothing_is_set(chat: Any, site: Site) -> None:
    card = {"id": "demo-model", "status": "ready", "default": True}
    known = {**card, "default_sampling": {"temperature": 0.6, "top_k": 20}}
    cards = [known]
    chat.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards}))
    chat.reload()
    button(chat, "Settings of this chat").click()
    chat.get_by_text("Default: 0.6").wait_for()
    chat.get_by_text("Default: 20").wait_for()
    slider = chat.get_by_role("slider", name="Temperature, slider")
    field = chat.get_by_label("Temperature", exact=True)
    assert (slider.input_value(), field.input_value(), field.get_attribute("placeholder")) == ("0.6", "", "0.6")
    slider.fill("1.2")
    assert field.input_value() == "1.2"
    slider.press("ArrowRight")
    assert field.input_value() == "1.25"
    field.fill("50")  # more than the slider has
    field.press("Tab")
    assert slider.input_value() == "2"
    chat.get_by_text("Above 2, most models write nonsense.").wait_for()
    chat.keyboard.press("Escape")
    ask(chat, "Hello")
    assert site.engine.requests[-1].params.temperature == 50
    button(chat, "Settings of this chat").click()
    button(chat, "Reset Temperature").click()
    assert (slider.input_value(), field.input_value()) == ("0.6", "")
    chat.get_by_role("tab", name="All chats").click()
    slider.fill("0.3")
    chat.get_by_role("tab", name="This chat").click()
    chat.get_by_text("All chats: 0.3").wait_for()
    chat.locator(".page-head .badge-dot.wider").wait_for()
    assert slider.input_value() == "0.3"
    cards[0] = card  # a model that is not loaded tells nothing
    chat.reload()
    button(chat, "Settings of this chat").click()
    chat.get_by_text("Default: the model's own").first.wait_for()


def test_structured_output(chat: Any, site: Site) -> None:
    button(chat, "Settings of this chat").click()
    chat.get_by_role("textbox", name="Structured output").fill('{"type": "obj')
    chat.get_by_text("not a JSON object yet").wait_for()
    chat.get_by_role("textbox", name="Structured output").fill('{"type": "object"}')
    chat.keyboard.press("Escape")
    ask(chat, "Hello")
    assert site.engine.requests[-1].params.structured_outputs.json == {"type": "object"}


def test_probabilities(chat: Any) -> None:
    chat.keyboard.press("Control+,")
    chat.get_by_label("Token probabilities").select_option("on")
    chat.keyboard.press("Escape")
    ask(chat, "Hello")
    button(chat, "Probabilities").click()
    assert "".join(chat.locator(".token").all_inner_texts()) == "You said: Hello<|eos|>"
    chat.locator(".token").first.click()
    assert chat.locator(".alternatives tr").count() == 5


def test_a_refused_request_is_a_banner_with_a_retry(chat: Any, site: Site) -> None:
    chat.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, json={"error": {"message": "The queue is full.", "param": None}}),
    )
    say(chat, "Hello")
    chat.get_by_role("alert").get_by_text("The queue is full.").wait_for()
    chat.unroute("**/v1/chat/completions")
    button(chat, "Try again").click()
    said(chat, "You said: Hello")
    assert chat.get_by_role("alert").count() == 0


def test_a_dropped_connection_keeps_the_partial_answer(chat: Any) -> None:
    begun = 'data: {"choices":[{"index":0,"delta":{"content":"The beginning"}}]}\n\n'
    chat.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=begun))
    say(chat, "Hello")
    chat.get_by_text("The connection was lost").wait_for()
    assert chat.locator(".answer .markdown").inner_text() == "The beginning"
    chat.unroute("**/v1/chat/completions")
    button(chat, "Try again").click()
    said(chat, "The beginning and it goes on.")


def test_an_answer_goes_on_while_another_chat_is_shown(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "think slowly")
    page.locator(".answer").wait_for()
    page.get_by_role("link", name="New chat").click()
    page.get_by_text("What can I help with?").wait_for()
    page.locator(".conversation-link").first.click()
    said(page, "The number is 42.")
