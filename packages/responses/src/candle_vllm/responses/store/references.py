"""Items by their ids, wherever they are: for requests that refer to them instead of sending them again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, delete, insert, or_, select

from candle_vllm.responses.store.records import MAX_ID, Item, items_of
from candle_vllm.responses.store.schema import items, places, records

_AT_ONCE = 500  # ids in one statement


def note_places(connection: Connection, number: int, response: bytes, input_items: bytes) -> None:
    """Writes down which items a response has."""
    names = {item["id"] for item in items_of(response, input_items) if isinstance(item.get("id"), str)}
    connection.execute(delete(places).where(places.c.record == number))
    rows = [{"record": number, "item": name} for name in sorted(names) if len(name) <= MAX_ID and "\0" not in name]
    if rows:
        connection.execute(insert(places), rows)


def find(connection: Connection, owner: str, names: Sequence[str], now: int) -> dict[str, Item]:
    """The items of an owner with these ids; those that are nowhere are left out."""
    found: dict[str, Item] = {}
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        found |= _in_conversations(connection, owner, part)
        found |= _in_responses(connection, owner, part, now)
    return found


def _in_responses(connection: Connection, owner: str, names: Sequence[str], now: int) -> dict[str, Item]:
    holding = select(places.c.record).where(places.c.item.in_(names)).distinct()
    rows = connection.execute(
        select(records.c.body, records.c.input_items).where(
            records.c.number.in_(holding), records.c.owner == owner,
            or_(records.c.expires > now, records.c.lease.is_not(None)),
        )
    )  # fmt: skip
    wanted = set(names)
    return {
        item["id"]: item
        for row in rows
        for item in items_of(row.body, row.input_items)
        if item.get("id") in wanted
    }  # fmt: skip


def _in_conversations(connection: Connection, owner: str, names: Sequence[str]) -> dict[str, Item]:
    joined = select(items.c.id, items.c.body).join(records, records.c.number == items.c.record)
    rows = connection.execute(joined.where(items.c.id.in_(names), records.c.owner == owner))
    return {row.id: msgspec.json.decode(row.body) for row in rows}
