# SPDX-License-Identifier: MIT
"""The list of conversations: names by the model, pins, folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.web.actions import act, archive, ask, button, conversation, import_file, said, say
from tests.web.ui_server import Site

CHAT = "**/v1/chat/completions"


@pytest.fixture
def named(site: Site, open_page: Callable[..., Any]) -> Any:
    """A page where the model names conversations."""
    return open_page(site.url, titles=True)


@pytest.fixture
def sent(named: Any) -> list[dict[str, Any]]:
    """The chat requests of the page."""
    bodies: list[dict[str, Any]] = []

    def keep(request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json)

    named.on("request", keep)
    return bodies


def asks_for_title(body: dict[str, Any]) -> bool:
    """Whether a chat request is the page's own for a title."""
    return body["messages"][-1]["content"].startswith("Write a title")


def test_the_model_names_a_conversation_once(named: Any, sent: list[dict[str, Any]]) -> None:
    ask(named, "Something with a title")
    named.get_by_role("link", name="A good name", exact=True).wait_for()
    title = sent[1]
    assert asks_for_title(title)
    assert [one["role"] for one in title["messages"]] == ["user", "assistant", "user"]
    assert (title["priority"], title["enable_thinking"], title["max_completion_tokens"]) == (1, False, 40)
    assert title["tools"] == []  # else the server would offer those of its MCP servers
    ask(named, "And more of the title")
    named.reload()
    named.get_by_role("link", name="A good name", exact=True).wait_for()
    assert [asks_for_title(body) for body in sent] == [False, True, False]


def test_what_is_no_title_leaves_the_first_line(named: Any, sent: list[dict[str, Any]]) -> None:
    ended: list[bool] = []

    def end(request: Any) -> None:
        ended.append("chat" in request.url and asks_for_title(request.post_data_json))

    named.on("requestfinished", end)
    named.on("requestfailed", end)  # the page closes the connection behind the last event
    ask(named, "Hello")
    while not any(ended):  # else the next message would end the request for a title, and the page would ask again
        named.wait_for_timeout(20)
    named.wait_for_timeout(100)  # for the page to read the last piece of it
    ask(named, "More")
    assert [asks_for_title(body) for body in sent] == [False, True, False]
    assert named.locator(".conversation-link").all_text_contents() == ["Hello"]


def test_titles_can_be_switched_off(named: Any, sent: list[dict[str, Any]]) -> None:
    named.keyboard.press("Control+,")
    named.get_by_role("tab", name="All chats").click()
    named.get_by_label("Conversations are named by the model").uncheck()
    named.keyboard.press("Escape")
    ask(named, "Something with a title")
    ask(named, "More")
    assert [asks_for_title(body) for body in sent] == [False, False]


def test_a_title_gives_way_to_the_next_message(named: Any, sent: list[dict[str, Any]]) -> None:
    held: list[Any] = []

    def hold(route: Any) -> None:
        if asks_for_title(route.request.post_data_json) and not held:
            held.append(route)  # it is never answered
        else:
            route.continue_()

    named.route(CHAT, hold)
    with named.expect_request(lambda request: "chat" in request.url and asks_for_title(request.post_data_json)):
        ask(named, "Something with a title")
    with named.expect_event("requestfailed"):
        say(named, "More")
    named.get_by_role("link", name="A good name", exact=True).wait_for()  # it is asked for again in the next pause
    assert [asks_for_title(body) for body in sent] == [False, True, False, True]


def test_the_users_name_stays(named: Any) -> None:
    held: list[Any] = []
    named.route(
        CHAT, lambda route: held.append(route) if asks_for_title(route.request.post_data_json) else route.continue_()
    )
    with named.expect_request(lambda request: "chat" in request.url and asks_for_title(request.post_data_json)):
        ask(named, "Something with a title")
    act(named, "Something with a title", "Rename")
    named.get_by_role("textbox", name="Rename").fill("Mine")
    named.keyboard.press("Enter")
    with named.expect_response(CHAT):
        held[0].continue_()
    named.wait_for_timeout(300)
    assert named.locator(".conversation-link").all_text_contents() == ["Mine"]


def listed(page: Any) -> list[tuple[str, list[str]]]:
    """The headings of the list, each with what is under it."""
    return [
        (
            section.locator("h2").inner_text().replace("\n", " "),
            section.locator("li .conversation-link").all_inner_texts(),
        )
        for section in page.locator(".conversations section").all()
    ]


def make_folder(page: Any, name: str) -> None:
    """By the button beside New chat."""
    button(page, "New folder").click()
    page.get_by_label("Name of the folder").fill(name)
    page.keyboard.press("Enter")
    page.locator(".folder", has_text=name).wait_for()


def few(page: Any, path: Path, *titles: str) -> None:
    """Imports conversations with these titles."""
    made = [conversation(title, 2, 1_700_000_000_000 - at) for at, title in enumerate(titles)]
    import_file(page, archive(path / "few.json", made))


