# SPDX-License-Identifier: MIT
"""Conversations as data: list, search, rename, delete, export, import, models, keys, the server page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.web.actions import act, archive, ask, button, conversation, import_file, said
from tests.web.ui_server import Site, ui_server


def titles(page: Any) -> list[str]:
    """The conversations that are listed."""
    return list(page.locator(".conversation-link").all_text_contents())


def new_chat(page: Any) -> None:
    """Leaves the conversation."""
    page.get_by_role("link", name="New chat").click()
    page.get_by_text("What can I help with?").wait_for()


def test_list_search_rename_delete(chat: Any) -> None:
    for text in ("About apples", "About pears", "Nothing"):
        new_chat(chat)
        ask(chat, text)
    assert titles(chat) == ["Nothing", "About pears", "About apples"]
    chat.keyboard.press("Control+k")
    chat.locator("#search:focus").wait_for()
    chat.keyboard.type("said pears")  # in the answer
    chat.locator(".conversation").nth(1).wait_for(state="detached")
    assert titles(chat) == ["About pears"]
    chat.locator("#search").fill("quinces")
    chat.get_by_text("Nothing found.").wait_for()
    chat.keyboard.press("Escape")
    chat.locator(".conversation").nth(2).wait_for()
    act(chat, "Nothing", "Rename")
    chat.get_by_role("textbox", name="Rename").fill("Something <b>")
    chat.keyboard.press("Enter")
    chat.get_by_role("link", name="Something <b>").wait_for()
    act(chat, "Something <b>", "Delete")
    button(chat, "Delete").click()
    chat.locator(".conversation").nth(2).wait_for(state="detached")
    chat.reload()
    chat.locator(".conversation").nth(1).wait_for()
    assert titles(chat) == ["About pears", "About apples"]


def test_export_and_import(site: Site, open_page: Callable[..., Any], tmp_path: Path) -> None:
    first = open_page(site.url)
    ask(first, "One")
    button(first, "Answer again").click()
    first.get_by_label("version 2 of 2").wait_for()
    first.locator(".answer[aria-busy=true]").wait_for(state="detached")
    first.keyboard.press("Control+,")
    first.get_by_role("tab", name="Data").click()
    with first.expect_download() as download:
        button(first, "Export all (1)").click()
    path = tmp_path / "export.json"
    download.value.save_as(path)
    assert len(json.loads(path.read_text())["conversations"][0]["messages"]) == 3
    second = open_page(site.url)  # another empty profile
    import_file(second, path)
    second.locator(".conversation-link").click()
    said(second, "You said: One")
    second.get_by_label("version 2 of 2").wait_for()


def import_again(page: Any, path: Path) -> str:
    """Imports a file, and gives what the page says of it."""
    page.keyboard.press("Control+,")
    page.get_by_role("tab", name="Data").click()
    page.locator("#import-file").set_input_files(str(path))
    page.locator(".said", has_text="imported").wait_for()
    said_of_it = str(page.locator(".said").inner_text())
    page.keyboard.press("Escape")
    return said_of_it


def export_all(page: Any, path: Path) -> Path:
    """Saves what Export all gives."""
    page.keyboard.press("Control+,")
    page.get_by_role("tab", name="Data").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(path)
    page.keyboard.press("Escape")
    return path


def test_an_import_brings_only_what_is_not_here(site: Site, open_page: Callable[..., Any], tmp_path: Path) -> None:
    first, second = open_page(site.url), open_page(site.url)
    ask(first, "One")
    early = export_all(first, tmp_path / "early.json")
    assert import_again(first, early) == "No new conversations imported, 1 already here."
    assert import_again(second, early) == "1 conversation imported."
    assert import_again(second, early) == "No new conversations imported, 1 already here."
    second.locator(".conversation-link").click()
    said(second, "You said: One")
    ask(first, "Two")
    late = export_all(first, tmp_path / "late.json")
    assert import_again(second, late) == "No new conversations imported, 1 had new messages."
    said(second, "You said: Two")  # what follows what was shown
    assert import_again(second, early) == "No new conversations imported, 1 already here."
    assert json.loads(export_all(second, tmp_path / "back.json").read_text()) == json.loads(late.read_text())


def test_a_conversation_as_markdown(chat: Any) -> None:
    ask(chat, "think of it")
    button(chat, "Answer again").click()
    chat.get_by_label("version 2 of 2").wait_for()
    chat.locator(".answer[aria-busy=true]").wait_for(state="detached")
    act(chat, "think of it", "Export")
    chat.get_by_label("With the reasoning, folded").uncheck()
    with chat.expect_download() as download:
        button(chat, "Download").click()
    assert download.value.suggested_filename.endswith(".md")
    plain = "# think of it\n\n## You\n\nthink of it\n\n## Answer of demo-model\n\nThe number is 42.\n"
    assert Path(download.value.path()).read_text() == plain
    chat.keyboard.press("Control+,")
    chat.get_by_role("tab", name="Data").click()
    button(chat, "Export this chat…").click()
    with chat.expect_download() as download:
        button(chat, "Download").click()
    folded = "<details>\n<summary>Thoughts</summary>\n\nThe user wants a number. I take 42.\n\n</details>"
    assert folded in Path(download.value.path()).read_text()
    act(chat, "think of it", "Export")
    chat.get_by_role("radio", name="JSON").check()
    with chat.expect_download() as download:
        button(chat, "Download").click()
    assert len(json.loads(Path(download.value.path()).read_text())["conversations"][0]["messages"]) == 3


def test_a_file_that_is_no_export(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    chat.keyboard.press("Control+,")
    chat.get_by_role("tab", name="Data").click()
    chat.locator("#import-file").set_input_files(str(tmp_path / "x.json"))
    chat.get_by_text("x.json is not a file that was exported here.").wait_for()


def test_delete_all(chat: Any) -> None:
    ask(chat, "One")
    chat.keyboard.press("Control+,")
    chat.get_by_role("tab", name="Data").click()
    button(chat, "Delete all conversations, prompts and folders").click()
    chat.get_by_text("will be gone for good").wait_for()
    chat.get_by_role("dialog").get_by_role("button", name="Delete all conversations, prompts and folders").click()
    chat.get_by_text("Your conversations will appear here.").wait_for()
    chat.reload()
    chat.get_by_text("Your conversations will appear here.").wait_for()


@pytest.mark.every_case
def test_two_thousand_messages(chat: Any, tmp_path: Path) -> None:
    import_file(chat, archive(tmp_path / "long.json", [conversation("Long", 2000)]))
    chat.locator(".conversation-link").click()
    said(chat, "Answer 1999")
    assert chat.locator(".message").count() < 200
    chat.locator(".scroller").hover()
    for _ in range(4):
        chat.mouse.wheel(0, -100_000)
        chat.wait_for_timeout(200)
    seen = chat.locator(".message").count()
    assert 60 <= seen < 1000
    assert ask(chat, "Hello") == "You said: Hello"


@pytest.mark.every_case
def test_two_thousand_conversations(chat: Any, tmp_path: Path) -> None:
    import_file(
        chat,
        archive(tmp_path / "many.json", [conversation(f"Chat {at}", 2, 1_700_000_000_000 + at) for at in range(2000)]),
    )
    chat.get_by_role("link", name="Chat 1999").wait_for()
    assert chat.locator(".conversation").count() <= 300
    chat.locator("#search").fill("Chat 77")
    chat.get_by_role("link", name="Chat 77", exact=True).wait_for()


def test_the_model_is_chosen_by_its_picker(chat: Any, site: Site) -> None:
    button(chat, "Model: demo-model").click()
    chat.get_by_role("button", name="other-name ready").click()
    button(chat, "Model: other-name").wait_for()
    with chat.expect_request("**/v1/chat/completions") as sent:
        ask(chat, "Hello")
    assert sent.value.post_data_json["model"] == "other-name"
    chat.reload()
    button(chat, "Model: other-name").wait_for()


def test_a_conversation_stays_with_the_model_that_it_began_with(chat: Any) -> None:
    chat.get_by_text("demo-model is running").wait_for()
    ask(chat, "One")
    first = chat.url
    chat.get_by_role("link", name="New chat").click()
    button(chat, "Model: demo-model").click()
    chat.get_by_role("button", name="other-name ready").click()
    ask(chat, "Two")
    chat.goto(first)
    said(chat, "You said: One")
    button(chat, "Model: demo-model").click()
    chat.get_by_role("button", name="demo-model ready").click()
    chat.get_by_role("link", name="New chat").click()
    button(chat, "Model: demo-model").wait_for()  # what was chosen last
    chat.get_by_role("link", name="Two", exact=True).click()
    button(chat, "Model: other-name").wait_for()


def test_a_model_is_loaded_and_unloaded(chat: Any) -> None:
    state = {"status": "unloaded"}
    card = {"id": "m", "object": "model", "created": 0, "root": "m", "default": True}

    def change(status: str) -> Callable[[Any], None]:
        def answer(route: Any) -> None:
            assert route.request.post_data_json == {"model": "m"}
            state["status"] = status
            route.fulfill(json={"id": "m", "status": status})

        return answer

    chat.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [{**card, **state}]}))
    chat.route("**/v1/models/load", change("ready"))
    chat.route("**/v1/models/unload", change("unloaded"))
    chat.reload()
    chat.get_by_text("m is not loaded yet.").wait_for()
    button(chat, "Model: m").click()
    button(chat, "Load m").click()
    button(chat, "Unload m").click()
    chat.get_by_text("Others may be using it.").wait_for()
    button(chat, "Unload").click()
    chat.get_by_role("dialog").wait_for(state="detached")
    button(chat, "Load m").wait_for()
    chat.keyboard.press("Escape")  # the focus was on a button that has gone
    button(chat, "Load m").wait_for(state="detached")


def test_a_failed_load_is_said(chat: Any) -> None:
    card = {"id": "m", "object": "model", "created": 0, "root": "m", "status": "failed", "default": True}
    chat.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [card]}))
    chat.route(
        "**/v1/models/load",
        lambda route: route.fulfill(status=507, json={"error": {"message": "It does not fit into memory."}}),
    )
    chat.reload()
    button(chat, "Model: m").click()
    chat.locator(".model-row").get_by_text("m could not be loaded. Whoever runs this server").wait_for()
    chat.locator(".model-row").get_by_role("button", name="Try again to load m").click()
    chat.get_by_text("m: It does not fit into memory.").wait_for()


def test_a_key_is_asked_for(open_page: Callable[..., Any]) -> None:
    with ui_server(api_key=("sesame",)) as site:
        page = open_page(site.url)
        page.get_by_text("This server needs an API key.").wait_for()
        page.get_by_label("API key", exact=True).fill("wrong")
        button(page, "Use").click()
        page.get_by_role("alert").get_by_text("This key was not accepted.").wait_for()
        assert page.get_by_text("This server needs an API key.").count() == 0
        page.get_by_label("API key", exact=True).fill("sesame")
        button(page, "Use").click()
        page.get_by_text("demo-model is running").wait_for()
        assert ask(page, "Hello") == "You said: Hello"
        page.reload()
        page.get_by_text("You said: Hello").first.wait_for()
        assert page.evaluate("JSON.stringify(localStorage)").find("sesame") == -1


def test_a_key_that_another_tab_remembers_or_forgets_is_so_here(open_page: Callable[..., Any]) -> None:
    with ui_server(api_key=("sesame",)) as site:
        page = open_page(site.url)
        other = page.context.new_page()
        other.goto(site.url)
        for one in (page, other):
            one.get_by_text("This server needs an API key.").wait_for()
        page.get_by_label("API key", exact=True).fill("sesame")
        page.get_by_label("Remember on this device").check()
        button(page, "Use").click()
        page.get_by_text("demo-model is running").wait_for()
        look = "document.dispatchEvent(new Event('visibilitychange'))"  # the user turns to the other tab
        other.evaluate(look)
        other.get_by_text("demo-model is running").wait_for()
        page.keyboard.press("Control+,")
        page.get_by_role("tab", name="Access").click()
        button(page, "Forget the key").click()
        page.get_by_role("dialog").get_by_role("button", name="Close").click()
        other.evaluate(look)
        other.get_by_text("This server needs an API key.").wait_for()


DATABASE_STOPS = """() => {
  const { get } = IDBObjectStore.prototype;
  IDBObjectStore.prototype.get = function (key) { // it has no answer, and its transaction goes on
    const again = () => { get.call(this, key).onsuccess = again; };
    again();
    return {};
  };
  addEventListener("beforeunload", () => { IDBDatabase.prototype.transaction = () => { throw new Error("closed"); }; });
}"""


def test_what_the_database_has_not_taken_when_the_page_goes_away_is_there_in_the_next_one(chat: Any) -> None:
    ask(chat, "Hello")
    chat.evaluate(DATABASE_STOPS)
    ask(chat, "More")
    chat.reload()
    said(chat, "You said: More")
    assert chat.evaluate("sessionStorage.getItem('candle-vllm.unfinished')") is None


def test_a_server_that_is_gone(open_page: Callable[..., Any]) -> None:
    with ui_server() as site:
        page = open_page(site.url)
        page.get_by_text("demo-model is running").wait_for()
        page.route("**/v1/**", lambda route: route.abort())
        ask(page, "Hello")
        page.locator(".answer").get_by_text("The server cannot be reached.").wait_for()
        page.unroute("**/v1/**")
        page.locator(".answer").get_by_role("button", name="Try again").click()
        said(page, "You said: Hello")


def test_charts_have_axes_from_the_first_value_on(chat: Any) -> None:
    chat.get_by_text("demo-model is running").wait_for()
    chat.clock.install()
    chat.get_by_role("link", name="Server").click()
    first = chat.locator(".chart").first
    first.get_by_role("img", name="Running requests, the last minute: now 0, lowest 0, highest 0").wait_for()
    assert first.locator(".value-axis span").all_inner_texts() == ["2", "1", "0"]
    assert first.locator(".time-axis span").all_inner_texts() == ["−1 min", "−30 s", "now"]
    box, dot = (first.locator(name).bounding_box() for name in ("svg", ".last-point"))
    assert abs(dot["x"] + dot["width"] / 2 - box["x"] - box["width"]) < 4  # at the right end, now
    share = chat.locator(".chart").nth(2)
    assert share.locator(".value-axis span").all_inner_texts() == ["100 %", "50 %", "0 %"]
    speed = chat.locator(".chart").nth(4)
    assert speed.locator(".value-axis span").all_inner_texts() == ["10 tok/s", "5 tok/s", "0 tok/s"]
    speed.get_by_role("img", name="Generated: no data yet").wait_for()  # a rate needs two samples
    for _ in range(45):
        chat.clock.run_for(2000)
        chat.wait_for_timeout(20)
    chat.get_by_role("img", name="Running requests, the last 2 minutes").wait_for()
    assert speed.locator(".time-axis span").all_inner_texts() == ["−2 min", "−1 min", "now"]


def test_the_server_page(chat: Any) -> None:
    ask(chat, "Hello")
    chat.get_by_role("link", name="Server").click()
    chat.get_by_text("Running requests").wait_for()
    chat.locator(".chart polyline").first.wait_for(state="attached")  # a flat line has no height
    assert chat.locator(".chart").count() == 6
    assert "candle-vllm 0." in chat.locator(".page-head").inner_text()
    chat.get_by_role("link", name="Manage models").click()
    chat.get_by_role("heading", name="demo-model", exact=True).wait_for()
    chat.get_by_text("Tool calls: hermes · Reasoning: think").wait_for()
