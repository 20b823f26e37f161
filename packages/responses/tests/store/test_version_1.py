# SPDX-License-Identifier: MIT
"""Stores that servers with tables of version 1 left behind: nothing of them is lost, and they are used as before."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    insert,
    inspect,
    select,
)

from candle_vllm.responses.api.conversations import ConversationCreateRequest, Conversations
from candle_vllm.responses.store.backend import Bounds, Held, Place, StoreOptions
from candle_vllm.responses.store.database import VERSION, connect_to, tables_of
from candle_vllm.responses.store.entries import CONVERSATION, Entry
from candle_vllm.responses.store.sql import SqlBackend

NOW = 1_700_000_000_000
HOUR = 3_600_000
_Key = BigInteger().with_variant(Integer(), "sqlite")
OUTPUT = b'{"id":"%b","status":"%b","output":[{"type":"message","id":"msg_out_%b"}]}'
INPUT = b'[{"type":"message","id":"msg_in_%b"}]'


def _head(name: str, tables: MetaData) -> Table:
    return Table(
        f"{name}_schema",
        tables,
        Column("version", Integer, primary_key=True),
        Column("salt", LargeBinary, nullable=False),
    )


def _responses() -> dict[str, Table]:
    """The tables of responses and conversations as version 1 made them."""
    tables = MetaData()
    _head("responses", tables)
    Table(
        "responses_records",
        tables,
        Column("number", _Key, primary_key=True, autoincrement=True),
        Column("owner", String(64), nullable=False),
        Column("id", String(256), nullable=False),
        Column("conversation", Boolean, nullable=False),
        Column("created", BigInteger, nullable=False),
        Column("used", BigInteger, nullable=False),
        Column("expires", BigInteger),
        Column("lease", BigInteger),
        Column("size", BigInteger, nullable=False),
        Column("status", String(20), nullable=False),
        Column("background", Boolean, nullable=False),
        Column("previous_id", String(256)),
        Column("conversation_id", String(256)),
        Column("body", LargeBinary, nullable=False),
        Column("input_items", LargeBinary, nullable=False),
        UniqueConstraint("owner", "id"),
        Index("responses_records_size", "owner", "size"),
        Index("responses_records_expires", "expires"),
        Index("responses_records_lease", "lease"),
    )
    key = "responses_records.number"
    Table(
        "responses_items",
        tables,
        Column("number", _Key, primary_key=True, autoincrement=True),
        Column("record", _Key, ForeignKey(key, ondelete="CASCADE"), nullable=False),
        Column("id", String(256), nullable=False),
        Column("size", BigInteger, nullable=False),
        Column("body", LargeBinary, nullable=False),
        UniqueConstraint("record", "id"),
    )
    Table(
        "responses_places",
        tables,
        Column("number", _Key, primary_key=True, autoincrement=True),
        Column("record", _Key, ForeignKey(key, ondelete="CASCADE"), nullable=False, index=True),
        Column("item", String(256), nullable=False, index=True),
    )
    Table(
        "responses_turns",
        tables,
        Column("record", _Key, ForeignKey(key, ondelete="CASCADE"), primary_key=True),
        Column("holder", String(256), nullable=False, index=True),
        Column("until", BigInteger, nullable=False),
    )
    return dict(tables.tables)


def _answers() -> dict[str, Table]:
    """The tables of the mailbox as version 1 made them."""
    tables = MetaData()
    _head("mailbox", tables)
    Table(
        "mailbox_records",
        tables,
        Column("id", _Key, primary_key=True, autoincrement=True),
        Column("owner", String(64), nullable=False),
        Column("request_id", String(256), nullable=False),
        Column("delivery_id", String(32), nullable=False),
        Column("model", String(512), nullable=False),
        Column("created", BigInteger, nullable=False),
        Column("expires", BigInteger, nullable=False),
        Column("status", String(20), nullable=False),
        Column("listed", Boolean, nullable=False),
        Column("response", LargeBinary),
        Column("push_at", BigInteger),
        Column("push_attempts", Integer, nullable=False),
        Column("push_url", String(2048)),
        Column("push_bearer", String(1024)),
        UniqueConstraint("owner", "request_id"),
        Index("mailbox_records_expires", "expires"),
        Index("mailbox_records_push_at", "push_at"),
    )
    return dict(tables.tables)


def _make(place: Place, tables: dict[str, Table], rows: dict[str, list[dict[str, Any]]]) -> None:
    engine = connect_to(place)
    with engine.begin() as connection:
        next(iter(tables.values())).metadata.create_all(connection)
        for name, values in {f"{place.name}_schema": [{"version": 1, "salt": b"s" * 32}], **rows}.items():
            connection.execute(insert(tables[name]), values)
    engine.dispose()


def _response(name: str, status: str = "completed", **fields: Any) -> dict[str, Any]:
    body, given = OUTPUT % (name.encode(), status.encode(), name.encode()), INPUT % name.encode()
    return {
        "owner": "a", "id": name, "conversation": False, "created": NOW // 1000, "used": NOW, "expires": NOW + HOUR,
        "lease": None, "size": len(body + given) + 512, "status": status, "background": False, "previous_id": None,
        "conversation_id": None, "body": body, "input_items": given, **fields,
    }  # fmt: skip


async def test_responses_and_conversations(opener, shared_url: str, clock) -> None:
    rows = [_response(f"old_{number}", previous_id=f"old_{number - 1}" if number else None) for number in range(250)]
    rows += [
        _response("resp_1", conversation_id="conv_1"),
        _response("resp_2", "in_progress", background=True, previous_id="resp_1", lease=NOW + 60_000),
        {**_response("conv_1", "", body=b'{"a":"b"}', input_items=b""), "conversation": True, "expires": None},
    ]
    last = len(rows)
    item = b'{"type":"message","id":"%b"}'
    made = {
        "responses_records": rows,
        "responses_items": [
            {"record": last, "id": name, "size": 600, "body": item % name.encode()} for name in ("msg_2", "msg_1")
        ],
        "responses_places": [{"record": last - 2, "item": f"msg_{way}_resp_1"} for way in ("in", "out")],
        "responses_turns": [{"record": last, "holder": "dead", "until": NOW + 10_000}],
    }
    _make(StoreOptions(url=shared_url).place, _responses(), made)
    first, second = await opener(shared_url), await opener(shared_url)
    assert await first.owner("key") == await second.owner("key")
    assert [item["id"] for item in await first.history("a", "old_249")][:3] == [
        "msg_in_old_0", "msg_out_old_0", "msg_in_old_1",
    ]  # fmt: skip
    found = await first.get("a", "resp_1")
    assert (found.created, found.expires, found.lease) == (NOW, NOW + HOUR, None)
    assert found.about == {"background": False, "conversation": "conv_1"}
    running = await first.get("a", "resp_2")
    assert (running.status, running.follows, running.about["background"]) == ("in_progress", "resp_1", True)
    assert await second.renew([("a", "resp_2")]) == set()
    conversation = await (await first.backend()).get(CONVERSATION, "a", "conv_1")
    assert conversation is not None
    assert (conversation.kind, conversation.body, conversation.expires) == (CONVERSATION, b'{"a":"b"}', None)
    assert [item["id"] for item in await first.conversation_items("a", "conv_1")] == ["msg_2", "msg_1"]
    assert set(await first.find_items("a", ["msg_1", "msg_out_resp_1"])) == {"msg_1", "msg_out_resp_1"}
    await first.append("a", "conv_1", [{"type": "message", "id": "new"}])  # numbers go on where they were
    await Conversations(first).create("a", ConversationCreateRequest())
    assert [item["id"] for item in await second.conversation_items("a", "conv_1")] == ["msg_2", "msg_1", "new"]
    clock.now += 61
    assert (await second.get("a", "resp_2")).status == "failed"


async def test_answers_and_their_pushes(shared_url: str, clock) -> None:
    def answer(name: str, **fields: Any) -> dict[str, Any]:
        made = {
            "owner": "a", "request_id": name, "delivery_id": f"d-{name}", "model": "m", "created": NOW, "listed": True,
            "expires": NOW + HOUR, "status": "completed", "response": b'{"id":1}', "push_at": None, "push_attempts": 0,
            "push_url": None, "push_bearer": None,
        }  # fmt: skip
        return {**made, **fields}

    push = {"push_at": NOW + 5000, "push_attempts": 2, "push_url": "http://h/", "push_bearer": "tok"}
    rows = [answer("done"), answer("begun", status="streaming", response=None), answer("push", listed=False, **push)]
    place = Place(shared_url, "mailbox", "mailbox", "mailbox")
    _make(place, _answers(), {"mailbox_records": rows})
    store = SqlBackend(place, Bounds(10), clock)
    await store.open()
    assert [entry.id for entry in await store.page("answer", "a", 10) or []] == ["begun", "done"]
    done = await store.get("answer", "a", "done")
    assert done == Entry(
        kind="answer", owner="a", id="done", created=NOW, status="completed", expires=NOW + HOUR, holder="d-done",
        about={"model": "m", "attempts": 0, "url": None, "bearer": None}, body=b'{"id":1}',
    )  # fmt: skip
    assert await store.claim_due(NOW + HOUR, ()) is None
    assert await store.next_due(()) == NOW + 5000
    clock.now += 5
    due = await store.claim_due(NOW + HOUR, ())
    assert due is not None
    assert due.about == {"model": "m", "attempts": 2, "url": "http://h/", "bearer": "tok"}
    assert await store.move([Held("a", "push", "d-push")], NOW + HOUR) == set()
    clock.now += 3600
    assert [entry.id for entry in await store.lapsed()] == ["begun"]
    await store.put(Entry(kind="answer", owner="a", id="new", created=NOW, about={"model": "m"}))
    await store.close()


@pytest.mark.parametrize("name", ["responses", "mailbox"])
async def test_what_is_up_to_date_stays_as_it_is_and_empty_stores_come_along(shared_url: str, clock, name: str) -> None:
    place = Place(shared_url, name, "store", "setting")
    _make(place, _responses() if name == "responses" else _answers(), {})
    for _ in range(2):
        store = SqlBackend(place, Bounds(10), clock)
        await store.open()
        await store.put(Entry(kind="answer", owner="a", id="one", created=NOW))
        await store.close()
    engine = connect_to(place)
    with engine.begin() as connection:
        assert connection.execute(select(tables_of(name).head.c.version)).scalar_one() == VERSION
        assert {each for each in inspect(connection).get_table_names() if "records" in each or "turns" in each} == set()
    engine.dispose()


async def test_a_step_that_fails_leaves_the_old_store(shared_url: str, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StoreOptions(url=shared_url).place
    _make(place, _responses(), {"responses_records": [_response("resp_1")]})

    def fails(*_: Any) -> None:
        raise ValueError("the machine goes off")

    with monkeypatch.context() as patch:
        patch.setattr("candle_vllm.responses.store.database._copy", fails)
        store = SqlBackend(place, Bounds(10), clock)
        with pytest.raises(ValueError, match="goes off"):
            await store.open()
        await store.close()
    store = SqlBackend(place, Bounds(10), clock)
    await store.open()
    assert await store.get("response", "a", "resp_1") is not None
    await store.close()
