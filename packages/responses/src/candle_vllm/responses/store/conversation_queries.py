"""What the store does with conversations in its thread: each function is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, func, insert, select, update

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.store.errors import NotStoredError, StoreLimitError
from candle_vllm.responses.store.options import StoreOptions
from candle_vllm.responses.store.records import ItemPage, StoredConversation, StoredItem
from candle_vllm.responses.store.room import drop, make_room
from candle_vllm.responses.store.schema import OVERHEAD, items, records

Order = Literal["asc", "desc"]
_AT_ONCE = 500  # ids in one statement


def create(
    connection: Connection,
    owner: str,
    made: StoredConversation,
    first: Sequence[StoredItem],
    now: int,
    options: StoreOptions,
) -> int:
    """Keeps a new conversation; how many others had to make room."""
    size = len(made.metadata) + OVERHEAD
    dropped = make_room(connection, options, size, rows=1)
    connection.execute(
        insert(records).values(
            owner=owner, id=made.id, conversation=True, created=made.created_at, used=now, size=size, status="",
            background=False, body=made.metadata, input_items=b"",
        )
    )  # fmt: skip
    return dropped + (append(connection, owner, made.id, first, now, options) if first else 0)


def get(connection: Connection, owner: str, name: str) -> StoredConversation:
    """A conversation."""
    return _conversation(find(connection, owner, name))


def describe(
    connection: Connection, owner: str, name: str, metadata: bytes, now: int, options: StoreOptions
) -> StoredConversation:
    """Gives a conversation other metadata."""
    row = find(connection, owner, name, locked=True)
    grown = len(metadata) - len(row.body)
    if grown > 0:
        make_room(connection, options, grown, keep=row.number)
    values = {"body": metadata, "size": records.c.size + grown, "used": now}
    connection.execute(update(records).where(records.c.number == row.number).values(values))
    return get(connection, owner, name)


def remove(connection: Connection, owner: str, name: str) -> None:
    """Deletes a conversation and its items."""
    drop(connection, [find(connection, owner, name, locked=True).number])


def append(
    connection: Connection,
    owner: str,
    name: str,
    more: Sequence[StoredItem],
    now: int,
    options: StoreOptions,
    *,
    skip_known: bool = False,
) -> int:
    """Adds items at the end, all or none; how many responses and conversations had to make room.

    With `skip_known`, those that are there already stay where they are; otherwise they are refused.
    """
    row = find(connection, owner, name, locked=True)
    there = _known(connection, row.number, more)
    if skip_known:
        more = list({each.id: each for each in more if each.id not in there}.values())
    else:
        _refuse_twins(more, there)
    if not more:
        return 0
    counts = select(func.count(), func.coalesce(func.sum(items.c.size), 0)).where(items.c.record == row.number)
    count, held = connection.execute(counts).one()
    size = sum(len(item.body) + OVERHEAD for item in more)
    if count + len(more) > options.max_items or int(held) + size > options.max_conversation_bytes:
        raise StoreLimitError(
            f"The conversation is full: at most {options.max_items} items and {options.max_conversation_bytes} bytes "
            "are kept of one. Delete items of it, or begin another.",
            "conversation",
        )
    dropped = make_room(connection, options, size, keep=row.number)
    connection.execute(
        insert(items),
        [{"record": row.number, "id": each.id, "size": len(each.body) + OVERHEAD, "body": each.body} for each in more],
    )
    values = {"size": records.c.size + size, "used": now}
    connection.execute(update(records).where(records.c.number == row.number).values(values))
    return dropped


def page(connection: Connection, owner: str, name: str, limit: int, order: Order, after: str | None) -> ItemPage:
    """At most `limit` items, from the one behind `after` in the order."""
    row = find(connection, owner, name)
    query = select(items.c.id, items.c.body).where(items.c.record == row.number)
    if after is not None:
        place = connection.execute(_item(row.number, after, items.c.number)).scalar_one_or_none()
        if place is None:
            raise InvalidParameterError(
                f"after must be the id of an item of this conversation, not {after!r:.80}", "after"
            )
        query = query.where(items.c.number > place if order == "asc" else items.c.number < place)
    query = query.order_by(items.c.number if order == "asc" else items.c.number.desc()).limit(limit + 1)
    found = [StoredItem(id=row.id, body=bytes(row.body)) for row in connection.execute(query)]
    return ItemPage(items=tuple(found[:limit]), has_more=len(found) > limit)


def everything(connection: Connection, owner: str, name: str, now: int) -> list[StoredItem]:
    """All items in their order, for a response that goes on with them."""
    row = find(connection, owner, name)
    connection.execute(update(records).where(records.c.number == row.number).values(used=now))
    query = select(items.c.id, items.c.body).where(items.c.record == row.number).order_by(items.c.number)
    return [StoredItem(id=row.id, body=bytes(row.body)) for row in connection.execute(query)]


def item(connection: Connection, owner: str, name: str, item_id: str) -> StoredItem:
    """One item."""
    row = find(connection, owner, name)
    found = connection.execute(_item(row.number, item_id, items.c.id, items.c.body)).first()
    if found is None:
        raise NotStoredError("Conversation item", item_id, "item_id")
    return StoredItem(id=found.id, body=bytes(found.body))


def remove_item(connection: Connection, owner: str, name: str, item_id: str) -> StoredConversation:
    """Deletes one item; the conversation that it was in."""
    row = find(connection, owner, name, locked=True)
    found = connection.execute(_item(row.number, item_id, items.c.number, items.c.size)).first()
    if found is None:
        raise NotStoredError("Conversation item", item_id, "item_id")
    connection.execute(delete(items).where(items.c.number == found.number))
    smaller = {"size": records.c.size - found.size}
    connection.execute(update(records).where(records.c.number == row.number).values(smaller))
    return _conversation(row)


def find(connection: Connection, owner: str, name: str, *, locked: bool = False) -> Any:
    """A conversation's row; NotStoredError where there is none."""
    query = select(records).where(records.c.owner == owner, records.c.id == name, records.c.conversation)
    row = connection.execute(query.with_for_update() if locked else query).first()
    if row is None:
        raise NotStoredError("Conversation", name, "conversation_id")
    return row


def _known(connection: Connection, number: int, more: Sequence[StoredItem]) -> set[str]:
    """The ids of these items that the conversation has already."""
    found: set[str] = set()
    for start in range(0, len(more), _AT_ONCE):
        names = [each.id for each in more[start : start + _AT_ONCE]]
        there = select(items.c.id).where(items.c.record == number, items.c.id.in_(names))
        found.update(connection.execute(there).scalars())
    return found


def _refuse_twins(more: Sequence[StoredItem], there: set[str]) -> None:
    seen = set(there)
    for index, each in enumerate(more):
        if each.id in seen:
            raise InvalidParameterError(
                f"items.{index}.id: the conversation has an item {each.id!r:.80} already; leave the id out, or give "
                "another",
                f"items.{index}.id",
            )
        seen.add(each.id)


def _item(number: int, item_id: str, *columns: ColumnElement[Any]) -> Select[Any]:
    return select(*columns).where(and_(items.c.record == number, items.c.id == item_id))


def _conversation(row: Any) -> StoredConversation:
    return StoredConversation(id=row.id, created_at=row.created, metadata=bytes(row.body))
