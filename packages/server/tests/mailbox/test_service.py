# SPDX-License-Identifier: MIT
"""The mailbox at work: what is kept and pushed, retries, restarts, fairness and the end."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest

from candle_vllm.core.errors import EngineOverloadedError, InvalidParameterError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, parse_chat_request
from candle_vllm.openai.errors import GenerationFailedError
from candle_vllm.responses.store.entries import Entry, StoreUnavailableError
from candle_vllm.responses.store.sql import SqlBackend
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode, read_policy
from candle_vllm.server.mailbox.store import Status
from candle_vllm.server.mailbox.webhook import wait_ms
from tests.waiting import PATIENCE, until

ALWAYS, GONE, NEVER = Mode.ALWAYS, Mode.ON_DISCONNECT, Mode.NEVER
ANSWER = b'{"id":"chatcmpl-1","object":"chat.completion"}'


async def _no_push_left(mailbox: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while await mailbox.store.next_push(()) is not None:
            await asyncio.sleep(0.005)


async def _keep(mailbox: Any, policy: DeliveryPolicy, number: int = 1, key: str = "key", **more: Any) -> bool:
    options = {"answer": ANSWER, "disconnected": True, **more}
    return await mailbox.keep(policy, mailbox.owner(key), f"chatcmpl-{number}", "m", **options)


async def _get(mailbox: Any, number: int = 1, key: str = "key") -> Any:
    found = await mailbox.store.get(mailbox.owner(key), f"chatcmpl-{number}")
    return None if found is None else found.record


@pytest.mark.parametrize(
    ("mode", "disconnected", "kept"),
    [(ALWAYS, False, True), (ALWAYS, True, True), (GONE, True, True), (GONE, False, False)],
)
async def test_modes_of_the_mailbox(open_mailbox, mode: Mode, disconnected: bool, kept: bool) -> None:
    mailbox = await open_mailbox()
    assert await _keep(mailbox, DeliveryPolicy(mode, NEVER), disconnected=disconnected) is kept
    assert (await _get(mailbox) is not None) is kept


async def test_the_answer_of_an_adapter_is_kept_whole(open_mailbox) -> None:
    mailbox = await open_mailbox()
    request = parse_chat_request({"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]})
    answer = await OpenAIAdapter(ScriptedEngine(["Hel", "lo"])).chat(request)
    assert await _keep(mailbox, DeliveryPolicy(ALWAYS, NEVER), answer=answer)
    kept = json.loads(bytes((await _get(mailbox)).response))
    assert kept["choices"][0]["message"]["content"] == "Hello"
    assert kept["id"] == answer.id


FAILURES = [
    (InvalidParameterError("n is wrong", "n"), Status.VALIDATION_ERROR, "invalid_value"),
    (GenerationFailedError("/secret/path"), Status.MODEL_ERROR, "generation_failed"),
    (EngineOverloadedError("full"), Status.INTERNAL_ERROR, "overloaded"),
    (RuntimeError("/secret/path"), Status.INTERNAL_ERROR, "internal_error"),
]


@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
async def test_failures_are_kept_as_errors(open_mailbox, failure: Exception, status: Status, code: str) -> None:
    mailbox = await open_mailbox()
    await _keep(mailbox, DeliveryPolicy(ALWAYS, NEVER), answer=failure)
    record = await _get(mailbox)
    assert record.status is status
    assert json.loads(bytes(record.response))["error"]["code"] == code
    assert b"secret" not in bytes(record.response)


async def test_an_answer_that_is_too_large_is_an_error(open_mailbox) -> None:
    mailbox = await open_mailbox(max_record_bytes=2000)
    await _keep(mailbox, DeliveryPolicy(ALWAYS, NEVER), 1, answer=b'"' + b"x" * 1998 + b'"')
    await _keep(mailbox, DeliveryPolicy(ALWAYS, NEVER), 2, answer=b'"' + b"x" * 1999 + b'"')
    assert (await _get(mailbox, 1)).status is Status.COMPLETED
    record = await _get(mailbox, 2)
    assert record.status is Status.INTERNAL_ERROR
    assert "2001 bytes" in json.loads(bytes(record.response))["error"]["message"]


async def test_a_begun_answer_is_seen_and_dropped_when_its_client_stayed(open_mailbox) -> None:
    mailbox = await open_mailbox()
    policy = DeliveryPolicy(GONE, NEVER)
    for number in (1, 2):
        await mailbox.begin(policy, mailbox.owner("key"), f"chatcmpl-{number}", "m", 60)
        assert (await _get(mailbox, number)).status is Status.STREAMING
    await _keep(mailbox, policy, 1, disconnected=False)
    await _keep(mailbox, policy, 2, disconnected=True)
    assert await _get(mailbox, 1) is None
    assert (await _get(mailbox, 2)).status is Status.COMPLETED


async def test_an_answer_for_a_webhook_alone_is_not_begun(open_mailbox, receiver) -> None:
    mailbox = await open_mailbox()
    await mailbox.begin(DeliveryPolicy(NEVER, ALWAYS, receiver.url), mailbox.owner("key"), "chatcmpl-1", "m", 60)
    assert await _get(mailbox) is None


async def test_a_push_arrives_and_its_record_goes_unless_it_is_listed(open_mailbox, receiver) -> None:
    mailbox = await open_mailbox()
    await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url, "tok"), 1)
    await _keep(mailbox, DeliveryPolicy(GONE, GONE, receiver.url), 2)
    await until(lambda: len(receiver.received) == 2)
    await _no_push_left(mailbox)
    by_id = {json.loads(each.body)["request_id"]: each for each in receiver.received}
    assert by_id["chatcmpl-1"].headers["authorization"] == "Bearer tok"
    assert "authorization" not in by_id["chatcmpl-2"].headers
    assert json.loads(by_id["chatcmpl-2"].body)["response"] == json.loads(ANSWER)
    assert await _get(mailbox, 1) is None
    assert await _get(mailbox, 2) is not None


async def test_the_operators_webhook(open_mailbox, receiver) -> None:
    mailbox = await open_mailbox({"url": receiver.url, "signing_secret": "s"}, webhook_allowed_hosts=())
    policy = read_policy([(b"x-mailbox-mode", b"always")], mailbox.options)
    await _keep(mailbox, policy, 1, disconnected=False)
    await _keep(mailbox, policy, 2, disconnected=True)
    await until(lambda: receiver.received)
    await _no_push_left(mailbox)
    (received,) = receiver.received
    assert json.loads(received.body)["request_id"] == "chatcmpl-2"
    assert "x-signature-256" in received.headers


async def test_a_push_is_tried_again_with_the_same_id(open_mailbox, receiver) -> None:
    receiver.statuses = [500, 429, 503]
    mailbox = await open_mailbox()
    await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url))
    await until(lambda: len(receiver.received) == 4)
    await _no_push_left(mailbox)
    assert len({each.headers["idempotency-key"] for each in receiver.received}) == 1
    assert len({each.body for each in receiver.received}) == 1


@pytest.mark.parametrize(("status", "attempts"), [(500, 4), (404, 1), (302, 1)])
async def test_a_push_is_given_up(open_mailbox, receiver, caplog, status: int, attempts: int) -> None:
    receiver.statuses = [status] * 10
    mailbox = await open_mailbox()
    with caplog.at_level(logging.WARNING, "candle_vllm"):
        await _keep(mailbox, DeliveryPolicy(GONE, GONE, receiver.url, "hunter2"))
        await _no_push_left(mailbox)
    assert len(receiver.received) == attempts
    assert await _get(mailbox) is not None, "its client may still fetch it"
    assert f"answered {status}" in caplog.text
    assert "hunter2" not in caplog.text


async def test_a_push_whose_record_expires_is_given_up(open_mailbox, receiver, caplog) -> None:
    receiver.statuses = [503]
    mailbox = await open_mailbox({"retry_delay_ms": 60_000}, retention_secs=30)
    ends: list[bool] = []
    mailbox.pushed = ends.append
    await _keep(mailbox, DeliveryPolicy(GONE, GONE, receiver.url))
    await until(lambda: ends == [False])
    assert "answered 503, and its record expires before the next attempt" in caplog.text
    await mailbox.close()  # and one that came due while no server ran
    mailbox = await open_mailbox(retention_secs=3600)
    await mailbox._deliverer.close()
    mailbox.pushed = ends.append
    await _keep(mailbox, DeliveryPolicy(GONE, GONE, receiver.url), 2)
    mailbox.store.backend._clock = lambda: time.time() + 3601
    await mailbox._purge()
    await until(lambda: ends == [False, False])
    assert "chatcmpl-2 are no longer attempted: its record has expired" in caplog.text


async def test_no_retries_where_there_are_none(open_mailbox, receiver) -> None:
    receiver.statuses = [500]
    mailbox = await open_mailbox({"retry_count": 0})
    await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url))
    await until(lambda: receiver.received)
    await _no_push_left(mailbox)
    assert len(receiver.received) == 1


def test_waits_double_and_spread() -> None:
    for retry, low, high in [(1, 750, 1250), (2, 1500, 2500), (3, 3000, 5000), (30, 2_700_000, 4_500_000)]:
        waits = {wait_ms(1000, retry) for _ in range(200)}
        assert low <= min(waits)
        assert max(waits) <= high
        assert len(waits) > 20


async def test_what_was_not_delivered_is_pushed_after_a_restart(open_mailbox, receiver) -> None:
    receiver.statuses = [500]
    first = await open_mailbox({"retry_delay_ms": 60_000})
    await _keep(first, DeliveryPolicy(NEVER, GONE, receiver.url, "tok"))
    await until(lambda: receiver.received and not first._deliverer._running)
    await first.close()
    second = await open_mailbox()
    push_at = await second.store.next_push(())
    assert push_at is not None
    assert push_at > second.store.now + 30_000, "the wait holds over the restart"


async def test_a_push_that_the_end_cuts_off_is_due_at_the_next_start(open_mailbox, receiver, monkeypatch) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.webhook.CLOSE_SECONDS", 0.05)
    receiver.pause = 30.0
    first = await open_mailbox()
    await _keep(first, DeliveryPolicy(NEVER, GONE, receiver.url))
    await until(lambda: receiver.received)
    await first.close()
    receiver.pause = 0.0
    second = await open_mailbox()
    await until(lambda: len(receiver.received) == 2)
    await _no_push_left(second)
    first_id, second_id = (each.headers["idempotency-key"] for each in receiver.received)
    assert first_id == second_id, "at least once, and known as the same"


async def test_a_push_of_a_server_that_died_is_due_after_its_lease(open_mailbox, receiver, monkeypatch) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.webhook.LEASE_MARGIN_SECONDS", 0.2)
    receiver.pause = 30.0
    dead = await open_mailbox({"timeout_secs": 1.0})
    begun = time.monotonic()
    await _keep(dead, DeliveryPolicy(NEVER, GONE, receiver.url))
    await until(lambda: receiver.received)
    for task in (dead._deliverer._pump, *dead._deliverer._running):  # as if its process were gone
        task.cancel()
    dead._deliverer._store.postpone = lambda *_: asyncio.sleep(0)
    receiver.pause = 0.0
    second = await open_mailbox({"timeout_secs": 1.0})
    await until(lambda: len(receiver.received) == 2)
    assert receiver.received[1].time - begun > 1.1, "the lease of 1.2 seconds was not waited for"
    await _no_push_left(second)


async def test_a_url_that_is_not_allowed_any_more_is_not_called(open_mailbox, receiver, caplog) -> None:
    first = await open_mailbox({"retry_delay_ms": 50})
    receiver.statuses = [500]
    await _keep(first, DeliveryPolicy(NEVER, GONE, receiver.url))
    await until(lambda: receiver.received)
    await first.close()
    second = await open_mailbox(webhook_allowed_hosts=("elsewhere.example",))
    await _no_push_left(second)
    assert len(receiver.received) == 1
    assert "does not allow" in caplog.text


async def test_one_keys_slow_receiver_does_not_hold_up_anothers(open_mailbox, receiver, monkeypatch) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.webhook.CLOSE_SECONDS", 0.05)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    tarpit = await asyncio.start_server(hang, "127.0.0.1", 0)
    async with tarpit:
        host = f"127.0.0.1:{tarpit.sockets[0].getsockname()[1]}"
        hosts = (receiver.host, host)
        mailbox = await open_mailbox({"timeout_secs": 300.0}, webhook_allowed_hosts=hosts, max_deliveries=4)
        for number in range(10):
            await _keep(mailbox, DeliveryPolicy(NEVER, GONE, f"http://{host}/"), number, "slow")
        for number in range(10):
            await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url), number, "quick")
        await until(lambda: len(receiver.received) == 10)
        assert len(mailbox._deliverer._running) <= 4
        await mailbox.close()


async def test_no_more_pushes_at_a_time_than_allowed(open_mailbox, receiver) -> None:
    receiver.pause = 0.05
    mailbox = await open_mailbox(max_deliveries=2)
    most = 0
    for number in range(8):
        await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url), number, f"key-{number}")
    while len(receiver.received) < 8:
        most = max(most, len(mailbox._deliverer._running))
        await asyncio.sleep(0.002)
    assert most == 2


async def test_a_store_that_fails_costs_the_answer_and_not_the_request(open_mailbox, caplog) -> None:
    mailbox = await open_mailbox()
    await mailbox.store.close()
    assert await _keep(mailbox, DeliveryPolicy(ALWAYS, NEVER)) is False
    assert "could not be stored" in caplog.text


async def test_a_failure_that_nobody_foresaw_does_not_end_the_pushing(
    open_mailbox, receiver, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.webhook.FAILURE_SECONDS", 0.05)
    mailbox = await open_mailbox()
    claim = SqlBackend.claim_due
    calls: list[object] = []

    def fails(*_: Any) -> None:
        calls.append(1)
        raise ValueError("a status that this version does not know")

    monkeypatch.setattr(SqlBackend, "claim_due", fails)
    await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url))
    await until(lambda: len(calls) >= 2)
    monkeypatch.setattr(SqlBackend, "claim_due", claim)
    await until(lambda: receiver.received)
    assert "a status that this version does not know" in caplog.text


async def test_a_failure_that_nobody_foresaw_does_not_end_the_purging(open_mailbox, monkeypatch, caplog) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.service.PURGE_SECONDS", 0.05)
    calls: list[object] = []

    def fails(*_: Any) -> None:
        calls.append(1)
        raise ValueError("not foreseen")

    monkeypatch.setattr(SqlBackend, "expire", fails)
    await open_mailbox()
    await until(lambda: len(calls) >= 2)
    assert "not foreseen" in caplog.text


async def test_a_push_whose_end_the_store_did_not_record_is_counted_once(open_mailbox, receiver, monkeypatch) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.webhook.LEASE_MARGIN_SECONDS", 0.2)
    mailbox, ends = await open_mailbox({"timeout_secs": 1.0}), list[bool]()
    settle, mailbox.pushed = mailbox.store.settle, ends.append

    async def fail(push: Any) -> None:
        mailbox.store.settle = settle
        raise StoreUnavailableError("the disk is full")

    mailbox.store.settle = fail
    await _keep(mailbox, DeliveryPolicy(NEVER, GONE, receiver.url))
    await _no_push_left(mailbox)
    await until(lambda: ends)
    assert (len(receiver.received), ends) == (2, [True])


async def test_who_asked_is_told_how_pushes_end(open_mailbox, receiver) -> None:
    receiver.statuses = [500, 200, 404, 200, 404]
    mailbox = await open_mailbox()
    ends: list[bool] = []
    mailbox.pushed = ends.append
    for number in (1, 2):
        await _keep(mailbox, DeliveryPolicy(GONE, GONE, receiver.url), number)
        await until(lambda number=number: len(ends) == number)
    assert ends == [True, False], "a retry is no end"
    owner = mailbox.owner("key")
    await mailbox.push(owner, "chatcmpl-1", receiver.url, None, {})
    with pytest.raises(HttpError):
        await mailbox.push(owner, "chatcmpl-1", receiver.url, None, {})
    assert ends[2:] == [True, False]


async def test_expired_records_are_purged_while_it_runs(open_mailbox, monkeypatch) -> None:
    monkeypatch.setattr("candle_vllm.server.mailbox.service.PURGE_SECONDS", 0.05)
    expire, deleted = SqlBackend.expire, list[int]()

    async def noting(self: SqlBackend) -> list[Entry]:
        found = await expire(self)
        deleted.append(len(found))
        return found

    monkeypatch.setattr(SqlBackend, "expire", noting)
    mailbox = await open_mailbox(retention_secs=1)
    await _keep(mailbox, DeliveryPolicy(ALWAYS, NEVER))
    await until(lambda: sum(deleted) == 1)
    assert await _get(mailbox) is None
