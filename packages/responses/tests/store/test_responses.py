# SPDX-License-Identifier: MIT
"""Responses in the store, on SQLite and on a real PostgreSQL: owners, chains, bounds, leases, versions, faults."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete, func, select, update

from candle_vllm.core.errors import ConfigError, InvalidParameterError
from candle_vllm.openai.fair_threads import asker
from candle_vllm.responses.api.response_store import LEASE_MS, ResponseStore
from candle_vllm.responses.store.backend import BACKENDS, Bounds, Held, Place, StoreOptions, backend_at
from candle_vllm.responses.store.database import VERSION, WAIT_SECONDS, connect_to, tables_of
from candle_vllm.responses.store.entries import (
    RESPONSE,
    Entry,
    EntryItem,
    NotStoredError,
    StoreFullError,
    StoreLimitError,
    StoreUnavailableError,
)
from candle_vllm.responses.store.sql import SqlBackend
from tests.postgres_server import new_database
from tests.waiting import PATIENCE, until

TABLES = tables_of("responses")
NOW = 1_700_000_000
DAY = 86_400


def message(name: str, text: str = "Hi") -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def record(name: str, owner: str = "a", *, text: str = "Hi", output: Any = None, **fields: Any) -> Entry:
    """A response with one item in, `msg_in_NAME`, and one out, `msg_out_NAME`."""
    status = fields.get("status", "completed")
    given = [message(f"msg_out_{name}")] if output is None else output
    made = Entry(
        kind=RESPONSE, id=name, owner=owner, created=NOW * 1000, status=status,
        body=msgspec.json.encode({"id": name, "status": status, "error": None, "output": given}),
        given=msgspec.json.encode([message(f"msg_in_{name}", text)]),
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


async def status_of(store: ResponseStore, name: str, owner: str = "a") -> tuple[str, dict[str, Any]]:
    found = await store.get(owner, name)
    return found.status, msgspec.json.decode(found.body)


async def has(store: ResponseStore, name: str, owner: str = "a") -> bool:
    try:
        await store.get(owner, name)
    except NotStoredError:
        return False
    return True


async def test_a_response_comes_back_as_it_went(opener, store_url: str) -> None:
    store = await opener(store_url)
    given = record("resp_1", text="größe \u0000", about={"background": True, "conversation": "c"}, follows="resp_0")
    await store.put(given)
    found = await store.get("a", "resp_1")
    assert found == msgspec.structs.replace(given, expires=(NOW + 30 * DAY) * 1000)


async def test_another_owner_sees_and_deletes_nothing(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.put(record("resp_1"))
    assert not await has(store, "resp_1", "b")
    for work in (store.delete, store.cancel, store.history):
        with pytest.raises(NotStoredError, match="resp_1"):
            await work("b", "resp_1")
    assert not await store.change("b", "resp_1", "failed", b"{}")
    assert await store.find_items("b", ["msg_in_resp_1"]) == {}
    await store.put(record("resp_1", "b", text="mine"))
    assert b"mine" in (await store.get("b", "resp_1")).given
    assert b"mine" not in (await store.get("a", "resp_1")).given


async def test_a_deleted_response_is_gone(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.put(record("resp_1"))
    await store.delete("a", "resp_1")
    assert not await has(store, "resp_1")
    assert await store.find_items("a", ["msg_in_resp_1"]) == {}
    with pytest.raises(NotStoredError):
        await store.delete("a", "resp_1")


async def test_ids_that_cannot_be_are_not_looked_for(opener, store_url: str) -> None:
    store = await opener(store_url)
    for name in ("", "x\0y", "größe", "x" * 300, "x'; DROP TABLE responses_entries; --"):
        assert not await has(store, name)
        with pytest.raises(NotStoredError):
            await store.history("a", name)
    assert await store.find_items("a", ["x\0y"]) == {}


async def test_the_history_is_the_whole_chain(opener, store_url: str) -> None:
    store = await opener(store_url)
    before = None
    for number in range(4):
        await store.put(record(f"resp_{number}", follows=before))
        before = f"resp_{number}"
    names = [item["id"] for item in await store.history("a", "resp_2")]
    assert names == [f"msg_{way}_resp_{number}" for number in range(3) for way in ("in", "out")]
    await store.put(record("resp_2b", follows="resp_1"))  # another way to go on
    assert [item["id"] for item in await store.history("a", "resp_2b")][-1] == "msg_out_resp_2b"


async def test_a_chain_with_a_gap_says_where_it_is(opener, store_url: str) -> None:
    store = await opener(store_url)
    for number in range(3):
        await store.put(record(f"resp_{number}", follows=f"resp_{number - 1}" if number else None))
    await store.delete("a", "resp_1")
    with pytest.raises(NotStoredError, match=r"'resp_2' cannot be continued: the earlier response .*'resp_1'") as error:
        await store.history("a", "resp_2")
    assert error.value.param == "previous_response_id"
    with pytest.raises(NotStoredError, match="Previous response with id 'nothing' was not found"):
        await store.history("a", "nothing")


async def test_a_chain_that_bites_its_tail_ends(opener, store_url: str) -> None:
    store = await opener(store_url, max_chain=10)
    await store.put(record("resp_1", follows="resp_2"))
    await store.put(record("resp_2", follows="resp_1"))
    with pytest.raises(StoreLimitError, match="at most 10 responses"):
        await store.history("a", "resp_1")


async def test_long_and_large_chains_are_refused(opener, store_url: str) -> None:
    store = await opener(store_url, max_chain=3, max_chain_bytes=10_000)
    for number in range(4):
        await store.put(record(f"resp_{number}", follows=f"resp_{number - 1}" if number else None))
    assert len(await store.history("a", "resp_2")) == 6
    with pytest.raises(StoreLimitError) as error:
        await store.history("a", "resp_3")
    assert error.value.param == "previous_response_id"
    await store.put(record("large", text="x" * 9000))
    await store.put(record("after", text="x" * 1000, follows="large"))
    assert await store.history("a", "large")
    with pytest.raises(StoreLimitError, match="10000 bytes"):
        await store.history("a", "after")


async def test_a_running_response_cannot_be_continued(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.put(record("resp_1", status="queued"))
    with pytest.raises(InvalidParameterError, match="still queued"):  # no limit of the store: waiting helps
        await store.history("a", "resp_1")


async def test_items_are_found_by_their_ids(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.put(record("resp_1", text="one"))
    await store.put(record("resp_2", text="two", status="queued", output=[]))
    body = msgspec.json.encode({"id": "resp_2", "status": "completed", "output": [message("msg_new", "late")]})
    assert await store.change("a", "resp_2", "completed", body)
    names = ["msg_in_resp_1", "msg_out_resp_1", "msg_in_resp_2", "msg_new", "nothing"]
    found = await store.find_items("a", names)
    assert {name: item["content"][0]["text"] for name, item in found.items()} == {
        "msg_in_resp_1": "one", "msg_out_resp_1": "Hi", "msg_in_resp_2": "two", "msg_new": "late",
    }  # fmt: skip


async def test_expired_responses_are_neither_shown_nor_kept(opener, store_url: str, clock) -> None:
    store = await opener(store_url, retention_days=2)
    await store.put(record("resp_1"))
    await store.put(record("resp_2", follows="resp_1", expires=(NOW + 5 * DAY) * 1000))
    clock.now += 2 * DAY + 1
    assert not await has(store, "resp_1")
    with pytest.raises(NotStoredError, match="cannot be continued"):
        await store.history("a", "resp_2")
    assert await store.find_items("a", ["msg_in_resp_1"]) == {}
    assert await store.purge() == 1
    assert await store.purge() == 0
    assert await has(store, "resp_2")


async def test_the_oldest_of_the_key_with_most_makes_room(opener, store_url: str, clock) -> None:
    store = await opener(store_url, max_records=4)
    for number in range(3):
        clock.now += 1
        await store.put(record(f"resp_{number}"))
    for number in range(2):
        clock.now += 1
        await store.put(record(f"other_{number}", "b"))
    assert [await has(store, f"resp_{number}") for number in range(3)] == [False, True, True]
    assert [await has(store, f"other_{number}", "b") for number in range(2)] == [True, True]


async def test_what_a_chain_uses_makes_room_last(opener, store_url: str, clock) -> None:
    store = await opener(store_url, max_records=3)
    for number in range(3):
        clock.now += 1
        await store.put(record(f"resp_{number}"))
    clock.now += 1
    await store.history("a", "resp_0")
    clock.now += 1
    await store.put(record("resp_3"))
    assert [await has(store, f"resp_{number}") for number in range(4)] == [True, False, True, True]


async def test_bytes_are_bounded(opener, store_url: str, clock) -> None:
    store = await opener(store_url, max_bytes=20_000)
    for number in range(6):
        clock.now += 1
        await store.put(record(f"resp_{number}", text="x" * 4000))
    there = [await has(store, f"resp_{number}") for number in range(6)]
    assert there == [False, False, True, True, True, True]
    with pytest.raises(StoreLimitError, match="full"):
        await store.put(record("large", text="x" * 20_000))
    assert there == [await has(store, f"resp_{number}") for number in range(6)], "a refusal must cost nothing"


async def test_one_of_several_owners_has_half(store_url: str, clock) -> None:
    several = False
    place = Place(store_url, "responses", "store", "setting")
    store = SqlBackend(place, Bounds(8, size=20_000, spares_leased=True, several=lambda: several), clock)
    await store.open()

    async def there(owner: str) -> list[str]:
        return [entry.id for entry in await store.page(RESPONSE, owner, 10) or []]

    for number in range(4):
        await store.put(record(f"resp_{number}", text="x" * 4000))
    assert len(await there("a")) == 4  # alone it has all
    several = True
    await store.put(record("resp_4", "b", text="x" * 4000))
    await store.put(record("resp_5", text="x" * 4000))
    assert await there("a") == ["resp_5", "resp_3"]  # and then half
    await store.put(record("resp_6", status="in_progress", text="x" * 8000))
    with pytest.raises(StoreFullError, match="Your half of the store is full") as full:
        await store.put(record("resp_7", text="x" * 4000))
    assert full.value.own
    assert await store.change(RESPONSE, "a", "resp_6", b"x" * 4000, status="completed")  # what is begun can end
    await store.put(record("resp_7", text="x" * 4000))
    with pytest.raises(StoreLimitError, match="Your half") as refused:
        await store.put(record("resp_8", text="x" * 12_000))
    assert not isinstance(refused.value, StoreFullError)  # waiting is no help
    leased = [record(f"busy_{number}", status="in_progress", lease=NOW + 99_000) for number in range(4)]
    for each in leased:
        await store.put(each)
    with pytest.raises(StoreFullError, match="half of the store is full: it may have 4 entries"):
        await store.put(record("busy_4"))
    for each in leased:
        await store.delete(RESPONSE, "a", each.id)
    for number in range(9, 16):
        await store.put(record(f"resp_{number}"))
    assert await there("a") == [f"resp_{number}" for number in range(15, 11, -1)]
    assert await there("b") == ["resp_4"]
    for owner in ("a", "b"):
        await store.put(record("due", owner, status="in_progress", lease=NOW))
    assert [entry.owner for entry in await store.lapsed(["a"])] == ["b"]
    await store.close()


async def test_a_response_that_is_too_large_is_refused(opener, store_url: str) -> None:
    store = await opener(store_url, max_record_bytes=5000)
    with pytest.raises(StoreLimitError, match="at most 5000 can be stored") as error:
        await store.put(record("resp_1", text="x" * 5000))
    assert error.value.param == "input"
    await store.put(record("resp_2", status="in_progress"))
    with pytest.raises(StoreLimitError):
        await store.change("a", "resp_2", "completed", b'{"output":[],"x":"' + b"x" * 5000 + b'"}')
    assert (await store.get("a", "resp_2")).status == "in_progress"


async def test_running_responses_make_no_room(opener, store_url: str, clock) -> None:
    store = await opener(store_url, max_records=2)
    for number in range(2):
        await store.put(record(f"resp_{number}", status="in_progress"))
    with pytest.raises(StoreLimitError, match="full"):
        await store.put(record("resp_2"))
    assert await store.change("a", "resp_0", "completed", b'{"output":[]}')
    clock.now += 1
    await store.put(record("resp_2"))
    assert [await has(store, f"resp_{number}") for number in range(3)] == [False, True, True]


async def test_only_a_running_response_changes(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.put(record("resp_1", status="queued"))
    for status, worked in (("in_progress", True), ("completed", True), ("failed", False), ("in_progress", False)):
        body = msgspec.json.encode({"id": "resp_1", "status": status, "output": []})
        assert await store.change("a", "resp_1", status, body) is worked
    assert (await status_of(store, "resp_1"))[0] == "completed"
    await store.put(record("resp_2", status="queued"))
    await store.delete("a", "resp_2")
    assert not await store.change("a", "resp_2", "completed", b'{"output":[]}')
    assert not await has(store, "resp_2")


async def test_a_cancelled_response_stays_cancelled(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.put(record("resp_1", status="in_progress"))
    for _ in range(2):
        cancelled = await store.cancel("a", "resp_1")
        assert (cancelled.status, msgspec.json.decode(cancelled.body)["status"]) == ("cancelled", "cancelled")
    assert not await store.change("a", "resp_1", "completed", b'{"output":[]}')
    await store.put(record("resp_2"))
    assert (await store.cancel("a", "resp_2")).status == "completed"


async def test_a_response_whose_server_died_has_failed(opener, shared_url: str, clock) -> None:
    first = await opener(shared_url)
    await first.put(record("resp_1", status="in_progress"))
    await first.put(record("resp_2", status="queued"))
    await first.close()
    second = await opener(shared_url)
    clock.now += LEASE_MS / 1000 - 1
    assert await second.renew([("a", "resp_2"), ("a", "resp_3")]) == {("a", "resp_3")}
    assert (await status_of(second, "resp_1"))[0] == "in_progress"
    clock.now += 2
    status, body = await status_of(second, "resp_1")  # seen before it is purged
    assert (status, body["status"], body["error"]["code"]) == ("failed", "failed", "server_error")
    assert "stopped" in body["error"]["message"]
    clock.now += LEASE_MS / 1000
    assert await second.purge() == 0
    assert (await status_of(second, "resp_2"))[0] == "failed"


async def test_two_servers_see_what_the_other_did(opener, shared_url: str) -> None:
    first, second = await opener(shared_url), await opener(shared_url)
    assert await first.owner("key") == await second.owner("key") != await first.owner("other")
    await first.put(record("resp_1", status="in_progress"))
    await second.cancel("a", "resp_1")
    assert await first.renew([("a", "resp_1")]) == {("a", "resp_1")}
    assert not await first.change("a", "resp_1", "completed", b'{"output":[]}')


async def test_everything_is_there_after_a_restart(opener, shared_url: str) -> None:
    first = await opener(shared_url)
    owner = await first.owner("key")
    await first.put(record("resp_1", owner))
    await first.close()
    second = await opener(shared_url)
    assert await has(second, "resp_1", await second.owner("key"))


async def test_stores_that_open_together_agree(opener, shared_url: str) -> None:
    stores = await asyncio.gather(*(opener(shared_url) for _ in range(5)))
    assert len({await store.owner("key") for store in stores}) == 1


async def test_many_writers_keep_the_bounds(opener, shared_url: str) -> None:
    stores = [await opener(shared_url, max_records=10) for _ in range(3)]
    await asyncio.gather(*(store.put(record(f"r_{n}_{i}")) for n, store in enumerate(stores) for i in range(10)))
    engine = connect_to(StoreOptions(url=shared_url).place)
    with engine.begin() as connection:
        count = connection.execute(select(func.count()).select_from(TABLES.entries)).scalar_one()
        orphans = select(func.count()).where(TABLES.names.c.entry.not_in(select(TABLES.entries.c.number)))
        assert connection.execute(orphans).scalar_one() == 0
    engine.dispose()
    assert count == 10


async def test_a_newer_schema_is_refused(opener, shared_url: str) -> None:
    await (await opener(shared_url)).close()
    engine = connect_to(StoreOptions(url=shared_url).place)
    with engine.begin() as connection:
        connection.execute(update(TABLES.head).values(version=VERSION + 1))
    engine.dispose()
    with pytest.raises(ConfigError, match=r"another version of the server .* give another --responses-store"):
        await opener(shared_url)


async def test_a_broken_database_is_said_to_be_unavailable(opener, shared_url: str) -> None:
    store = await opener(shared_url)
    engine = connect_to(StoreOptions(url=shared_url).place)
    TABLES.names.drop(engine)
    engine.dispose()
    with pytest.raises(StoreUnavailableError) as error:
        await store.put(record("resp_1"))
    assert "responses_names" not in str(error.value)
    assert not await has(store, "resp_1"), "a half of it was kept"


async def test_a_closed_store_says_so(opener, store_url: str) -> None:
    store = await opener(store_url)
    await store.close()
    with pytest.raises(StoreUnavailableError):
        await store.get("a", "resp_1")


async def test_keys_take_turns_at_the_database(opener, store_url: str) -> None:
    """However much one key asks for, what another key asks for comes next."""
    store = await opener(store_url)
    database, order, may_end = (await store.backend()).database, list[str](), threading.Event()

    def work(_: object, who: str) -> None:
        order.append(who)
        assert may_end.wait(PATIENCE)

    async def call(who: str) -> None:
        asker.set(who)
        await database.run(work, who)

    calls = [asyncio.create_task(call("alice")) for _ in range(5)]
    await until(lambda: order == ["alice"])
    calls.append(asyncio.create_task(call("bob")))
    await asyncio.sleep(0)
    may_end.set()
    await asyncio.gather(*calls)
    assert order.index("bob") == 2


def test_a_server_of_postgresql_that_is_gone_without_a_word_is_noticed(postgres: str) -> None:
    """Or else the only connection would wait for minutes, also where another server has taken over."""
    engine = connect_to(Place(new_database(postgres), "responses", "store", "setting"))
    with engine.connect() as connection:
        told: Any = connection.connection.dbapi_connection
        given = {name: int(value) for name, value in told.info.get_parameters().items() if value.isdecimal()}
    engine.dispose()
    assert given["tcp_user_timeout"] / 1000 <= WAIT_SECONDS
    assert given["keepalives_idle"] + given["keepalives_count"] * given["keepalives_interval"] <= WAIT_SECONDS


async def test_a_password_is_never_in_a_message() -> None:
    options = StoreOptions(url="postgresql://u:hunter2@127.0.0.1:1/d")
    store = ResponseStore(options)
    with pytest.raises(ConfigError, match="cannot open the store of responses") as refusal:
        await store.start()
    await store.close()
    assert "hunter2" not in str(refusal.value) + repr(options)


@pytest.mark.parametrize("scheme", BACKENDS)
def test_every_scheme_has_a_backend(scheme: str) -> None:
    place = Place(f"{scheme}x", "responses", "store", "setting")
    assert callable(backend_at(place, Bounds(8), time.time).claim_due)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://h/d", "nothing", ""])
async def test_other_urls_are_refused(url: str) -> None:
    store = ResponseStore(StoreOptions(url=url))
    with pytest.raises(ConfigError, match="responses_store must"):
        await store.start()
    await store.close()


@pytest.mark.parametrize(
    "path", ["~nobody-here/x.sqlite", f"{'a' * 300}/b/x.sqlite", f"{'a' * 300}/x.sqlite", "a%00b.sqlite"]
)
def test_a_file_that_cannot_be_there_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot write the store"):
        connect_to(Place(f"sqlite:///{path}", "responses", "store", "setting"))


async def test_a_file_is_for_its_owner_alone_and_forgets(opener, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "responses.sqlite"
    store = await opener(f"sqlite:///{path}")
    await store.put(record("resp_1", text="a-very-private-text"))
    await store.delete("a", "resp_1")
    assert {stat.S_IMODE(os.stat(file).st_mode) for file in path.parent.iterdir()} == {0o600}
    await store.close()
    assert [file.name for file in path.parent.iterdir()] == ["responses.sqlite"]
    assert b"a-very-private-text" not in path.read_bytes()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(StoreOptions) if field.name != "url"])
def test_options_are_checked(name: str) -> None:
    wrong: list[Any] = [0, -1, True, 1.5, "1", 1 << 60]
    for value in wrong:
        options: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=name) as refusal:
            StoreOptions(**options)
        assert refusal.value.setting == name


async def test_deleting_rows_behind_its_back_is_no_error(opener, shared_url: str) -> None:
    store = await opener(shared_url)
    await store.put(record("resp_1", status="queued"))
    engine = connect_to(StoreOptions(url=shared_url).place)
    with engine.begin() as connection:
        connection.execute(delete(TABLES.names))
        connection.execute(delete(TABLES.entries))
    engine.dispose()
    assert not await store.change("a", "resp_1", "completed", b'{"output":[]}')
    assert await store.renew([("a", "resp_1")]) == {("a", "resp_1")}


async def test_what_an_entry_gathered_counts_when_it_has_ended(opener, store_url: str) -> None:
    store = await (await opener(store_url)).backend()
    begun = Entry(kind="results", owner="a", id="file_1", created=store.now, status="in_progress")
    await store.put(begun)
    await store.append("results", "a", "file_1", [EntryItem(id=str(n), body=b"x" * 1000) for n in range(3)])
    await store.put(msgspec.structs.replace(begun, kind="file", status="processed"))
    assert [part.id for part in await store.parts("file", "a", "file_1")] == ["0", "1", "2"]
    sizes = select(store.tables.entries.c.size)
    assert await store.database.run(lambda connection: connection.execute(sizes).scalar_one()) > 3000


async def test_what_is_leased_does_not_expire(store_url: str, clock) -> None:
    place = Place(store_url, "responses", "store", "setting")
    store = SqlBackend(place, Bounds(8, size=20_000, spares_leased=True), clock)
    await store.open()
    for name in ("leased", "free"):
        await store.put(record(name, expires=(NOW + 40) * 1000))
    holder, other = Held("a", "leased", "mine"), Held("a", "leased", "other")
    assert await store.claim(RESPONSE, holder, store.now + 30_000)
    clock.now += 29
    assert not await store.claim(RESPONSE, other, store.now + 30_000)
    assert await store.claim(RESPONSE, holder, store.now + 30_000)  # the holder renews it
    clock.now += 29
    assert len(await store.expire()) == 1
    assert [entry.id for entry in await store.page(RESPONSE, "a", 10) or []] == ["leased"]
    clock.now += 2
    assert await store.get(RESPONSE, "a", "leased") is None
    assert len(await store.expire()) == 1
    await store.close()


async def test_what_an_entry_gathered_can_end_in_a_store_that_became_smaller(store_url: str, clock) -> None:
    several = False
    place = Place(store_url, "responses", "store", "setting")
    store = SqlBackend(place, Bounds(8, size=20_000, spares_leased=True, several=lambda: several), clock)
    await store.open()
    begun = record("resp_1", status="in_progress", text="x" * 15_000)
    await store.put(begun)
    several = True
    await store.put(msgspec.structs.replace(begun, status="completed"))
    assert [entry.status for entry in await store.page(RESPONSE, "a", 10) or []] == ["completed"]
    await store.close()


async def test_a_full_disk_is_said_in_one_line(opener, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = await opener(f"sqlite:///{tmp_path}/responses.sqlite")
    database = (await store.backend()).database
    await database.run(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1").close())

    async def fill() -> None:
        for number in range(200):
            await store.put(record(f"resp_{number}"))

    with pytest.raises(StoreUnavailableError, match="cannot be written: its disk is full") as error:
        await fill()
    assert error.value.__cause__ is None, "it would be logged with its traceback"
    assert caplog.text.count("database or disk is full") == 1
