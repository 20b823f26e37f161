# SPDX-License-Identifier: MIT
"""A database, SQLite or PostgreSQL, with one connection in one thread. Each call is one transaction.

Version 1 had separate tables for the mailbox, for responses, and for turns. When a store of version 1 is opened, it is
moved to the tables below in one transaction; servers of version 1 refuse it from then on.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, StaticPool, create_engine, event, func, insert, make_url, update
from sqlalchemy import select as select_rows
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from candle_vllm.core.errors import ConfigError, EngineOverloadedError, NotReadyError, with_extra
from candle_vllm.openai.fair_threads import FairThreads
from candle_vllm.responses.store.backend import MEMORY, Place, wrong_url
from candle_vllm.responses.store.entries import CONVERSATION, MAX_ID, OVERHEAD, RESPONSE, StoreUnavailableError

logger = logging.getLogger(__name__)

_FULL = "database or disk is full"  # SQLite's message

WAIT_SECONDS = 20.0  # a call waits this long for its result, including the time in the queue
BUSY_SECONDS = 5  # a statement waits this long for another writer, or a connection for the server
_STATEMENT_MS = 10_000
_ATTEMPTS = 10  # to open an SQLite file that other processes open at the same time
_PAUSE_SECONDS = 0.1

P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """One connection in a thread of its own, for which at most `max_waiting` calls wait.

    One API key has at most half of these calls. The keys take turns.
    """

    def __init__(self, place: Place, tables: Tables, max_waiting: int) -> None:
        self._place = place
        self._tables = tables
        self._engine: Engine | None = None
        self._salt = b""
        self._thread = FairThreads(place.title, 1, max_waiting)

    async def open(self) -> None:
        """Connect, and create or migrate tables; ConfigError, or NotReadyError if the database is not available."""
        engine = connect_to(self._place)
        try:
            self._salt = await self._thread.run(partial(prepare, engine, self._place, self._tables))
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            kind = NotReadyError if isinstance(error, OperationalError) else ConfigError
            raise kind(f"cannot open the {self._place.title}: {cause:.300}", self._place.setting) from None
        finally:
            if not self._salt:
                engine.dispose()
        self._engine = engine

    async def close(self) -> None:
        """Wait for the running call, drop the waiting calls, and disconnect."""
        await self._thread.close()
        if self._engine is not None:
            self._engine.dispose()

    def owner(self, key: str) -> str:
        """Return the owner of an API key's data: its keyed hash in hex. Without keys (""), all share one owner."""
        return hmac.new(self._salt, key.encode(), hashlib.sha256).hexdigest()

    async def run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` in the thread, in a transaction, and return its result.

        Raises StoreUnavailableError if the database is closed, fails, or takes too long.
        """
        if (engine := self._engine) is None:
            raise self._busy()

        def transaction() -> T:
            with engine.begin() as connection:
                return work(connection, *args, **kwargs)

        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return await self._thread.run(transaction)
        except (SQLAlchemyError, TimeoutError, EngineOverloadedError) as error:
            if (cause := str(getattr(error, "orig", None) or "")) == _FULL:
                logger.error("the %s cannot be written: %s", self._place.title, cause)
                raise StoreUnavailableError(
                    f"The {self._place.title} cannot be written: its disk is full.", self._place.setting
                ) from None
            raise self._busy() from error

    def _busy(self) -> StoreUnavailableError:
        title, setting = self._place.title, self._place.setting
        return StoreUnavailableError(f"The {title} is busy or cannot be reached: try again later.", setting)


def connect_to(place: Place) -> Engine:
    """Return an engine for `memory` or the URL of an SQL database, without connecting; create the file for SQLite.

    Raises ConfigError if the URL is invalid, the file cannot be written, or a driver is missing.
    """
    if place.url == MEMORY:
        return _watched(
            create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False},
                          hide_parameters=True)
        )  # fmt: skip
    try:
        url = make_url(place.url)
    except (ArgumentError, ValueError):
        raise wrong_url(place) from None
    return _sqlite(url, place) if url.drivername == "sqlite" else _postgresql(url, place)


def prepare(engine: Engine, place: Place, tables: Tables) -> bytes:
    """Create missing tables, and migrate old ones; return the salt for hashes of API keys.

    Raises ConfigError if the tables have a version that this server cannot read.
    """
    for _ in range(_ATTEMPTS - 1 if engine.dialect.name == "sqlite" else 0):
        try:
            return _prepare(engine, place, tables)
        except OperationalError:  # SQLite does not wait for locks while it changes a file to WAL mode
            time.sleep(_PAUSE_SECONDS)
    return _prepare(engine, place, tables)


def _prepare(engine: Engine, place: Place, tables: Tables) -> bytes:
    head = tables.head
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select_rows(func.pg_advisory_xact_lock(tables.lock)))
        tables.all.create_all(connection)
        row = connection.execute(select_rows(head.c.version, head.c.salt)).first()
        if row is None:
            salt = secrets.token_bytes(32)
            connection.execute(insert(head).values(version=VERSION, salt=salt))
            return salt
        if row.version == 1:
            from_version_1(connection, tables)
            connection.execute(update(head).values(version=VERSION))
        elif row.version != VERSION:
            flag = "--" + place.setting.replace("_", "-")
            raise ConfigError(
                f"the {place.title} was written by another version of the server (its tables have version "
                f"{row.version}, this one reads {VERSION}): give another {flag}, or use that version",
                place.setting,
            )
        return bytes(row.salt)


def _sqlite(url: URL, place: Place) -> Engine:
    if not url.database or url.database == ":memory:" or url.query or url.host:
        name = place.title.replace(" ", "-")
        raise ConfigError(
            f"{place.setting} must name a file: sqlite:///folder/{name}.sqlite, with four slashes from the root",
            place.setting,
        )
    path = Path(url.database)
    try:
        path = path.expanduser()
        if not path.parent.parent.is_dir():  # creating more than one folder would hide a typing error
            raise ConfigError(
                f"cannot write the {place.title} {path}: there is no folder {path.parent.parent}; make it, or name "
                "another file",
                place.setting,
            )
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            logger.warning("created the folder %s for the %s", path.parent, place.title)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # other users cannot read the answers
    except (OSError, RuntimeError, ValueError) as error:  # "~" names an unknown user, or the path has a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot write the {place.title} {path}: {reason}", place.setting) from None
    made = create_engine(url.set(database=str(path)), connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)
    return _watched(made)


def _watched(engine: Engine) -> Engine:
    event.listen(engine, "connect", _configure_sqlite)
    # This takes the write lock at once: SQLite refuses it later if another transaction has written in the meantime.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _configure_sqlite(connection: Any, _: Any) -> None:
    # A crash of the machine may lose the last transactions, but does not damage the file; deleted data is overwritten.
    connection.isolation_level = None  # the driver begins no transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _postgresql(url: URL, place: Place) -> Engine:
    try:
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=1,
            max_overflow=0,
            pool_timeout=BUSY_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={
                "connect_timeout": BUSY_SECONDS,
                "options": f"-c statement_timeout={_STATEMENT_MS}",
                # A server that vanishes without closing the connection would hold the thread for up to two hours.
                "tcp_user_timeout": _STATEMENT_MS,
                "keepalives_idle": BUSY_SECONDS,
                "keepalives_interval": BUSY_SECONDS,
                "keepalives_count": 2,
            },
        )
    except ModuleNotFoundError:
        raise ConfigError(
            f"a {place.title} in PostgreSQL needs its driver: {with_extra('postgres')}",
            place.setting,
        ) from None


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
