# SPDX-License-Identifier: MIT
"""`/v1/conversations` with the official client: made, changed, filled, read in pages, deleted, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine

KEYS = ("first-key", "second-key")
USER: dict[str, Any] = {"role": "user", "content": "Hello!"}


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    return start(PacedEngine("Hi!"), api_key=KEYS)


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return running.openai(KEYS[0])


def refusal(failure: Any) -> tuple[int, Any, Any]:
    return failure.status_code, failure.param, failure.code


def texts(client: openai.OpenAI, name: str) -> list[str]:
    items: Any = client.conversations.items.list(name, order="asc", limit=100)
    return [item.content[0].text for item in items]


def test_a_life(client: openai.OpenAI) -> None:
    items: Any = [USER]
    made = client.conversations.create(metadata={"topic": "x"}, items=items)
    assert (made.object, made.metadata) == ("conversation", {"topic": "x"})
    assert made.id.startswith("conv_")
    assert client.conversations.retrieve(made.id) == made
    changed = client.conversations.update(made.id, metadata={"topic": "y"})
    assert (changed.metadata, changed.created_at) == ({"topic": "y"}, made.created_at)
    assert client.conversations.update(made.id, metadata=None).metadata == {}
    assert texts(client, made.id) == ["Hello!"]
    gone = client.conversations.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "conversation.deleted", True)
    for work in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError) as failure:
            work(made.id)
        assert refusal(failure.value) == (404, "conversation_id", "not_found")


def test_an_empty_one(client: openai.OpenAI) -> None:
    made = client.conversations.create()
    page = client.conversations.items.list(made.id)
    assert (page.data, page.has_more, page.last_id, made.metadata) == ([], False, None, {})


def test_every_kind_of_item_comes_back(client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "a"},
        {"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "t", "input_schema": {}}]},
        {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "s", "name": "t", "arguments": "{}"},
        {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True},
        {"type": "mcp_call", "id": "mcp_1", "server_label": "s", "name": "t", "arguments": "{}", "output": "o"},
        {"role": "assistant", "content": "Sunny."},
    ]
    name = client.conversations.create(items=items).id
    found: Any = list(client.conversations.items.list(name, order="asc"))
    assert [item.type for item in found] == [item.get("type", "message") for item in items]
    assert all(item.id for item in found)
    assert len({item.id for item in found}) == len(items)
    for given, item in zip(items, found, strict=True):
        kept = item.to_dict()
        for field in set(given) - {"content"}:
            assert kept[field] == given[field], field
    assert found[0].content[0].to_dict() == {"type": "input_text", "text": "Be brief."}
    assert found[-1].content[0].type == "output_text"
    for item in found:
        assert client.conversations.items.retrieve(item.id, conversation_id=name) == item


def test_items_are_added_read_in_pages_and_deleted(client: openai.OpenAI) -> None:
    name = client.conversations.create().id
    for start in (0, 20):
        added = client.conversations.items.create(
            name, items=[{"role": "user", "content": f"text {start + number}"} for number in range(20)]
        )
        assert len(added.data) == 20
        assert (added.first_id, added.last_id) == (added.data[0].id, added.data[-1].id)
    expected = [f"text {number}" for number in range(40)]
    assert texts(client, name) == expected
    newest: Any = list(client.conversations.items.list(name, limit=7))
    assert [item.content[0].text for item in newest] == expected[::-1]
    left = client.conversations.items.delete(newest[0].id, conversation_id=name)
    assert left.id == name
    assert texts(client, name) == expected[:-1]
    for work in (client.conversations.items.delete, client.conversations.items.retrieve):
        with pytest.raises(openai.NotFoundError) as failure:
            work(newest[0].id, conversation_id=name)
        assert refusal(failure.value) == (404, "item_id", "not_found")


def test_responses_are_added_to_theirs(client: openai.OpenAI) -> None:
    items: Any = [USER]
    name = client.conversations.create(items=items).id
    made = client.responses.create(model="scripted", input="And?", conversation=name)
    assert made.conversation is not None
    assert made.conversation.id == name
    assert texts(client, name) == ["Hello!", "And?", "Hi!"]
    found: Any = list(client.conversations.items.list(name))
    assert found[0].id == made.output[0].id
    with client.responses.stream(model="scripted", input="So?", conversation={"id": name}) as stream:
        final: Any = stream.get_final_response()
    first: Any = made
    assert final.usage.input_tokens > first.usage.input_tokens
    assert texts(client, name) == ["Hello!", "And?", "Hi!", "So?", "Hi!"]
    client.responses.delete(made.id)
    assert len(texts(client, name)) == 5
    client.conversations.delete(name)
    with pytest.raises(openai.NotFoundError) as failure:
        client.responses.create(model="scripted", input="So?", conversation=name)
    assert refusal(failure.value) == (404, "conversation", "not_found")


def test_a_conversation_that_is_deleted_in_mid_run_costs_no_answer(start: Callable[..., Running]) -> None:
    client = start(PacedEngine("one two three", pause=0.05)).openai()
    name = client.conversations.create().id
    with client.responses.create(model="scripted", input="Hi", conversation=name, stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                client.conversations.delete(name)
                break
        events: Any = list(stream)
    assert events[-1].type == "response.completed"
    assert client.responses.retrieve(events[-1].response.id).status == "completed"


def test_another_key_has_nothing(running: Running, client: openai.OpenAI) -> None:
    items: Any = [USER]
    made = client.conversations.create(items=items)
    item: Any = client.conversations.items.list(made.id).data[0]
    other = running.openai(KEYS[1])
    works: list[Callable[[str], Any]] = [
        other.conversations.retrieve,
        other.conversations.delete,
        other.conversations.items.list,
        lambda name: other.conversations.update(name, metadata={}),
        lambda name: other.conversations.items.create(name, items=items),
        lambda name: other.conversations.items.retrieve(item.id, conversation_id=name),
        lambda name: other.conversations.items.delete(item.id, conversation_id=name),
        lambda name: other.responses.create(model="scripted", input="x", conversation=name),
    ]
    for work in works:
        said = []
        for name in (made.id, "conv_" + "0" * (len(made.id) - 5)):
            with pytest.raises(openai.NotFoundError) as failure:
                work(name)
            said.append((*refusal(failure.value), failure.value.message.replace(name, "")))
        assert said[0] == said[1]
    assert texts(client, made.id) == ["Hello!"]


def test_without_a_key_nothing_is_reached(running: Running) -> None:
    with running.http() as http:
        for method, path in (
            ("POST", ""), ("GET", "/c"), ("POST", "/c"), ("DELETE", "/c"), ("GET", "/c/items"), ("POST", "/c/items"),
            ("GET", "/c/items/i"), ("DELETE", "/c/items/i"),
        ):  # fmt: skip
            assert http.request(method, f"/v1/conversations{path}", json={}).status_code == 401


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": ""}]}
WRONG: list[tuple[str, Any, str | None]] = [
    ("", [], None),
    ("", {"metadata": []}, "metadata"),
    ("", {"metadata": {"k": 1}}, "metadata.k"),
    ("", {"metadata": {"k" * 65: "v"}}, "metadata"),
    ("", {"metadata": {"k": "v" * 513}}, "metadata.k"),
    ("", {"metadata": {str(number): "v" for number in range(17)}}, "metadata"),
    ("", {"topic": "x"}, "topic"),
    ("", {"items": "x"}, "items"),
    ("", {"items": [USER] * 21}, "items"),
    ("", {"items": ["x"]}, "items.0"),
    ("", {"items": [USER, {"role": "user"}]}, "items.1.content"),
    ("", {"items": [{"role": "critic", "content": "x"}]}, "items.0.role"),
    ("", {"items": [{"type": "nothing"}]}, "items.0.type"),
    ("", {"items": [{"type": "compaction_trigger", "id": "ct_1"}]}, "items.0.type"),
    ("", {"items": [{"type": "item_reference", "id": "msg_1"}]}, "items.0"),
    ("", {"items": [{**USER, "id": "msg_1"}, {**USER, "id": "msg_1"}]}, "items.1.id"),
    ("", {"items": [{**USER, "id": "x\0"}]}, "items.0.id"),
    ("", {"items": [IMAGE]}, "items.0.content.0.image_url"),
    ("", {"items": [{"role": "user", "content": "x" * (5 << 20)}]}, "items.0"),
    ("/CONV", {}, "metadata"),
    ("/CONV", {"metadata": "x"}, "metadata"),
    ("/CONV", {"metadata": {}, "items": []}, "items"),
    ("/CONV/items", {}, "items"),
    ("/CONV/items", {"items": []}, "items"),
    ("/CONV/items", {"items": None}, "items"),
    ("/CONV/items", {"items": [USER] * 21}, "items"),
    ("/CONV/items", {"items": [{**USER, "id": "msg_there"}]}, "items.0.id"),
    ("/CONV/items", {"items": [USER], "metadata": {}}, "metadata"),
    ("/CONV/items?include=x", {"items": [USER]}, "include"),
    ("/CONV/items?limit=1", {"items": [USER]}, "limit"),
    ("?x=1", {}, "x"),
]


@pytest.mark.one_of_each(18)
@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=range(len(WRONG)))
def test_wrong_bodies(client: openai.OpenAI, running: Running, path: str, body: Any, param: str | None) -> None:
    items: Any = [{**USER, "id": "msg_there"}]
    name = client.conversations.create(items=items).id
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        answer = http.post("/v1/conversations" + path.replace("CONV", name), json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert len(answer.text) < 2000
    assert texts(client, name) == ["Hello!"]


@pytest.mark.parametrize(
    ("query", "param"), [("limit=101", "limit"), ("order=x", "order"), ("after=x", "after"), ("before=x", "before")]
)
def test_wrong_queries(client: openai.OpenAI, running: Running, query: str, param: str) -> None:
    name = client.conversations.create().id
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        answer = http.get(f"/v1/conversations/{name}/items?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_ten_megabytes_are_too_large(client: openai.OpenAI, start: Callable[..., Running]) -> None:
    large: Any = [{"role": "user", "content": "x" * (10 << 20)}]
    with pytest.raises(openai.APIStatusError) as failure:
        client.conversations.create(items=large)
    assert failure.value.status_code == 413
    roomy = start(PacedEngine("Hi!"), max_body_mb=64).openai()
    name = roomy.conversations.create().id
    with pytest.raises(openai.BadRequestError) as refused:
        roomy.conversations.items.create(name, items=large)
    assert refusal(refused.value) == (400, "items.0", "store_limit")
    assert texts(roomy, name) == []


@pytest.mark.parametrize("background", [False, True])
def test_an_item_that_its_conversation_cannot_hold_is_refused_before_the_answer(
    background: bool, start: Callable[..., Running]
) -> None:
    running = start(PacedEngine("Hi!", max_model_len=1 << 24), max_body_mb=64)
    client = running.openai()
    name = client.conversations.create().id
    items: Any = [USER, {"role": "user", "content": "x" * (5 << 20)}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="scripted", input=items, conversation=name, background=background)
    assert refusal(refused.value) == (400, "input.1", "store_limit")
    assert (texts(client, name), running.engine.requests) == ([], [])


def test_a_full_store_says_so(start: Callable[..., Running]) -> None:
    client = start(PacedEngine("Hi!"), responses_max_mb=1).openai()
    name = client.conversations.create().id
    with pytest.raises(openai.BadRequestError) as refused:
        client.conversations.items.create(name, items=[{"role": "user", "content": "x" * (2 << 20)}])
    assert refusal(refused.value) == (400, None, "store_limit")
    assert "--responses-max-mb" in refused.value.message
    assert texts(client, name) == []
