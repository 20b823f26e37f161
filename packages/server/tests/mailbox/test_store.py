# SPDX-License-Identifier: MIT
"""The store, on SQLite and on a real PostgreSQL: order, owners, bounds, expiry, pushes, versions."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import create_engine, update

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.store.backend import Place
from candle_vllm.responses.store.database import VERSION, connect_to, tables_of
from candle_vllm.responses.store.entries import StoreUnavailableError
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mailbox.store import MailboxStore, Status, StoredAnswer

HOUR = 3600 * 1000
TABLES = tables_of("mailbox")


def _place(url: str) -> Place:
    return Place(url, "mailbox", "mailbox", "mailbox")


@pytest_asyncio.fixture
async def opener(store_url: str, clock: Any) -> AsyncIterator[Any]:
    stores: list[MailboxStore] = []

    async def opener(**options: Any) -> MailboxStore:
        store = MailboxStore(MailboxOptions(store_url, **options), clock)
        stores.append(store)
        await store.open()
        return store

    yield opener
    for store in stores:
        await store.close()


def _entry(store: MailboxStore, request_id: str, owner: str = "a", **fields: Any) -> StoredAnswer:
    made = StoredAnswer(owner, request_id, "model", Status.COMPLETED, b'{"id":"x"}', store.now + HOUR)
    return dataclasses.replace(made, **fields)


async def _ids(store: MailboxStore, owner: str = "a") -> list[str]:
    return [record.request_id for record in await store.page(owner, 1000, None) or []]


async def test_a_record_comes_back_as_it_went(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "chatcmpl-1", response='{"text":"größe \\u0000"}'.encode()))
    found = await store.get("a", "chatcmpl-1")
    assert found is not None
    record = found.record
    assert (record.request_id, record.model, record.status) == ("chatcmpl-1", "model", Status.COMPLETED)
    assert record.created == 1_700_000_000
    assert bytes(record.response) == '{"text":"größe \\u0000"}'.encode()


async def test_another_owner_sees_and_deletes_nothing(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one"))
    assert await store.get("b", "one") is None
    assert await store.page("b", 10, None) == []
    assert await store.page("b", 10, "one") is None
    assert await store.remove("b", "one") is False
    assert await store.get("a", "one") is not None


async def test_two_owners_may_have_the_same_id(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one", "a", response=b"1"))
    await store.put(_entry(store, "one", "b", response=b"2"))
    assert [bytes((await store.get(owner, "one")).response) for owner in "ab"] == [b"1", b"2"]


async def test_pages_are_newest_first(opener) -> None:
    store = await opener()
    for number in range(7):
        await store.put(_entry(store, f"id-{number}"))
    assert await _ids(store) == [f"id-{number}" for number in reversed(range(7))]
    page = await store.page("a", 3, "id-5")
    assert [record.request_id for record in page] == ["id-4", "id-3", "id-2"]
    assert all(record.response is not bytes and not hasattr(record.response, "decode") for record in page)
    assert await store.page("a", 3, "nothing") is None


async def test_a_deleted_record_is_gone(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one"))
    assert await store.remove("a", "one") is True
    assert await store.remove("a", "one") is False
    assert await store.get("a", "one") is None


async def test_a_begun_record_is_completed_in_its_place(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one", status=Status.STREAMING, response=None))
    await store.put(_entry(store, "two"))
    begun = await store.get("a", "one")
    assert begun.status is Status.STREAMING
    await store.put(_entry(store, "one", response=b"1"))
    assert await _ids(store) == ["two", "one"]
    assert bytes((await store.get("a", "one")).response) == b"1"


async def test_the_newer_of_two_answers_with_one_id_counts(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one", response=b"1"))
    await store.put(_entry(store, "two"))
    await store.put(_entry(store, "one", response=b"2"))
    assert await _ids(store) == ["one", "two"]
    assert bytes((await store.get("a", "one")).response) == b"2"


async def test_only_what_was_begun_is_dropped(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "begun", status=Status.STREAMING, response=None))
    await store.put(_entry(store, "done"))
    await store.remove("a", "begun", Status.STREAMING)
    await store.remove("a", "done", Status.STREAMING)
    assert await _ids(store) == ["done"]


async def test_what_has_expired_is_neither_shown_nor_kept(opener, clock) -> None:
    store = await opener()
    await store.put(_entry(store, "one"))
    clock.now += 3601
    assert await _ids(store) == []
    assert await store.get("a", "one") is None
    assert len(await store.backend.expire()) == 1
    assert await store.backend.expire() == []


async def test_an_answer_that_streams_beyond_its_time_becomes_an_error(opener, clock) -> None:
    store = await opener(retention_secs=100)
    await store.put(_entry(store, "one", status=Status.STREAMING, response=None, expires=store.now + 1000))
    clock.now += 2
    assert await store.purge() == []
    record = await store.get("a", "one")
    assert record.status is Status.INTERNAL_ERROR
    assert b"stopped" in bytes(record.response)
    clock.now += 101
    assert len(await store.backend.expire()) == 1


async def test_a_push_of_a_lost_answer_has_an_id_of_its_own(opener, clock) -> None:
    store = await opener()
    for name in ("one", "two"):
        await store.put(_entry(store, name, status=Status.STREAMING, response=None, expires=store.now + 1000))
    clock.now += 2
    await store.purge()
    ids = [(await store.get("a", name)).delivery_id for name in ("one", "two", "one")]
    assert len(ids[0]) == 32
    assert ids[0] == ids[2] != ids[1]


async def test_the_oldest_of_a_key_makes_room(opener) -> None:
    store = await opener(max_records_per_key=3)
    await store.put(_entry(store, "other", "b"))
    dropped = [await store.put(_entry(store, f"id-{number}")) for number in range(5)]
    assert dropped == [0, 0, 0, 1, 1]
    assert await _ids(store) == ["id-4", "id-3", "id-2"]
    assert await _ids(store, "b") == ["other"]


async def test_the_key_with_most_records_makes_room_for_others(opener) -> None:
    store = await opener(max_records=4)
    for number in range(4):
        await store.put(_entry(store, f"a-{number}"))
    for number in range(2):
        assert await store.put(_entry(store, f"b-{number}", "b")) == 1
    assert await _ids(store) == ["a-3", "a-2"]
    assert await _ids(store, "b") == ["b-1", "b-0"]


async def test_finished_and_pushed_records_make_room_first(opener) -> None:
    store = await opener(max_records_per_key=3)
    await store.put(_entry(store, "begun", status=Status.STREAMING, response=None))
    await store.put(_entry(store, "unsent", push=True))
    await store.put(_entry(store, "plain"))
    await store.put(_entry(store, "new"))
    assert await _ids(store) == ["new", "unsent", "begun"]


async def test_a_push_is_claimed_once_until_its_lease_ends(opener, clock) -> None:
    first, second = await opener(), await opener()
    await first.put(_entry(first, "one", push=True, url="http://x/", bearer="secret"))
    claims = await asyncio.gather(*(store.claim(10_000, ()) for store in (first, second) for _ in range(4)))
    (push,) = [claim for claim in claims if claim is not None]
    assert (push.record.request_id, push.url, push.bearer, push.attempts) == ("one", "http://x/", "secret", 0)
    assert "secret" not in repr(push)
    assert await second.next_push(()) == first.now + 10_000
    clock.now += 10
    again = await second.claim(10_000, ())
    assert again.held == push.held


async def test_a_push_that_another_server_claims_at_the_same_time_is_not_claimed(opener, store_url: str) -> None:
    """Both have seen that it is due; the second waits for the first's transaction."""
    store = await opener()
    await store.put(_entry(store, "one", push=True))
    engine = connect_to(_place(store_url))
    with engine.begin() as connection:
        mine = update(TABLES.entries).where(TABLES.entries.c.lease <= store.now).values(lease=store.now + 1000)
        assert connection.execute(mine).rowcount == 1
        other = asyncio.create_task(store.claim(1000, ()))
        await asyncio.sleep(0.3)
        assert not other.done()
    engine.dispose()
    assert await other is None


