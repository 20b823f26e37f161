"""The mailbox's tables, and where they are: SQLite or PostgreSQL."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.store.database import Layout, connect_to
from candle_vllm.server.mailbox.record import MAX_ID, MAX_MODEL
from candle_vllm.server.settings.kinds import UsageError

VERSION = 1
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


LAYOUT = Layout("mailbox", "mailbox", _metadata, schema, VERSION, _LOCK)


def connect(text: str) -> Engine:
    """An engine for `sqlite:///path` or `postgresql://...`; nothing is opened yet.

    Raises:
        UsageError: another URL, or PostgreSQL without its driver. The URL is not repeated: it may hold a password.
    """
    try:
        return connect_to(text, LAYOUT)
    except ConfigError as error:
        raise UsageError(str(error)) from None
