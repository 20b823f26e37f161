"""The list of conversations: names by the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from actions import ask, button, say
from ui_server import Site

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
    assert "tools" not in title
    ask(named, "And more of the title")
    named.reload()
    named.get_by_role("link", name="A good name", exact=True).wait_for()
    assert [asks_for_title(body) for body in sent] == [False, True, False]


def test_what_is_no_title_leaves_the_first_line(named: Any, sent: list[dict[str, Any]]) -> None:
    with named.expect_response(lambda one: "chat" in one.url and asks_for_title(one.request.post_data_json)):
        ask(named, "Hello")
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
    named.locator(".conversation").hover()
    button(named, "Rename Something with a title").click()
    named.get_by_role("textbox", name="Rename").fill("Mine")
    named.keyboard.press("Enter")
    with named.expect_response(CHAT):
        held[0].continue_()
    named.wait_for_timeout(300)
    assert named.locator(".conversation-link").all_text_contents() == ["Mine"]