async def test_pushes_of_busy_owners_wait(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one", "a", push=True))
    await store.put(_entry(store, "two", "b", push=True))
    assert (await store.claim(1000, ["a"])).owner == "b"
    assert await store.claim(1000, ["a", "b"]) is None
    assert await store.next_push(["a", "b"]) is None
    assert (await store.claim(1000, ["b"])).owner == "a"


async def test_a_postponed_push_is_due_later_with_its_attempts(opener, clock) -> None:
    store = await opener()
    await store.put(_entry(store, "one", push=True))
    await store.postpone(await store.claim(1000, ()), 1, 500)
    assert await store.claim(1000, ()) is None
    clock.now += 0.5
    assert (await store.claim(1000, ())).attempts == 1


async def test_a_settled_push_leaves_the_record_only_where_it_is_listed(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "listed", push=True, bearer="secret"))
    await store.put(_entry(store, "unlisted", push=True, listed=False))
    assert await _ids(store) == ["listed"]
    assert await store.get("a", "unlisted") is None
    for _ in range(2):
        await store.settle(await store.claim(1000, ()))
    assert await store.next_push(()) is None
    assert (await store.get("a", "listed")).bearer is None
    assert await store.put(_entry(store, "unlisted")) == 0


async def test_a_push_of_a_replaced_or_deleted_record_changes_nothing(opener) -> None:
    store = await opener()
    await store.put(_entry(store, "one", push=True))
    stale = await store.claim(1000, ())
    await store.put(_entry(store, "one", push=True))
    await store.settle(stale)
    assert (await store.claim(1000, ())).delivery_id != stale.delivery_id
    await store.remove("a", "one")
    await store.postpone(stale, 1, 0)
    assert await store.claim(1000, ()) is None


