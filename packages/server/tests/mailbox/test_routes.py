# SPDX-License-Identifier: MIT
"""`/v1/mailbox` over HTTP: what each caller sees, fetches, deletes and pushes, and which values are refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from candle_vllm.server import Settings, create_app
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode
from packages.server.tests.server_fakes import PacedEngine

KEYS = ("first-key", "second-key")
ALWAYS = DeliveryPolicy(Mode.ALWAYS, Mode.NEVER)


class Running:
    def __init__(self, mailbox: Any, keys: tuple[str, ...]) -> None:
        app = create_app(PacedEngine(), Settings(api_key=keys), mailbox=mailbox)
        self.mailbox = mailbox
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")

    async def ask(self, method: str, path: str, key: str = KEYS[0], **options: Any) -> httpx.Response:
        return await self.client.request(method, path, headers={"authorization": f"Bearer {key}"}, **options)

    async def keep(self, number: int, key: str = KEYS[0], answer: Any = None) -> None:
        body = json.dumps({"id": f"chatcmpl-{number}"}).encode()
        owner = self.mailbox.owner(key)
        await self.mailbox.keep(ALWAYS, owner, f"chatcmpl-{number}", "m", answer or body, disconnected=True)


@pytest_asyncio.fixture
async def running(open_mailbox) -> AsyncIterator[Any]:
    made: list[Running] = []

    async def running(keys: tuple[str, ...] = KEYS, on: bool = True, **options: Any) -> Running:
        made.append(Running(await open_mailbox(**options) if on else None, keys))
        return made[-1]

    yield running
    for each in made:
        await each.client.aclose()


def _refusal(response: httpx.Response) -> tuple[int, str | None, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]


async def test_a_record_is_fetched_by_its_owner_alone(running) -> None:
    server = await running()
    await server.keep(1)
    record = (await server.ask("GET", "/v1/mailbox/chatcmpl-1")).json()
    created = record.pop("created")
    assert isinstance(created, int)
    assert record == {
        "request_id": "chatcmpl-1", "model": "m", "status": "completed", "response": {"id": "chatcmpl-1"},
    }  # fmt: skip
    for method, path, body in [
        ("GET", "", None), ("GET", "?auto_delete=true", None), ("DELETE", "", None), ("POST", "/webhook", {}),
    ]:  # fmt: skip
        response = await server.ask(method, f"/v1/mailbox/chatcmpl-1{path}", KEYS[1], json=body)
        missing = await server.ask(method, f"/v1/mailbox/chatcmpl-2{path}", KEYS[1], json=body)
        assert response.status_code == missing.status_code
        assert response.text.replace("chatcmpl-1", "") == missing.text.replace("chatcmpl-2", "")
    assert (await server.ask("GET", "/v1/mailbox", KEYS[1])).json() == {"object": "list", "data": [], "has_more": False}
    assert (await server.ask("GET", "/v1/mailbox/chatcmpl-1")).status_code == 200


async def test_without_a_key_nothing_is_reached(running) -> None:
    server = await running()
    for method, path in [("GET", ""), ("GET", "/x"), ("DELETE", "/x"), ("POST", "/x/webhook")]:
        assert (await server.client.request(method, f"/v1/mailbox{path}")).status_code == 401


async def test_pages(running) -> None:
    server = await running()
    for number in range(5):
        await server.keep(number)
    seen, after = [], ""
    for more in (True, True, False):
        page = (await server.ask("GET", f"/v1/mailbox?limit=2{after}")).json()
        assert page["has_more"] is more
        assert all(set(each) == {"request_id", "model", "created", "status"} for each in page["data"])
        seen += [each["request_id"] for each in page["data"]]
        after = f"&after={seen[-1]}"
    assert seen == [f"chatcmpl-{number}" for number in reversed(range(5))]


async def test_auto_delete_and_delete(running) -> None:
    server = await running()
    for number in range(3):
        await server.keep(number)
    assert (await server.ask("GET", "/v1/mailbox/chatcmpl-0?auto_delete=false")).status_code == 200
    assert (await server.ask("HEAD", "/v1/mailbox/chatcmpl-0?auto_delete=true")).status_code == 200  # deletes nothing
    assert (await server.ask("GET", "/v1/mailbox/chatcmpl-0?auto_delete=true")).status_code == 200
    assert _refusal(await server.ask("GET", "/v1/mailbox/chatcmpl-0")) == (404, "request_id", "not_found")
    response = await server.ask("DELETE", "/v1/mailbox/chatcmpl-1")
    assert (response.status_code, response.content) == (204, b"")
    assert (await server.ask("DELETE", "/v1/mailbox/chatcmpl-1")).status_code == 404
    assert len((await server.ask("GET", "/v1/mailbox")).json()["data"]) == 1


async def test_an_answer_on_its_way_is_neither_deleted_nor_pushed(running, receiver) -> None:
    server = await running()
    await server.mailbox.begin(ALWAYS, server.mailbox.owner(KEYS[0]), "chatcmpl-1", "m", 60)
    for _ in range(2):
        record = (await server.ask("GET", "/v1/mailbox/chatcmpl-1?auto_delete=true")).json()
        assert record["status"] == "streaming"
        assert "response" not in record
    pushed = await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json={"url": receiver.url})
    assert _refusal(pushed) == (400, "request_id", "invalid_value")


async def test_a_large_request_for_a_push_learns_its_limit(running) -> None:
    server = await running()
    answer = await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json={"url": "x" * (64 << 10)})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "The body is larger than 64 KB. Send less."


WRONG_QUERIES = [
    ("?limit=0", "limit"), ("?limit=1001", "limit"), ("?limit=-1", "limit"), ("?limit=x", "limit"),
    ("?limit=", "limit"), ("?limit=%C2%B2", "limit"), ("?limit=1e2", "limit"), ("?after=nothing", "after"),
    ("?after=", "after"),
    ("?after=%00", "after"), ("?after=" + "x" * 300, "after"), ("?ordr=asc", "ordr"), ("?limit=1&limit=2", "limit"),
    ("/x?auto_delete=yes", "auto_delete"), ("/x?auto_delete=", "auto_delete"), ("/x?autodelete=true", "autodelete"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "param"), WRONG_QUERIES)
async def test_wrong_queries_are_named(running, path: str, param: str) -> None:
    server = await running()
    assert _refusal(await server.ask("GET", f"/v1/mailbox{path}")) == (400, param, "invalid_value")


@pytest.mark.parametrize("request_id", ["x%00y", "x" * 300, "%C3%A9", "' OR 1=1 --", "..", "%2e%2e"])
async def test_strange_ids_are_not_found(running, request_id: str) -> None:
    server = await running()
    assert (await server.ask("GET", f"/v1/mailbox/{request_id}")).status_code in (404, 405)
    assert (await server.ask("DELETE", f"/v1/mailbox/{request_id}")).status_code in (404, 405)


async def test_a_push_arrives(running, receiver) -> None:
    server = await running()
    await server.keep(1)
    body = {"url": receiver.url, "bearer_token": "tok", "headers": {"X-Request-Id": "r"}}
    response = await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json=body)
    assert (response.status_code, response.json()) == (200, {"request_id": "chatcmpl-1", "delivered": True})
    (received,) = receiver.received
    assert (received.headers["authorization"], received.headers["x-request-id"]) == ("Bearer tok", "r")
    assert received.body == (await server.ask("GET", "/v1/mailbox/chatcmpl-1")).content


async def test_a_push_that_does_not_arrive_is_a_502(running, receiver) -> None:
    server = await running()
    await server.keep(1)
    for status in (500, 404, 302):
        receiver.statuses = [status]
        receiver.answer = b"an inner secret"
        response = await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json={"url": receiver.url})
        assert _refusal(response) == (502, None, "webhook_failed")
        assert "secret" not in response.text


async def test_a_push_to_the_operators_webhook(running, receiver) -> None:
    server = await running(webhook={"url": receiver.url, "signing_secret": "s"}, webhook_allowed_hosts=())
    await server.keep(1)
    assert (await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json={})).status_code == 200
    assert "x-signature-256" in receiver.received[0].headers
    refused = await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json={"url": receiver.url})
    assert _refusal(refused) == (400, "url", "invalid_value")


WRONG_BODIES: list[tuple[Any, str | None]] = [
    ({}, "url"),
    ({"url": 1}, "url"),
    ({"url": ""}, "url"),
    ({"url": "https://evil.example/"}, "url"),
    ({"url": "http://169.254.169.254/latest"}, "url"),
    ({"bearer_token": "t"}, "bearer_token"),
    ({"bearer_token": "a b"}, "bearer_token"),
    ({"headers": {"host": "x"}}, "headers.host"),
    ({"headers": {"authorization": "x"}}, "headers.authorization"),
    ({"headers": {"x-request-id": "a\r\nb: c"}}, "headers.x-request-id"),
    ({"headers": {"x-request-id": ""}}, "headers.x-request-id"),
    ({"headers": {f"x-{number}": "1" for number in range(17)}}, "headers"),
    ({"header": {}}, "header"),
    ([], None),
]


@pytest.mark.parametrize(("body", "param"), WRONG_BODIES)
async def test_wrong_bodies_are_named(running, body: Any, param: str | None) -> None:
    server = await running()
    await server.keep(1)
    status, named, _ = _refusal(await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json=body))
    assert (status, named) == (400, param)


async def test_loopback_needs_the_operators_switch(running, receiver) -> None:
    server = await running(webhook_allow_private=False)
    await server.keep(1)
    response = await server.ask("POST", "/v1/mailbox/chatcmpl-1/webhook", json={"url": receiver.url})
    assert _refusal(response) == (400, "url", "invalid_value")
    assert receiver.received == []


async def test_a_large_body_is_refused(running) -> None:
    server = await running()
    response = await server.ask("POST", "/v1/mailbox/x/webhook", json={"url": "x" * 100_000})
    assert response.status_code == 413


async def test_too_many_pushes_at_a_time_are_a_503(running, receiver) -> None:
    server = await running(max_deliveries=4)
    receiver.pause = 0.5
    for key in KEYS:
        await server.keep(1, key)
    asked = [(key, {"url": receiver.url}) for key in (KEYS[0], KEYS[0], KEYS[0], KEYS[1])]
    path = "/v1/mailbox/chatcmpl-1/webhook"
    responses = await asyncio.gather(*(server.ask("POST", path, key, json=body) for key, body in asked))
    assert sorted(response.status_code for response in responses[:3]) == [200, 200, 503]
    assert responses[3].status_code == 200, "one key has half of the places at most"
    (refused,) = [response for response in responses if response.status_code == 503]
    assert _refusal(refused) == (503, None, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert (await server.ask("POST", path, json=asked[0][1])).status_code == 200


async def test_a_store_that_does_not_answer_is_a_503(running) -> None:
    server = await running()
    await server.mailbox.store.close()
    assert _refusal(await server.ask("GET", "/v1/mailbox")) == (503, None, "mailbox_unavailable")


async def test_without_a_mailbox_the_routes_say_so(running) -> None:
    server = await running(on=False)
    for method, path in [("GET", ""), ("GET", "/x"), ("DELETE", "/x"), ("POST", "/x/webhook")]:
        response = await server.ask(method, f"/v1/mailbox{path}", json={})
        assert _refusal(response) == (404, None, "mailbox_off")


async def test_without_keys_all_share_one_mailbox(running) -> None:
    server = await running(keys=())
    await server.keep(1, key="")
    for key in ("anything", "else"):
        assert (await server.ask("GET", "/v1/mailbox/chatcmpl-1", key)).status_code == 200


def test_a_server_without_a_mailbox_loads_no_database_library() -> None:
    code = "import candle_vllm.server.routes.mailbox, sys; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


async def test_the_other_header_of_a_key_is_the_same_owner(running) -> None:
    each = await running()
    await each.keep(1)
    for headers in ({"x-api-key": KEYS[0]}, {"authorization": f"Bearer {KEYS[0]}"}):
        assert (await each.client.get("/v1/mailbox/chatcmpl-1", headers=headers)).status_code == 200
    assert (await each.client.get("/v1/mailbox/chatcmpl-1", headers={"x-api-key": KEYS[1]})).status_code == 404
