# SPDX-License-Identifier: MIT
"""Conversations in the store, on SQLite and on a real PostgreSQL: items, pages, owners, bounds, order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, get_args

import msgspec
import pytest
from sqlalchemy import Connection, func, select, text

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.api.conversations import Conversations, ConversationUpdateRequest
from candle_vllm.responses.api.response_store import TURN_MS, ResponseStore
from candle_vllm.responses.api.stored_items import PageRequest
from candle_vllm.responses.store.backend import Held, Order, Place
from candle_vllm.responses.store.database import connect_to, tables_of
from candle_vllm.responses.store.entries import CONVERSATION, Entry, NotStoredError, StoreLimitError, parts_of
from candle_vllm.responses.store.sql import SqlBackend
from tests.postgres_server import new_database
from tests.waiting import until


def message(name: str | None, text: str = "Hi") -> dict[str, Any]:
    made = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    return made if name is None else {"id": name, **made}


async def begin(store: ResponseStore, name: str = "conv_1", *items: dict[str, Any], owner: str = "a") -> None:
    backend = await store.backend()
    made = Entry(kind=CONVERSATION, owner=owner, id=name, created=backend.now, body=b'{"k":"v"}')
    await backend.put(made, parts=parts_of(items, store.options.max_item_bytes))


async def ids(store: ResponseStore, name: str = "conv_1", owner: str = "a") -> list[str]:
    return [item["id"] for item in await store.conversation_items(owner, name)]


async def take(store: SqlBackend, turn: Held) -> bool:
    return await store.claim(CONVERSATION, turn, store.now + TURN_MS)


async def test_a_conversation_comes_back_as_it_went(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1", "größe"), message(None))
    found = await Conversations(store).retrieve("a", "conv_1")
    assert (found.id, found.created_at, found.metadata) == ("conv_1", 1_700_000_000, {"k": "v"})
    first, second = await store.conversation_items("a", "conv_1")
    assert first == message("msg_1", "größe")
    assert second["id"].startswith("msg_")
    assert msgspec.json.decode(await Conversations(store).item("a", "conv_1", second["id"])) == second
    assert (await store.find_items("a", ["msg_1"]))["msg_1"] == first


async def test_metadata_is_replaced(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store)
    conversations = Conversations(store)
    for metadata in ({"a": "x" * 500}, {}):
        wanted = ConversationUpdateRequest(metadata=metadata)
        assert (await conversations.update("a", "conv_1", wanted)).metadata == metadata
        assert (await conversations.retrieve("a", "conv_1")).metadata == metadata


async def test_another_owner_sees_and_changes_nothing(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1"))
    conversations, metadata = Conversations(store), ConversationUpdateRequest(metadata={})
    for work in (
        conversations.retrieve("b", "conv_1"), conversations.update("b", "conv_1", metadata),
        conversations.delete("b", "conv_1"), store.append("b", "conv_1", [message(None)]),
        conversations.items("b", "conv_1", PageRequest(limit=1)),
        conversations.item("b", "conv_1", "msg_1"), conversations.delete_item("b", "conv_1", "msg_1"),
    ):  # fmt: skip
        with pytest.raises(NotStoredError, match="Conversation with id 'conv_1' was not found") as error:
            await work
        assert error.value.param == "conversation_id"
    assert await store.find_items("b", ["msg_1"]) == {}
    assert await ids(store) == ["msg_1"]


async def test_a_conversation_is_no_response_and_a_response_no_conversation(
    opener, store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = await opener(store_url)
    await begin(store)
    with pytest.raises(NotStoredError):
        await store.get("a", "conv_1")
    with pytest.raises(NotStoredError):
        await store.delete("a", "conv_1")
    with pytest.raises(NotStoredError):
        await store.turn("a", "conv_1\0").__aenter__()
    assert await ids(store) == []
    assert not caplog.records


async def test_pages_go_both_ways(opener, store_url: str) -> None:
    store = await opener(store_url)
    names = [f"msg_{number}" for number in range(7)]
    await begin(store, "conv_1", *(message(name) for name in names))
    await begin(store, "conv_2", message("other"))
    conversations = Conversations(store)
    for order, expected in zip(get_args(Order), (names, names[::-1]), strict=True):
        seen: list[str] = []
        after = None
        for more in (True, True, False):
            page = await conversations.items("a", "conv_1", PageRequest(limit=3, order=order, after=after))
            assert page.has_more is more
            seen += [msgspec.json.decode(item)["id"] for item in page.data]
            after = page.last_id
        assert seen == expected
        assert not (await conversations.items("a", "conv_1", PageRequest(limit=7, order=order))).has_more
    for wrong in ("nothing", "other", "", "x\0"):
        with pytest.raises(InvalidParameterError, match="after must be the id of an item"):
            await conversations.items("a", "conv_1", PageRequest(limit=3, order="asc", after=wrong))


async def test_items_are_added_all_or_none(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1"))
    for items, place in (
        ([message("msg_2"), message("msg_1")], "items.1.id"), ([message("msg_2"), message("msg_2")], "items.1.id"),
        ([message("x\0")], "items.0.id"),
    ):  # fmt: skip
        with pytest.raises(InvalidParameterError) as error:
            await store.append("a", "conv_1", items)
        assert error.value.param == place
        assert await ids(store) == ["msg_1"]
    added = await store.append("a", "conv_1", [message("msg_2"), message("msg_1")], skip_known=True)
    assert [item.id for item in added] == ["msg_2", "msg_1"]
    assert await ids(store) == ["msg_1", "msg_2"]
    assert await store.append("a", "conv_1", []) == []


async def test_one_id_may_be_in_two_conversations(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1", "one"))
    await begin(store, "conv_2", message("msg_1", "two"))
    assert b"two" in await Conversations(store).item("a", "conv_2", "msg_1")


async def test_deleting(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1"), message("msg_2"))
    conversations = Conversations(store)
    assert (await conversations.delete_item("a", "conv_1", "msg_1")).id == "conv_1"
    for work in (conversations.item("a", "conv_1", "msg_1"), conversations.delete_item("a", "conv_1", "msg_1")):
        with pytest.raises(NotStoredError, match="Conversation item with id 'msg_1'") as error:
            await work
        assert error.value.param == "item_id"
    assert await ids(store) == ["msg_2"]
    await conversations.delete("a", "conv_1")
    with pytest.raises(NotStoredError):
        await conversations.delete("a", "conv_1")
    await begin(store, "conv_1")
    assert await ids(store) == []


async def test_items_and_conversations_are_bounded(opener, store_url: str) -> None:
    store = await opener(store_url, max_item_bytes=2000, max_items=3, max_conversation_bytes=5000)
    await begin(store)
    with pytest.raises(StoreLimitError, match=r"items\.1 has \d+ bytes as JSON; at most 2000") as error:
        await store.append("a", "conv_1", [message(None), message(None, "x" * 2000)])
    assert error.value.param == "items.1"
    await store.append("a", "conv_1", [message(None), message(None)])
    with pytest.raises(StoreLimitError, match="fits into the conversation") as error:
        await store.append("a", "conv_1", [message(None), message(None)])
    assert error.value.param == "conversation"
    await store.append("a", "conv_1", [message(None)])
    await begin(store, "conv_2")
    for _ in range(2):
        await store.append("a", "conv_2", [message(None, "x" * 1500)])
    with pytest.raises(StoreLimitError, match="5000 bytes"):
        await store.append("a", "conv_2", [message(None, "x" * 1500)])


async def test_a_conversation_that_grows_makes_others_go_and_not_itself(opener, store_url: str, clock) -> None:
    store = await opener(store_url, max_bytes=10_000)
    await begin(store, "conv_1", message(None, "x" * 1000))
    clock.now += 1
    await begin(store, "conv_2", message(None, "x" * 1000))
    clock.now += 1
    for _ in range(4):
        await store.append("a", "conv_1", [message(None, "x" * 1000)])
    assert len(await ids(store)) == 5
    with pytest.raises(NotStoredError):
        await Conversations(store).retrieve("a", "conv_2")
    with pytest.raises(StoreLimitError, match="full"):
        await store.append("a", "conv_1", [message(None, "x" * 4000)])
    assert len(await ids(store)) == 5
    for item in await ids(store):
        await Conversations(store).delete_item("a", "conv_1", item)
    await store.append("a", "conv_1", [message(None, "x" * 4000)])


async def test_writers_add_in_whole_pieces(opener, shared_url: str) -> None:
    stores = [await opener(shared_url) for _ in range(3)]
    await begin(stores[0])
    pieces = [[message(f"m_{n}_{i}_{part}") for part in range(3)] for n in range(3) for i in range(6)]
    await asyncio.gather(*(stores[index % 3].append("a", "conv_1", piece) for index, piece in enumerate(pieces)))
    names = await ids(stores[1])
    assert len(names) == 54
    for start in range(0, 54, 3):
        assert [name.rsplit("_", 1)[1] for name in names[start : start + 3]] == ["0", "1", "2"]
        assert len({name.rsplit("_", 1)[0] for name in names[start : start + 3]}) == 1


TABLES = tables_of("responses")
Step = Callable[[Conversations], Coroutine[Any, Any, object]]


def hold_room(connection: Connection) -> None:
    connection.execute(select(func.pg_advisory_xact_lock(TABLES.lock + 1)))


def hold_item(connection: Connection) -> None:
    connection.execute(select(TABLES.parts.c.number).with_for_update())


def grow_metadata(conversations: Conversations) -> Coroutine[Any, Any, object]:
    return conversations.update("a", "conv_1", ConversationUpdateRequest(metadata={"k": "x" * 500}))


def delete_whole(conversations: Conversations) -> Coroutine[Any, Any, object]:
    return conversations.delete("a", "conv_1")


def add_item(conversations: Conversations) -> Coroutine[Any, Any, object]:
    return conversations._store.append("a", "conv_1", [message("msg_2")])


def delete_item(conversations: Conversations) -> Coroutine[Any, Any, object]:
    return conversations.delete_item("a", "conv_1", "msg_1")


@pytest.mark.parametrize(
    ("hold", "first", "second", "gone"),
    [(hold_room, grow_metadata, add_item, False), (hold_item, delete_whole, delete_item, True)],
)
async def test_two_servers_lock_one_conversation_in_the_same_order(
    opener, postgres: str, hold: Callable[[Connection], None], first: Step, second: Step, gone: bool
) -> None:
    """While a lock that both need is held, the second call must wait for the first, and not hold what it needs."""
    url = new_database(postgres)
    servers = [Conversations(await opener(url)) for _ in range(2)]
    await begin(servers[0]._store, "conv_1", message("msg_1"))
    engine = connect_to(Place(url, "responses", "store", "setting"))
    calls: list[asyncio.Task[object]] = []
    try:
        with engine.connect() as watching:
            waits = text("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted")
            hold(watching)
            for step, server in zip((first, second), servers, strict=True):
                calls.append(asyncio.create_task(step(server)))
                await until(lambda: watching.execute(waits).scalar() == len(calls))
            watching.rollback()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        engine.dispose()
    assert not isinstance(outcomes[0], BaseException)
    assert isinstance(outcomes[1], NotStoredError if gone else list)


async def test_conversations_do_not_expire(opener, store_url: str, clock) -> None:
    store = await opener(store_url, retention_days=1)
    await begin(store)
    clock.now += 100 * 86_400
    assert await store.purge() == 0
    assert await Conversations(store).retrieve("a", "conv_1")


async def test_one_holder_at_a_time_answers_in_a_conversation(opener, shared_url: str, clock) -> None:
    first = await opener(shared_url)
    await begin(first)
    one, other = await first.backend(), await (await opener(shared_url)).backend()
    assert await take(one, Held("a", "conv_1", "dead"))
    assert not await take(other, Held("a", "conv_1", "next"))
    clock.now += 19
    await one.move([Held("a", "conv_1", "dead")], one.now + TURN_MS)
    clock.now += 19
    assert not await take(other, Held("a", "conv_1", "next"))
    clock.now += 2
    assert await take(other, Held("a", "conv_1", "next"))
    await one.move([Held("a", "conv_1", "dead")], None)  # it comes back, and takes nobody's turn away
    assert not await take(one, Held("a", "conv_1", "third"))
    await other.move([Held("a", "conv_1", "next")], None)
    assert await take(one, Held("a", "conv_1", "third"))
    with pytest.raises(NotStoredError):
        await take(one, Held("b", "conv_1", "stranger"))
    clock.now += 21
    await first.purge()
    assert await take(other, Held("a", "conv_1", "last"))
    await Conversations(first).delete("a", "conv_1")


async def test_only_one_of_many_gets_the_turn(opener, shared_url: str) -> None:
    opened = [await opener(shared_url) for _ in range(3)]
    await begin(opened[0])
    stores = [await each.backend() for each in opened]
    taken = await asyncio.gather(*(take(store, Held("a", "conv_1", f"h{n}")) for n, store in enumerate(stores * 4)))
    assert sum(taken) == 1


async def test_a_conversation_that_is_being_answered_makes_no_room(opener, store_url: str) -> None:
    store = await opener(store_url, max_records=2)
    await begin(store, "conv_1", message("msg_1"))
    async with store.turn("a", "conv_1"):
        for name in ("conv_2", "conv_3", "conv_4"):
            await begin(store, name)
        assert await ids(store) == ["msg_1"]
