# SPDX-License-Identifier: MIT
"""The tables of a store in a database, and the migration from version 1.

Version 1 had separate tables for the mailbox, for responses, and for turns. When a store of version 1 is opened, it is
moved to the tables below in one transaction; servers of version 1 refuse it from then on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import sqlalchemy as sa

from candle_vllm.responses.store.entries import CONVERSATION, MAX_ID, OVERHEAD, RESPONSE

VERSION = 2
_Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # the only type for which SQLite assigns row numbers
_AT_ONCE = 100  # rows that one statement copies


class Tables:
    """The tables whose names begin with `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.all = sa.MetaData()
        self.head = sa.Table(
            f"{name}_schema",
            self.all,
            sa.Column("version", sa.Integer, primary_key=True),
            sa.Column("salt", sa.LargeBinary, nullable=False),  # salt of the hashes of API keys
        )
        self.entries = sa.Table(
            f"{name}_entries",
            self.all,
            sa.Column("number", _Key, primary_key=True, autoincrement=True),  # lists are in the order of this column
            sa.Column("owner", sa.String(64), nullable=False),
            sa.Column("id", sa.String(MAX_ID), nullable=False),
            sa.Column("kind", sa.String(20), nullable=False),
            sa.Column("status", sa.String(20), nullable=False),
            sa.Column("created", sa.BigInteger, nullable=False),  # all times are ms since 1970
            sa.Column("used", sa.BigInteger, nullable=False),  # entries that were used least recently are dropped first
            sa.Column("expires", sa.BigInteger),  # NULL means never
            sa.Column("lease", sa.BigInteger),  # end of the holder's lease; NULL means no lease
            sa.Column("holder", sa.String(MAX_ID)),
            sa.Column("follows", sa.String(MAX_ID)),
            sa.Column("size", sa.BigInteger, nullable=False),  # bytes, including its parts
            sa.Column("about", sa.LargeBinary, nullable=False),  # JSON
            sa.Column("body", sa.LargeBinary, nullable=False),
            sa.Column("given", sa.LargeBinary, nullable=False),
            sa.UniqueConstraint("owner", "id"),
            sa.Index(f"{name}_entries_size", "owner", "size"),
            sa.Index(f"{name}_entries_expires", "expires"),
            sa.Index(f"{name}_entries_lease", "lease"),
        )
        self.parts = sa.Table(
            f"{name}_parts",
            self.all,
            sa.Column("number", _Key, primary_key=True, autoincrement=True),  # parts are in the order of this column
            sa.Column("entry", _Key, sa.ForeignKey(self.entries.c.number, ondelete="CASCADE"), nullable=False),
            sa.Column("id", sa.String(MAX_ID), nullable=False),
            sa.Column("size", sa.BigInteger, nullable=False),
            sa.Column("body", sa.LargeBinary, nullable=False),
            sa.UniqueConstraint("entry", "id"),
        )
        self.names = sa.Table(  # `names` of `SqlBackend.put`
            f"{name}_names",
            self.all,
            sa.Column("number", _Key, primary_key=True, autoincrement=True),
            sa.Column(
                "entry", _Key, sa.ForeignKey(self.entries.c.number, ondelete="CASCADE"), nullable=False, index=True
            ),
            sa.Column("name", sa.String(MAX_ID), nullable=False, index=True),
        )

    @property
    def lock(self) -> int:
        """Number of PostgreSQL's advisory lock with which servers that start together create the tables in turn."""
        return int.from_bytes(self.name[:4].encode(), "big")


@cache
def tables_of(name: str) -> Tables:
    """Return the tables of a store."""
    return Tables(name)


# ---- version 1 -------------------------------------------------------------------------------------------------------

_RESPONSES = sa.table(
    "responses_records",
    *(sa.column(name) for name in (
        "number", "owner", "id", "conversation", "created", "used", "expires", "lease", "size", "status", "background",
        "previous_id", "conversation_id", "body", "input_items",
    )),
)  # fmt: skip
_ITEMS = sa.table("responses_items", *(sa.column(name) for name in ("number", "record", "id", "size", "body")))
_PLACES = sa.table("responses_places", *(sa.column(name) for name in ("number", "record", "item")))
_ANSWERS = sa.table(
    "mailbox_records",
    *(sa.column(name) for name in (
        "id", "owner", "request_id", "delivery_id", "model", "created", "expires", "status", "listed", "response",
        "push_at", "push_attempts", "push_url", "push_bearer",
    )),
)  # fmt: skip


def from_version_1(connection: sa.Connection, new: Tables) -> None:
    """Move the data of version 1's tables to these tables, whose names have the same prefix."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.set_config("statement_timeout", "0", True)))
    if new.name == "responses":
        _copy(connection, new, _RESPONSES.c.number, _response)
        connection.execute(
            sa.insert(new.parts).from_select(["number", "entry", "id", "size", "body"], sa.select(_ITEMS))
        )
        connection.execute(sa.insert(new.names).from_select(["number", "entry", "name"], sa.select(_PLACES)))
        old = ("responses_turns", "responses_places", "responses_items", "responses_records")  # turns expire in 20 s
    else:
        _copy(connection, new, _ANSWERS.c.id, _answer)
        old = ("mailbox_records",)
    for name in old:
        connection.exec_driver_sql(f"DROP TABLE {name}")
    if connection.dialect.name == "postgresql":
        for each in (new.entries, new.parts, new.names):  # rows keep their numbers, so new numbers must be larger
            last = sa.select(sa.func.max(each.c.number)).scalar_subquery()
            connection.execute(sa.select(sa.func.setval(sa.func.pg_get_serial_sequence(each.name, "number"), last)))


def _copy(connection: sa.Connection, new: Tables, number: Any, made_of: Any) -> None:
    last = -1
    while True:
        query = sa.select(number.table).where(number > last).order_by(number).limit(_AT_ONCE)
        rows = [made_of(row) for row in connection.execute(query)]
        if not rows:
            return
        connection.execute(sa.insert(new.entries), rows)
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
