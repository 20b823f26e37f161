"""The store's tables. Responses and conversations are rows of one table, because they share one room."""

from __future__ import annotations

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
)

from candle_vllm.responses.store.database import Layout
from candle_vllm.responses.store.records import MAX_ID

VERSION = 1
OVERHEAD = 512  # bytes that a row takes beside its contents, about

_metadata = MetaData()
_Key = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows itself in this type only

head = Table(
    "responses_schema",
    _metadata,
    Column("version", Integer, primary_key=True),
    Column("salt", LargeBinary, nullable=False),  # of the hashes of keys
)

records = Table(
    "responses_records",
    _metadata,
    Column("number", _Key, primary_key=True, autoincrement=True),
    Column("owner", String(64), nullable=False),
    Column("id", String(MAX_ID), nullable=False),
    Column("conversation", Boolean, nullable=False),  # False: a response
    Column("created", BigInteger, nullable=False),  # seconds since 1970
    Column("used", BigInteger, nullable=False),  # this and the other times: ms since 1970; the oldest makes room
    Column("expires", BigInteger),  # NULL: never
    Column("lease", BigInteger),  # until then somebody works on it; NULL: nobody does
    Column("size", BigInteger, nullable=False),  # bytes, items of a conversation included
    Column("status", String(20), nullable=False),  # of a response
    Column("background", Boolean, nullable=False),
    Column("previous_id", String(MAX_ID)),
    Column("conversation_id", String(MAX_ID)),
    Column("body", LargeBinary, nullable=False),  # the response object, or a conversation's metadata
    Column("input_items", LargeBinary, nullable=False),
    UniqueConstraint("owner", "id"),
    Index("responses_records_size", "owner", "size"),
    Index("responses_records_expires", "expires"),
    Index("responses_records_lease", "lease"),
)

items = Table(
    "responses_items",
    _metadata,
    Column("number", _Key, primary_key=True, autoincrement=True),  # their order
    Column("record", _Key, ForeignKey("responses_records.number", ondelete="CASCADE"), nullable=False),
    Column("id", String(MAX_ID), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    UniqueConstraint("record", "id"),
)

# Which response has which item, so that an item can be found by its id.
places = Table(
    "responses_places",
    _metadata,
    Column("number", _Key, primary_key=True, autoincrement=True),
    Column("record", _Key, ForeignKey("responses_records.number", ondelete="CASCADE"), nullable=False, index=True),
    Column("item", String(MAX_ID), nullable=False, index=True),
)

# Who answers in a conversation now, where several servers share the store.
turns = Table(
    "responses_turns",
    _metadata,
    Column("record", _Key, ForeignKey("responses_records.number", ondelete="CASCADE"), primary_key=True),
    Column("holder", String(MAX_ID), nullable=False, index=True),
    Column("until", BigInteger, nullable=False),  # ms since 1970
)

LAYOUT = Layout("store of responses", "responses_store", _metadata, head, VERSION, 0x72657370)
