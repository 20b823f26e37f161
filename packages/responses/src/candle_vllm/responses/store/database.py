"""A database behind one thread: SQLite or PostgreSQL, tables with a version, calls that are bounded in number and time.

One thread and one connection do all the work of a store, so there is one writer in each process. Every call is one
transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, MetaData, StaticPool, Table, create_engine, event, func, insert, make_url
from sqlalchemy import select as select_rows
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.store.errors import StoreUnavailableError

MAX_WAITING = 1024  # calls that wait for the thread
WAIT_SECONDS = 20.0  # that a call waits for its result
BUSY_SECONDS = 5  # that a statement waits for another writer, or a connection for the server
_STATEMENT_MS = 10_000
_ATTEMPTS = 10  # to open an SQLite file that others open as well
_PAUSE_SECONDS = 0.1

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The tables of one store.

    Attributes:
        title: what messages call the store.
        setting: the setting that holds its URL.
        tables: all of them.
        head: the one of these with `version` and `salt`, of one row.
        version: of the tables; those that another version made are refused.
        lock: a number of its own: servers that start together make the tables one after the other.
    """

    title: str
    setting: str
    tables: MetaData
    head: Table
    version: int
    lock: int


class Database:
    """One connection in a thread of its own.

    Args:
        layout: its tables.
        connect: makes the engine; called by `open`.
        max_waiting: calls that may wait for the thread.
    """

    def __init__(self, layout: Layout, connect: Callable[[], Engine], max_waiting: int = MAX_WAITING) -> None:
        self._layout = layout
        self._connect = connect
        self._engine: Engine | None = None
        self._salt = b""
        self._thread = ThreadPoolExecutor(1, "candle-vllm-" + layout.title.replace(" ", "-"))
        self._places = threading.BoundedSemaphore(max_waiting)

    async def open(self) -> None:
        """Connects and makes the tables where there are none; ConfigError when that cannot be."""
        engine = self._connect()
        try:
            opening = asyncio.get_running_loop().run_in_executor(self._thread, prepare, engine, self._layout)
            self._salt = await opening
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise ConfigError(f"cannot open the {self._layout.title}: {cause:.300}", self._layout.setting) from None
        finally:
            if not self._salt:
                engine.dispose()
        self._engine = engine

    async def close(self) -> None:
        """Waits for what is running; what still waits is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.shutdown)
        if self._engine is not None:
            self._engine.dispose()

    def owner(self, key: str) -> str:
        """An API key as this store knows it."""
        return owner_id(self._salt, key)

    async def run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns; it is called in the thread, inside a transaction that ends with it.

        Raises:
            StoreUnavailableError: the database is closed, fails, or takes too long.
        """
        if self._engine is None or not self._places.acquire(blocking=False):
            raise self._busy()
        try:
            future = self._thread.submit(_transaction, self._engine, work, *args, **kwargs)
        except RuntimeError:  # it is closed
            self._places.release()
            raise self._busy() from None
        future.add_done_callback(lambda _: self._places.release())
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return await asyncio.wrap_future(future)
        except (SQLAlchemyError, TimeoutError) as error:
            raise self._busy() from error

    def _busy(self) -> StoreUnavailableError:
        return StoreUnavailableError(f"The {self._layout.title} is busy or cannot be reached: try again later.")


def _transaction(engine: Engine, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    with engine.begin() as connection:
        return work(connection, *args, **kwargs)


def owner_id(salt: bytes, key: str) -> str:
    """A key as a store knows it: a keyed hash in hex, from which the key cannot be read back."""
    return hmac.new(salt, key.encode(), hashlib.sha256).hexdigest()


def connect_to(text: str, layout: Layout) -> Engine:
    """An engine for `sqlite:///path` or `postgresql://...`; nothing is opened yet.

    Raises:
        ConfigError: another URL, or PostgreSQL without its driver. The URL is not repeated: it may hold a password.
    """
    allowed = "sqlite:///path or postgresql://"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        message = f"{layout.setting} must be {allowed}user:password@host/database"
        raise ConfigError(message, layout.setting) from None
    if url.drivername == "sqlite":
        return _sqlite(url, layout)
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _postgresql(url, layout)
    raise ConfigError(f"{layout.setting} must be {allowed}..., not {url.drivername!r:.40}", layout.setting)


def connect_to_memory() -> Engine:
    """An engine for a database of this process alone, which ends with it."""
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}, hide_parameters=True
    )
    event.listen(engine, "connect", _settle_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def prepare(engine: Engine, layout: Layout) -> bytes:
    """Makes the tables where there are none; the salt of the hashes of keys.

    Raises:
        ConfigError: another version made them.
    """
    for _ in range(_ATTEMPTS - 1 if engine.dialect.name == "sqlite" else 0):
        try:
            return _prepare(engine, layout)
        except OperationalError:  # SQLite waits for no one while a file becomes a WAL file
            time.sleep(_PAUSE_SECONDS)
    return _prepare(engine, layout)


def _prepare(engine: Engine, layout: Layout) -> bytes:
    head = layout.head
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select_rows(func.pg_advisory_xact_lock(layout.lock)))
        layout.tables.create_all(connection)
        row = connection.execute(select_rows(head.c.version, head.c.salt)).first()
        if row is None:
            salt = secrets.token_bytes(32)
            connection.execute(insert(head).values(version=layout.version, salt=salt))
            return salt
        if row.version != layout.version:
            flag = "--" + layout.setting.replace("_", "-")
            raise ConfigError(
                f"the {layout.title} was made by another version of the server (its tables have version "
                f"{row.version}, this one reads {layout.version}): give another {flag}, or use that version",
                layout.setting,
            )
        return bytes(row.salt)


def _sqlite(url: URL, layout: Layout) -> Engine:
    if not url.database or url.database == ":memory:" or url.query or url.host:
        name = layout.title.replace(" ", "-")
        raise ConfigError(
            f"{layout.setting} must name a file: sqlite:///folder/{name}.sqlite, with four slashes from the root",
            layout.setting,
        )
    path = Path(url.database).expanduser()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # other users read no answers
    except OSError as error:
        raise ConfigError(f"cannot write the {layout.title} {path}: {error.strerror}", layout.setting) from None
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


def _postgresql(url: URL, layout: Layout) -> Engine:
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
        raise ConfigError(
            f"a {layout.title} in PostgreSQL needs its driver: install candle-vllm-server with the extra postgres",
            layout.setting,
        ) from None