async def test_an_expired_push_is_not_sent(opener, clock) -> None:
    store = await opener()
    await store.put(_entry(store, "one", push=True))
    await store.put(_entry(store, "sent now", push=True, expires=store.now + 2 * HOUR))
    await store.put(_entry(store, "no push"))
    clock.now += 3601
    assert (await store.claim(7200_000, ())).request_id == "sent now"
    clock.now += 3600
    assert await store.claim(1000, ()) is None
    assert await store.next_push(()) is None
    assert [lost.request_id for lost in await store.purge()] == ["one"]


async def test_everything_is_there_after_a_restart(opener) -> None:
    first = await opener()
    owner = first.owner("key")
    await first.put(_entry(first, "one", owner, push=True))
    await first.close()
    second = await opener()
    assert second.owner("key") == owner
    assert await _ids(second, owner) == ["one"]
    assert (await second.claim(1000, ())).record.request_id == "one"


async def test_owners_are_hashes_that_differ_between_stores(opener, tmp_path: Path) -> None:
    store = await opener()
    other = MailboxStore(MailboxOptions(f"sqlite:///{tmp_path}/other.sqlite"))
    await other.open()
    hashes = {store.owner("key"), other.owner("key"), store.owner("key2"), store.owner("")}
    await other.close()
    assert len(hashes) == 4
    assert all(len(each) == 64 and "key" not in each for each in hashes)


async def test_stores_that_open_together_agree(opener) -> None:
    stores = await asyncio.gather(*(opener() for _ in range(6)))
    assert len({store.owner("key") for store in stores}) == 1


async def test_a_newer_schema_is_refused(opener, store_url: str) -> None:
    await (await opener()).close()
    engine = connect_to(_place(store_url))
    with engine.begin() as connection:
        connection.execute(update(TABLES.head).values(version=VERSION + 1))
    engine.dispose()
    with pytest.raises(ConfigError, match="another version of the server"):
        await opener()


async def test_hostile_texts_are_values(opener) -> None:
    store = await opener()
    name = "x'; DROP TABLE mailbox_entries; --"
    await store.put(_entry(store, name, "o'"))
    assert await _ids(store, "o'") == [name]
    assert await store.get("a", "' OR '1'='1") is None


async def test_a_closed_store_says_so(opener) -> None:
    store = await opener()
    await store.close()
    with pytest.raises(StoreUnavailableError) as refusal:
        await store.get("a", "one")
    assert refusal.value.setting == "mailbox"


async def test_too_many_waiting_calls_are_refused(opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_vllm.responses.store.sql.MAX_WAITING", 2)
    store = await opener()
    results = await asyncio.gather(*(store.get("a", "one") for _ in range(20)), return_exceptions=True)
    refused = [each for each in results if isinstance(each, StoreUnavailableError)]
    assert 0 < len(refused) <= 18
    assert await store.get("a", "one") is None


async def test_a_broken_database_is_a_503(opener, store_url: str) -> None:
    store = await opener()
    engine = connect_to(_place(store_url))
    TABLES.all.drop_all(engine)
    engine.dispose()
    with pytest.raises(StoreUnavailableError) as refusal:
        await store.put(_entry(store, "one"))
    assert refusal.value.setting == "mailbox"
    assert "mailbox_entries" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///x.db?mode=ro",
        "mysql://h/d",
        "nothing",
        "",
        "postgresql+asyncpg://h/d",
    ],
)
async def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="mailbox must"):
        await MailboxStore(MailboxOptions(url)).open()


async def test_a_password_is_never_in_a_message() -> None:
    options = MailboxOptions("postgresql://u:hunter2@127.0.0.1:1/d")
    store = MailboxStore(options)
    with pytest.raises(ConfigError, match="cannot open the mailbox") as refusal:
        await store.open()
    await store.close()
    assert "hunter2" not in str(refusal.value) + repr(options)


async def test_an_sqlite_file_is_for_its_owner_alone_and_forgets(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mailbox.sqlite"
    store = MailboxStore(MailboxOptions(f"sqlite:///{path}"))
    await store.open()
    await store.put(_entry(store, "one", response=b"a-very-private-answer"))
    await store.remove("a", "one")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    await store.close()
    assert [file.name for file in path.parent.iterdir()] == ["mailbox.sqlite"]
    assert b"a-very-private-answer" not in path.read_bytes()


async def test_two_writers_of_one_sqlite_file_wait_for_each_other(tmp_path: Path) -> None:
    stores = [MailboxStore(MailboxOptions(f"sqlite:///{tmp_path}/mailbox.sqlite")) for _ in range(2)]
    for store in stores:
        await store.open()
    await asyncio.gather(*(store.put(_entry(store, f"{n}-{i}")) for n, store in enumerate(stores) for i in range(20)))
    assert len(await _ids(stores[0])) == 40
    for store in stores:
        await store.close()
    engine = create_engine(f"sqlite:///{tmp_path}/mailbox.sqlite")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()
