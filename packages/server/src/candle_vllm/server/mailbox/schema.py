"""The mailbox's tables, how they are made, and the connection to SQLite or PostgreSQL."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    make_url,
    select,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, OperationalError

from candle_vllm.server.kinds import UsageError
from candle_vllm.server.mailbox.record import MAX_ID, MAX_MODEL

VERSION = 1
BUSY_SECONDS = 5  # that a statement waits for another writer, or a connection for the server
_STATEMENT_MS = 10_000
_ATTEMPTS = 10  # to open an SQLite file that others open as well
_PAUSE_SECONDS = 0.1
_LOCK = 0x6D61696C  # servers that start together make the tables one after the other

_metadata = MetaData()
_Key = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows itself in this type only

schema = Table(
    "mailbox_schema",
    _metadata,
    Column("version", Integer, primary_key=True),
    Column("salt", LargeBinary, nullable=False),  # of the hashes of keys
)

records = Table(
    "mailbox_records",
    _metadata,
    Column("id", _Key, primary_key=True, autoincrement=True),  # the order of the list
    Column("owner", String(64), nullable=False),
    Column("request_id", String(MAX_ID), nullable=False),
    Column("delivery_id", String(32), nullable=False),  # by which a receiver knows a push that comes twice
    Column("model", String(MAX_MODEL), nullable=False),
    Column("created", BigInteger, nullable=False),  # this and the other times: ms since 1970
    Column("expires", BigInteger, nullable=False),
    Column("status", String(20), nullable=False),
    Column("listed", Boolean, nullable=False),  # False: kept for its push alone
    Column("response", LargeBinary),
    Column("push_at", BigInteger),  # when it is pushed next, or when the lease of who pushes it ends; NULL: never
    Column("push_attempts", Integer, nullable=False),
    Column("push_url", String(2048)),  # NULL: the operator's
    Column("push_bearer", String(1024)),
    UniqueConstraint("owner", "request_id"),
    Index("mailbox_records_expires", "expires"),
    Index("mailbox_records_push_at", "push_at"),
)


def connect(text: str) -> Engine:
    """An engine for `sqlite:///path` or `postgresql://...`; nothing is opened yet.

    Raises:
        UsageError: another URL, or PostgreSQL without its driver. The URL is not repeated: it may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise UsageError("mailbox must be sqlite:///path or postgresql://user:password@host/database") from None
    if url.drivername == "sqlite":
        return _sqlite(url)
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _postgresql(url)
    raise UsageError(f"mailbox must be sqlite:///path or postgresql://..., not {url.drivername!r:.40}")


def prepare(engine: Engine) -> bytes:
    """Makes the tables where there are none; the salt of the hashes of keys.

    Raises:
        UsageError: another version made them.
    """
    for _ in range(_ATTEMPTS - 1 if engine.dialect.name == "sqlite" else 0):
        try:
            return _prepare(engine)
        except OperationalError:  # SQLite waits for no one while a file becomes a WAL file
            time.sleep(_PAUSE_SECONDS)
    return _prepare(engine)


def _prepare(engine: Engine) -> bytes:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        _metadata.create_all(connection)
        row = connection.execute(select(schema.c.version, schema.c.salt)).first()
        if row is None:
            salt = secrets.token_bytes(32)
            connection.execute(insert(schema).values(version=VERSION, salt=salt))
            return salt
        if row.version != VERSION:
            raise UsageError(
                f"the mailbox was made by another version of the server (its tables have version {row.version}, this "
                f"one reads {VERSION}): give another --mailbox, or use that version"
            )
        return bytes(row.salt)


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.query or url.host:
        raise UsageError("mailbox must name a file: sqlite:///folder/mailbox.sqlite, with four slashes from the root")
    path = Path(url.database).expanduser()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # other users read no answers
    except OSError as error:
        raise UsageError(f"cannot write the mailbox {path}: {error.strerror}") from None
    engine = create_engine(url.set(database=str(path)), connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)
    event.listen(engine, "connect", _settle_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _settle_sqlite(connection: Any, _: Any) -> None:
    # Readers do not wait for the writer; a crash of the machine may cost the last answers, not the file; and what
    # is deleted is overwritten. SQLite takes these settings in no other form.
    connection.isolation_level = None  # the driver begins no transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    """What reads and then writes waits for other processes at once, and is not refused in the middle."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _postgresql(url: URL) -> Engine:
    try:
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=1,
            max_overflow=0,
            pool_timeout=BUSY_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"connect_timeout": BUSY_SECONDS, "options": f"-c statement_timeout={_STATEMENT_MS}"},
        )
    except ModuleNotFoundError:
        raise UsageError(
            "a mailbox in PostgreSQL needs its driver: install candle-vllm-server with the extra postgres"
        ) from None