def test_pins_and_folders(chat: Any, tmp_path: Path) -> None:
    few(chat, tmp_path, "One", "Two", "Three")
    act(chat, "Three", "Pin")
    assert listed(chat) == [("Pinned", ["Three"]), ("Earlier", ["One", "Two"])]
    act(chat, "One", "Move to folder")
    chat.get_by_role("textbox", name="New folder").fill("Work")
    button(chat, "Create").click()
    make_folder(chat, "Art")
    after = [("Pinned", ["Three"]), ("Art 0", []), ("Work 1", ["One"]), ("Earlier", ["Two"])]
    assert listed(chat) == after
    chat.reload()
    chat.get_by_role("link", name="One").wait_for()
    assert listed(chat) == after
    act(chat, "One", "Move to folder")
    button(chat, "Art").click()
    act(chat, "Three", "Unpin")
    chat.get_by_role("button", name="Art").first.click()  # folds it
    act(chat, "Work", "Rename")
    chat.get_by_role("textbox", name="Rename").fill("Play")
    chat.keyboard.press("Enter")
    assert listed(chat) == [("Art 1", []), ("Play 0", []), ("Earlier", ["Two", "Three"])]
    act(chat, "Art", "Delete")
    button(chat, "Delete").click()
    assert listed(chat) == [("Play 0", []), ("Earlier", ["One", "Two", "Three"])]


def test_a_conversation_is_dragged_into_a_folder_and_out(chat: Any, tmp_path: Path) -> None:
    few(chat, tmp_path, "One", "Two")
    make_folder(chat, "Work")
    chat.get_by_role("link", name="Two").drag_to(chat.locator(".folder-name"))
    assert listed(chat) == [("Work 1", ["Two"]), ("Earlier", ["One"])]
    chat.get_by_role("link", name="Two").drag_to(chat.get_by_role("link", name="One"))
    assert listed(chat) == [("Work 0", []), ("Earlier", ["One", "Two"])]


def test_the_menu_by_keyboard(chat: Any, tmp_path: Path) -> None:
    few(chat, tmp_path, "One")
    # The dialog of the import gives the focus back as it closes, which may come after this.
    chat.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    chat.get_by_role("link", name="One").focus()
    chat.keyboard.press("Tab")
    chat.keyboard.press("Enter")
    chat.locator("[role=menuitem]:focus").wait_for()
    assert chat.locator(":focus").inner_text() == "Pin"
    chat.keyboard.press("End")
    chat.keyboard.press("ArrowDown")
    chat.keyboard.press("ArrowDown")
    assert chat.locator(":focus").inner_text() == "Rename"
    chat.keyboard.press("Escape")
    assert chat.locator(":focus").get_attribute("aria-label") == "Actions for One"
    assert not chat.get_by_role("menu").is_visible()
    chat.keyboard.press("Enter")
    chat.locator("#search").click()
    assert not chat.get_by_role("menu").is_visible()


def test_pins_and_folders_come_back_from_a_file(site: Site, open_page: Callable[..., Any], tmp_path: Path) -> None:
    first, second = open_page(site.url), open_page(site.url)
    few(first, tmp_path, "One", "Two")
    make_folder(first, "Work")
    make_folder(first, "Empty")
    act(first, "One", "Move to folder")
    button(first, "Work").click()
    act(first, "Two", "Pin")
    first.keyboard.press("Control+,")
    first.get_by_role("tab", name="Data").click()
    with first.expect_download() as download:
        button(first, "Export all (2)").click()
    download.value.save_as(tmp_path / "all.json")
    make_folder(second, "Work")  # a folder of that name is the same one
    import_file(second, tmp_path / "all.json")
    assert listed(second) == [("Pinned", ["Two"]), ("Work 1", ["One"])]
    act(second, "One", "Move to folder")
    button(second, "No folder").click()
    act(second, "Two", "Unpin")
    import_file(second, tmp_path / "all.json")
    assert listed(second) == [("Work 0", []), ("Earlier", ["One", "Two"])]


OLD = """async ([conversation, messages]) => {
  const database = await new Promise((resolve) => {
    const opening = indexedDB.open("candle-vllm", 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("conversations", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    opening.onsuccess = () => resolve(opening.result);
  });
  const work = database.transaction(["conversations", "messages"], "readwrite");
  work.objectStore("conversations").put(conversation);
  for (const message of messages) work.objectStore("messages").put(message);
  await new Promise((resolve) => (work.oncomplete = resolve));
  database.close();
}"""


def test_a_database_of_version_1_is_kept(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url + "icon.svg")
    chat_id = "c" * 32
    made = json.loads(
        json.dumps(conversation("Old", 2)).replace('"m0"', f'"{"0" * 32}"').replace('"m1"', f'"{"1" * 32}"')
    )
    old = {**made["conversation"], "id": chat_id, "renamed": True, "model": None}
    page.evaluate(OLD, [old, [{**message, "conversation": chat_id} for message in made["messages"]]])
    page.goto(site.url)
    page.get_by_role("link", name="Old").click()
    said(page, "Answer 1")
    make_folder(page, "Work")
    act(page, "Old", "Move to folder")
    button(page, "Work").click()
    page.reload()
    page.get_by_role("link", name="Old").wait_for()
    assert listed(page) == [("Work 1", ["Old"])]
    said(page, "Answer 1")
    assert page.evaluate("indexedDB.databases().then((all) => all[0].version)") == 3


def test_a_menu_stays_while_an_answer_is_written(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "slowly")
    page.locator(".conversation").hover()
    button(page, "Actions for slowly").click()
    before = page.locator(".answer .step").inner_text()
    longer = "(before) => document.querySelector('.answer .step').innerText.length > before + 200"
    page.wait_for_function(longer, arg=len(before))  # the messages scroll
    assert page.get_by_role("menuitem", name="Pin").is_visible()


def test_a_page_whose_database_is_taken_over_says_so(chat: Any) -> None:
    chat.get_by_text("What can I help with?").wait_for()
    chat.evaluate("""() => new Promise((resolve) => {
        const opening = indexedDB.open("candle-vllm", 99);
        opening.onsuccess = () => resolve(opening.result.close());
    })""")
    chat.get_by_text("Another tab has a newer version of this page.").wait_for()
