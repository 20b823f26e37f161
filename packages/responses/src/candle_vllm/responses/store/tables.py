# SPDX-License-Identifier: MIT
"""The tables of a store in a database, and the migration of version 1.

Version 1 had separate tables for the mailbox, for responses, and for turns. A store of version 1 is copied to the
tables below in one transaction when it is opened, and servers of version 1 refuse it from then on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    column,
    func,
    insert,
    select,
    table,
)

from candle_vllm.responses.store.entries import CONVERSATION, MAX_ID, OVERHEAD, RESPONSE

VERSION = 2
_Key = BigInteger().with_variant(Integer(), "sqlite")  # the only type for which SQLite assigns row numbers
_AT_ONCE = 100  # rows that one statement copies


class Tables:
    """The tables whose names begin with `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.all = MetaData()
        self.head = Table(
            f"{name}_schema",
            self.all,
            Column("version", Integer, primary_key=True),
            Column("salt", LargeBinary, nullable=False),  # of the hashes of keys
        )
        self.entries = Table(
            f"{name}_entries",
            self.all,
            Column("number", _Key, primary_key=True, autoincrement=True),  # the order of lists
            Column("owner", String(64), nullable=False),
            Column("id", String(MAX_ID), nullable=False),
            Column("kind", String(20), nullable=False),
            Column("status", String(20), nullable=False),
            Column("created", BigInteger, nullable=False),  # this and the other times: ms since 1970
            Column("used", BigInteger, nullable=False),  # the longest unused are dropped first
            Column("expires", BigInteger),  # NULL: never
            Column("lease", BigInteger),  # end of the holder's lease; NULL: no lease
            Column("holder", String(MAX_ID)),
            Column("follows", String(MAX_ID)),
            Column("size", BigInteger, nullable=False),  # bytes, parts included
            Column("about", LargeBinary, nullable=False),  # JSON
            Column("body", LargeBinary, nullable=False),
            Column("given", LargeBinary, nullable=False),
            UniqueConstraint("owner", "id"),
            Index(f"{name}_entries_size", "owner", "size"),
            Index(f"{name}_entries_expires", "expires"),
            Index(f"{name}_entries_lease", "lease"),
        )
        self.parts = Table(
            f"{name}_parts",
            self.all,
            Column("number", _Key, primary_key=True, autoincrement=True),  # the order of parts
            Column("entry", _Key, ForeignKey(self.entries.c.number, ondelete="CASCADE"), nullable=False),
            Column("id", String(MAX_ID), nullable=False),
            Column("size", BigInteger, nullable=False),
            Column("body", LargeBinary, nullable=False),
            UniqueConstraint("entry", "id"),
        )
        self.names = Table(  # names of the entries' contents
            f"{name}_names",
            self.all,
            Column("number", _Key, primary_key=True, autoincrement=True),
            Column("entry", _Key, ForeignKey(self.entries.c.number, ondelete="CASCADE"), nullable=False, index=True),
            Column("name", String(MAX_ID), nullable=False, index=True),
        )

    @property
    def lock(self) -> int:
        """Number of the advisory lock, by which servers that start together create the tables one after the other."""
        return int.from_bytes(self.name[:4].encode(), "big")


@cache
def tables_of(name: str) -> Tables:
    """Return the tables of a store."""
    return Tables(name)


# ---- version 1 -------------------------------------------------------------------------------------------------------

_RESPONSES = table(
    "responses_records",
    *(column(name) for name in (
        "number", "owner", "id", "conversation", "created", "used", "expires", "lease", "size", "status", "background",
        "previous_id", "conversation_id", "body", "input_items",
    )),
)  # fmt: skip
_ITEMS = table("responses_items", *(column(name) for name in ("number", "record", "id", "size", "body")))
_PLACES = table("responses_places", *(column(name) for name in ("number", "record", "item")))
_ANSWERS = table(
    "mailbox_records",
    *(column(name) for name in (
        "id", "owner", "request_id", "delivery_id", "model", "created", "expires", "status", "listed", "response",
        "push_at", "push_attempts", "push_url", "push_bearer",
    )),
)  # fmt: skip


def from_version_1(connection: Connection, new: Tables) -> None:
    """Move the data of the tables of version 1 to these, whose names have the same prefix."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.set_config("statement_timeout", "0", True)))
    if new.name == "responses":
        _copy(connection, new, _RESPONSES.c.number, _response)
        connection.execute(insert(new.parts).from_select(["number", "entry", "id", "size", "body"], select(_ITEMS)))
        connection.execute(insert(new.names).from_select(["number", "entry", "name"], select(_PLACES)))
        old = ("responses_turns", "responses_places", "responses_items", "responses_records")  # turns end in 20 s
    else:
        _copy(connection, new, _ANSWERS.c.id, _answer)
        old = ("mailbox_records",)
    for name in old:
        connection.exec_driver_sql(f"DROP TABLE {name}")
    if connection.dialect.name == "postgresql":
        for each in (new.entries, new.parts, new.names):  # rows have their old numbers: new ones must be larger
            last = select(func.max(each.c.number)).scalar_subquery()
            connection.execute(select(func.setval(func.pg_get_serial_sequence(each.name, "number"), last)))


def _copy(connection: Connection, new: Tables, number: Any, made_of: Any) -> None:
    last = -1
    while True:
        query = select(number.table).where(number > last).order_by(number).limit(_AT_ONCE)
        rows = [made_of(row) for row in connection.execute(query)]
        if not rows:
            return
        connection.execute(insert(new.entries), rows)
        last = rows[-1]["number"]


def _response(row: Any) -> dict[str, Any]:
    about = {"background": bool(row.background), "conversation": row.conversation_id}
    return {
        "number": row.number, "owner": row.owner, "id": row.id, "kind": CONVERSATION if row.conversation else RESPONSE,
        "status": row.status, "created": row.created * 1000, "used": row.used, "expires": row.expires,
        "lease": row.lease, "holder": row.id if row.lease else None, "follows": row.previous_id, "size": row.size,
        "about": msgspec.json.encode({} if row.conversation else about), "body": row.body, "given": row.input_items,
    }  # fmt: skip


def _answer(row: Any) -> dict[str, Any]:
    about = {"model": row.model, "attempts": row.push_attempts, "url": row.push_url, "bearer": row.push_bearer}
    return {
        "number": row.id, "owner": row.owner, "id": row.request_id, "kind": "answer" if row.listed else "push",
        "status": row.status, "created": row.created, "used": row.created, "expires": row.expires,
        "lease": row.expires if row.status == "streaming" else row.push_at, "holder": row.delivery_id, "follows": None,
        "size": len(row.response or b"") + OVERHEAD, "about": msgspec.json.encode(about), "body": row.response or b"",
        "given": b"",
    }  # fmt: skip
