"""How the store stays within its bounds: the oldest of the key that has most makes room."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, select

from candle_vllm.responses.store.errors import StoreLimitError
from candle_vllm.responses.store.options import StoreOptions
from candle_vllm.responses.store.schema import LAYOUT, items, places, records, turns

_AT_ONCE = 100  # rows that are looked at in one go


def make_room(
    connection: Connection, options: StoreOptions, size: int, *, rows: int = 0, keep: int | None = None
) -> int:
    """Deletes what has to go so that more fits; how many responses and conversations went.

    Args:
        connection: of the transaction.
        options: the bounds.
        size: further bytes.
        rows: further rows.
        keep: a row that must stay.

    Raises:
        StoreLimitError: there is not so much that could go.
    """
    if connection.dialect.name == "postgresql":  # several servers make room one after the other
        connection.execute(select(func.pg_advisory_xact_lock(LAYOUT.lock + 1)))
    count, total = connection.execute(select(func.count(), func.coalesce(func.sum(records.c.size), 0))).one()
    many, much = count + rows - options.max_records, int(total) + size - options.max_bytes
    dropped = 0
    while many > 0 or much > 0:
        victims = _victims(connection, func.sum(records.c.size) if much > 0 else func.count(), keep)
        if not victims:
            raise StoreLimitError(
                f"The store of responses is full: {size} bytes do not fit into its {options.max_bytes}, and nothing "
                "of it can make room now. Send less, or let its operator raise --responses-max-mb."
            )
        gone = []
        for victim in victims:
            if many <= 0 and much <= 0:
                break
            gone.append(victim.number)
            many, much = many - 1, much - victim.size
        drop(connection, gone)
        dropped += len(gone)
    return dropped


def drop(connection: Connection, numbers: list[int]) -> None:
    """Deletes rows, and what belongs to them."""
    connection.execute(delete(items).where(items.c.record.in_(numbers)))
    connection.execute(delete(places).where(places.c.record.in_(numbers)))
    connection.execute(delete(turns).where(turns.c.record.in_(numbers)))
    connection.execute(delete(records).where(records.c.number.in_(numbers)))


def _victims(connection: Connection, most: ColumnElement[Any], keep: int | None) -> list[Any]:
    """Rows of the key that has most, the longest unused first; what somebody works on is none of them."""
    idle: list[ColumnElement[bool]] = [records.c.lease.is_(None), records.c.number.not_in(select(turns.c.record))]
    if keep is not None:
        idle.append(records.c.number != keep)
    by_owner = select(records.c.owner).where(*idle).group_by(records.c.owner).order_by(most.desc()).limit(1)
    owner = connection.execute(by_owner).scalar_one_or_none()
    if owner is None:
        return []
    oldest = select(records.c.number, records.c.size).where(records.c.owner == owner, *idle)
    ordered = oldest.order_by(records.c.used, records.c.number).limit(_AT_ONCE)
    return list(connection.execute(ordered.with_for_update(skip_locked=True)))
