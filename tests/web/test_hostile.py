# SPDX-License-Identifier: MIT
"""The page against servers that answer rubbish, storage that is blocked or full, other tabs, and huge input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.common_run import few
from tests.web.actions import act, archive, ask, button, conversation, import_file, said, say, wait_idle
from tests.web.ui_server import Site

ROUTES = ("v1/models", "v1/mcp/servers", "v1/mcp/tools", "metrics", "version")
RUBBISH = (
    "", "null", "[]", "{}", "<html>", '{"data": null}', '{"data": {"length": 5}}',
    '{"data": [null, 1, {"id": 1}, {"id": "__proto__", "status": "constructor"}, {"name": "a", "state": "toString"}]}',
    '{"data": [{"function": {"name": "__proto__", "parameters": null}}]}', '{"error": {"message": {}, "param": [1]}}',
)  # fmt: skip
BROKEN = {
    "no database": "Object.defineProperty(window, 'indexedDB', { value: undefined })",
    "unreadable": "IDBObjectStore.prototype.getAll = () => { throw new DOMException('x', 'UnknownError'); }",
    "full": "IDBObjectStore.prototype.put = () => { throw new DOMException('x', 'QuotaExceededError'); }",
    "all blocked": """for (const name of ["localStorage", "sessionStorage", "indexedDB"])
        Object.defineProperty(window, name, { get() { throw new DOMException("x", "SecurityError"); } });""",
}


@pytest.mark.parametrize("body", few(RUBBISH, "", *RUBBISH[-3:]))
def test_rubbish_at_every_route(site: Site, open_page: Callable[..., Any], body: str) -> None:
    page = open_page(site.url)
    for route in ROUTES:
        page.route(f"**/{route}", lambda asked: asked.fulfill(body=body, content_type="application/json"))
    page.reload()
    for address in ("#/server", "#/tools", "#/"):
        page.goto(site.url + address)
        page.locator(".page-head").wait_for()
    if not body.startswith('{"data": ['):
        page.get_by_text("The server's answer could not be understood").wait_for()
    page.unroute_all()
    if body:
        page.reload()
    page.get_by_text("could not be understood").wait_for(state="detached", timeout=12_000)  # it asks again by itself
    assert ask(page, "Hello") == "You said: Hello"


@pytest.mark.parametrize("delta", ["null", '{"content": {"a": 1}}', '{"tool_calls": [{"index": 4294967294}]}'])
def test_a_stream_of_rubbish_says_nothing(chat: Any, delta: str) -> None:
    body = f'data: {{"choices": [{{"index": 0, "delta": {delta}}}]}}\n\ndata: [DONE]\n\n'
    chat.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    say(chat, "Hello")
    chat.get_by_text("The model returned an empty answer.").wait_for()


@pytest.mark.parametrize("name", BROKEN)
def test_storage_that_is_blocked_or_full(site: Site, open_page: Callable[..., Any], name: str) -> None:
    page = open_page(site.url)
    page.add_init_script(BROKEN[name])
    page.reload()
    assert ask(page, "Hello") == "You said: Hello"
    if name == "full":
        page.get_by_text("could not save this").wait_for()
    else:
        page.get_by_text("keeps nothing for this page").wait_for()
        page.get_by_role("link", name="New chat").click()
        page.get_by_text("What can I help with?").wait_for()
        assert page.get_by_text("Conversations are kept in this browser").count() == 0
    act(page, "Hello", "Delete")
    button(page, "Delete").click()
    page.locator(".conversation").wait_for(state="detached")


def test_another_tab_goes_on_and_deletes(chat: Any) -> None:
    ask(chat, "first")
    other = chat.context.new_page()
    other.goto(chat.url)
    said(other, "You said: first")
    ask(other, "second")
    chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    said(chat, "You said: second")
    assert ask(chat, "third") == "You said: third"
    assert chat.locator(".bubble").all_inner_texts() == ["first", "second", "third"]
    act(other, "first", "Delete")
    button(other, "Delete").click()
    other.locator(".conversation").wait_for(state="detached")
    chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    chat.get_by_text("What can I help with?").wait_for()


def test_what_is_sent_while_another_tab_s_answer_is_read_stays(chat: Any) -> None:
    ask(chat, "first")
    other = chat.context.new_page()
    other.goto(chat.url)
    said(other, "You said: first")
    chat.locator("#composer").fill("third")
    chat.evaluate("""() => {
      const read = IDBIndex.prototype.getAll;
      IDBIndex.prototype.getAll = function (...wanted) {
        const answer = read.apply(this, wanted);
        const field = document.querySelector("#composer");
        if (field.value) field.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
        return answer;
      };
    }""")
    ask(other, "second")
    said(chat, "You said: third")
    said(other, "You said: third")
    said(chat, "You said: first")


# A tab that is shown looks after the others, whenever the browser says so.
_ALONE = """
delete window.BroadcastChannel;
document.addEventListener("visibilitychange", (event) => event.stopImmediatePropagation());
"""


def test_a_tab_writes_what_it_changed(chat: Any) -> None:
    chat.add_init_script(_ALONE)  # neither tab hears of the other
    chat.reload()
    ask(chat, "first")
    other = chat.context.new_page()
    other.add_init_script(_ALONE)
    other.goto(chat.url)
    said(other, "You said: first")
    act(chat, "first", "Rename")
    chat.get_by_role("textbox", name="Rename").fill("Renamed")
    chat.keyboard.press("Enter")
    act(chat, "Renamed", "Pin")
    ask(other, "second")
    chat.reload()
    chat.get_by_role("heading", name="Pinned").wait_for()
    assert chat.locator(".conversation-link").all_text_contents() == ["Renamed"]
    said(chat, "You said: second")
    act(chat, "Renamed", "Delete")
    button(chat, "Delete").click()
    chat.locator(".conversation").wait_for(state="detached")
    say(other, "third")
    other.get_by_text("This conversation was deleted in another tab.").wait_for()
    other.locator(".conversation").wait_for(state="detached")
    chat.reload()
    chat.get_by_text("Your conversations will appear here.").wait_for()
    assert chat.evaluate(STORED) == 0


def test_an_answer_is_not_written_again_after_its_end(chat: Any) -> None:
    """Another tab may have removed it meanwhile."""
    chat.evaluate("""() => {
      const put = IDBObjectStore.prototype.put;
      window.ends = 0;
      IDBObjectStore.prototype.put = function (record, ...rest) {
        if (record.state === "done") window.ends++;
        return put.call(this, record, ...rest);
      };
    }""")
    ask(chat, "first")
    chat.wait_for_timeout(1500)
    assert chat.evaluate("window.ends") == 1


STORED = """
() => new Promise((resolve) => {
  indexedDB.open("candle-vllm").onsuccess = ({ target }) => {
    const database = target.result;
    database.transaction("messages").objectStore("messages").count().onsuccess = (event) => {
      database.close();
      resolve(event.target.result);
    };
  };
})
"""


def test_tabs_tell_each_other(chat: Any) -> None:
    ask(chat, "first")
    other = chat.context.new_page()
    other.goto(chat.url)
    said(other, "You said: first")
    ask(other, "second")
    said(chat, "You said: second")
    act(other, "first", "Rename")
    other.get_by_role("textbox", name="Rename").fill("Renamed")
    other.keyboard.press("Enter")
    chat.get_by_role("link", name="Renamed").wait_for()
    act(other, "Renamed", "Delete")
    button(other, "Delete").click()
    chat.get_by_text("This conversation was deleted in another tab.").wait_for()
    chat.get_by_text("What can I help with?").wait_for()


@pytest.mark.parametrize("name", ["unknown", "0" * 32])
def test_a_conversation_that_is_not_here(site: Site, open_page: Callable[..., Any], name: str) -> None:
    page = open_page(f"{site.url}#/chat/{name}")
    page.get_by_text("This conversation is not in this browser.").wait_for()
    page.get_by_text("What can I help with?").wait_for()
    assert page.url == f"{site.url}#/"


def test_a_clock_that_goes_back_keeps_the_order(chat: Any) -> None:
    ask(chat, "one")
    chat.evaluate("Date.now = () => 1000")
    ask(chat, "two")
    chat.reload()
    said(chat, "You said: two")
    assert chat.locator(".bubble").all_inner_texts() == ["one", "two"]


@pytest.mark.every_case
def test_a_message_of_ten_megabytes(chat: Any) -> None:
    refusal = {"error": {"message": "The body is too large."}}
    chat.route("**/v1/chat/completions", lambda route: route.fulfill(status=413, json=refusal))
    chat.locator("#composer").evaluate(
        "(field) => { field.value = 'word '.repeat(2e6); field.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    chat.set_default_timeout(30_000)
    button(chat, "Send").click()
    chat.get_by_text("The body is too large.").wait_for()
    assert len(chat.locator(".bubble").inner_text()) < 11_000
    button(chat, "Show more").click()
    assert len(chat.locator(".bubble").inner_text()) > 90_000


@pytest.mark.every_case
def test_a_list_of_a_thousand_conversations(chat: Any, tmp_path: Path) -> None:
    many = [conversation(f"Chat {number}", 2, 1_700_000_000_000 + number) for number in range(1000)]
    chat.set_default_timeout(30_000)
    import_file(chat, archive(tmp_path / "many.json", many))
    assert chat.locator(".conversation").count() <= 200
    chat.locator("#search").fill("Question 0 of Chat 321")
    chat.locator(".conversation").nth(1).wait_for(state="detached")
    assert chat.locator(".conversation-link").inner_text() == "Chat 321"


def test_stop_and_answer_again_pressed_quickly(slow_site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(slow_site.url)
    say(page, "slowly")
    page.locator(".answer").wait_for()
    for count in range(1, 5):
        page.evaluate("document.querySelector('button[aria-label=Stop]')?.click()")
        page.locator(".ending").wait_for()
        page.evaluate("""() => {
            const again = document.querySelector("button[aria-label='Answer again']");
            for (let time = 0; time < 3; time++) again.click();
        }""")
        page.get_by_text(f"{count + 1}/{count + 1}").wait_for()
    page.reload()
    page.get_by_text("5/5").wait_for()
    said(page, "Stopped.")
    wait_idle(page)


def test_what_is_done_right_before_a_reload_is_kept(chat: Any) -> None:
    ask(chat, "Hello")
    button(chat, "Answer again").click()
    wait_idle(chat)
    for time in range(10):
        name, shown = (("Previous version", "1/2"), ("Next version", "2/2"))[time % 2]
        chat.locator(".siblings").wait_for()
        with chat.expect_navigation():
            chat.evaluate(
                "(name) => { document.querySelector(`[aria-label='${name}']`).click(); location.reload(); }", name
            )
        said(chat, shown)
