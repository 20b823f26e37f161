"""Conversations in the store, on SQLite and on a real PostgreSQL: items, pages, owners, bounds, order."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.store.backend import Held
from candle_vllm.responses.store.entries import NotStoredError, StoreLimitError
from candle_vllm.responses.store.response_store import ResponseStore


def message(name: str | None, text: str = "Hi") -> dict[str, Any]:
    made = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    return made if name is None else {"id": name, **made}


async def begin(store: ResponseStore, name: str = "conv_1", *items: dict[str, Any], owner: str = "a") -> None:
    await store.create_conversation(owner, name, b'{"k":"v"}', items)


async def ids(store: ResponseStore, name: str = "conv_1", owner: str = "a") -> list[str]:
    return [item["id"] for item in await store.items(owner, name)]


async def test_a_conversation_comes_back_as_it_went(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1", "größe"), message(None))
    found = await store.conversation("a", "conv_1")
    assert (found.id, found.created, found.body) == ("conv_1", store.now, b'{"k":"v"}')
    first, second = await store.items("a", "conv_1")
    assert first == message("msg_1", "größe")
    assert second["id"].startswith("msg_")
    assert msgspec.json.decode((await store.item("a", "conv_1", second["id"])).body) == second
    assert (await store.find_items("a", ["msg_1"]))["msg_1"] == first


async def test_metadata_is_replaced(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store)
    for metadata in (b'{"a":"' + b"x" * 500 + b'"}', b"{}"):
        assert (await store.describe_conversation("a", "conv_1", metadata)).body == metadata
        assert (await store.conversation("a", "conv_1")).body == metadata


async def test_another_owner_sees_and_changes_nothing(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1"))
    for work in (
        store.conversation("b", "conv_1"), store.describe_conversation("b", "conv_1", b"{}"),
        store.delete_conversation("b", "conv_1"), store.append("b", "conv_1", [message(None)]),
        store.page("b", "conv_1", limit=1, order="asc"), store.items("b", "conv_1"),
        store.item("b", "conv_1", "msg_1"), store.delete_item("b", "conv_1", "msg_1"),
    ):  # fmt: skip
        with pytest.raises(NotStoredError, match="Conversation with id 'conv_1' was not found") as error:
            await work
        assert error.value.param == "conversation_id"
    assert await store.find_items("b", ["msg_1"]) == {}
    assert await ids(store) == ["msg_1"]


async def test_a_conversation_is_no_response_and_a_response_no_conversation(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store)
    with pytest.raises(NotStoredError):
        await store.get("a", "conv_1")
    with pytest.raises(NotStoredError):
        await store.delete("a", "conv_1")
    assert await ids(store) == []


async def test_pages_go_both_ways(opener, store_url: str) -> None:
    store = await opener(store_url)
    names = [f"msg_{number}" for number in range(7)]
    await begin(store, "conv_1", *(message(name) for name in names))
    await begin(store, "conv_2", message("other"))
    for order, expected in (("asc", names), ("desc", names[::-1])):
        seen: list[str] = []
        after = None
        for more in (True, True, False):
            items, has_more = await store.page("a", "conv_1", limit=3, order=order, after=after)
            assert has_more is more
            seen += [item.id for item in items]
            after = seen[-1]
        assert seen == expected
        assert not (await store.page("a", "conv_1", limit=7, order=order))[1]
    for wrong in ("nothing", "other", "", "x\0"):
        with pytest.raises(InvalidParameterError, match="after must be the id of an item"):
            await store.page("a", "conv_1", limit=3, order="asc", after=wrong)


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
    assert b"two" in (await store.item("a", "conv_2", "msg_1")).body


async def test_deleting(opener, store_url: str) -> None:
    store = await opener(store_url)
    await begin(store, "conv_1", message("msg_1"), message("msg_2"))
    assert (await store.delete_item("a", "conv_1", "msg_1")).id == "conv_1"
    for work in (store.item("a", "conv_1", "msg_1"), store.delete_item("a", "conv_1", "msg_1")):
        with pytest.raises(NotStoredError, match="Conversation item with id 'msg_1'") as error:
            await work
        assert error.value.param == "item_id"
    assert await ids(store) == ["msg_2"]
    await store.delete_conversation("a", "conv_1")
    with pytest.raises(NotStoredError):
        await store.delete_conversation("a", "conv_1")
    await begin(store, "conv_1")
    assert await ids(store) == []


async def test_items_and_conversations_are_bounded(opener, store_url: str) -> None:
    store = await opener(store_url, max_item_bytes=2000, max_items=3, max_conversation_bytes=5000)
    await begin(store)
    with pytest.raises(StoreLimitError, match=r"items\.1 has \d+ bytes as JSON; at most 2000") as error:
        await store.append("a", "conv_1", [message(None), message(None, "x" * 2000)])
    assert error.value.param == "items.1"
    await store.append("a", "conv_1", [message(None), message(None)])
    with pytest.raises(StoreLimitError, match="conversation is full") as error:
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
        await store.conversation("a", "conv_2")
    with pytest.raises(StoreLimitError, match="full"):
        await store.append("a", "conv_1", [message(None, "x" * 4000)])
    assert len(await ids(store)) == 5
    for item in await ids(store):
        await store.delete_item("a", "conv_1", item)
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


async def test_conversations_do_not_expire(opener, store_url: str, clock) -> None:
    store = await opener(store_url, retention_days=1)
    await begin(store)
    clock.now += 100 * 86_400
    assert await store.purge() == 0
    assert await store.conversation("a", "conv_1")


async def test_one_holder_at_a_time_answers_in_a_conversation(opener, shared_url: str, clock) -> None:
    one, other = await opener(shared_url), await opener(shared_url)
    await begin(one)
    assert await one.take_turn(Held("a", "conv_1", "dead"))
    assert not await other.take_turn(Held("a", "conv_1", "next"))
    clock.now += 19
    await one.keep_turn(Held("a", "conv_1", "dead"))
    clock.now += 19
    assert not await other.take_turn(Held("a", "conv_1", "next"))
    clock.now += 2
    assert await other.take_turn(Held("a", "conv_1", "next"))
    await one.leave_turn(Held("a", "conv_1", "dead"))  # it comes back, and takes nobody's turn away
    assert not await one.take_turn(Held("a", "conv_1", "third"))
    await other.leave_turn(Held("a", "conv_1", "next"))
    assert await one.take_turn(Held("a", "conv_1", "third"))
    with pytest.raises(NotStoredError):
        await one.take_turn(Held("b", "conv_1", "stranger"))
    clock.now += 21
    await one.purge()
    assert await other.take_turn(Held("a", "conv_1", "last"))
    await other.delete_conversation("a", "conv_1")


async def test_only_one_of_many_gets_the_turn(opener, shared_url: str) -> None:
    stores = [await opener(shared_url) for _ in range(3)]
    await begin(stores[0])
    taken = await asyncio.gather(*(store.take_turn(Held("a", "conv_1", f"h{n}")) for n, store in enumerate(stores * 4)))
    assert sum(taken) == 1


async def test_a_conversation_that_is_being_answered_makes_no_room(opener, shared_url: str) -> None:
    store = await opener(shared_url, max_records=2)
    await begin(store, "conv_1", message("msg_1"))
    assert await store.take_turn(Held("a", "conv_1", "h"))
    for name in ("conv_2", "conv_3", "conv_4"):
        await begin(store, name)
    assert await ids(store) == ["msg_1"]
