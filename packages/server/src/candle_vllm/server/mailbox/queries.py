"""What the store does in its thread: each function is one transaction, or a part of one.

Everything is written in SQLAlchemy's constructs; times are milliseconds since 1970.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, delete, false, func, insert, not_, null, or_, select, update

from candle_vllm.server.mailbox.record import Record, Status, failure_body
from candle_vllm.server.mailbox.schema import records

_ROOM_AT_ONCE = 100  # records that make room for one, where the limit was lowered
_HEAD = (records.c.id, records.c.request_id, records.c.model, records.c.created, records.c.status)


@dataclass(frozen=True)
class Entry:
    """An answer to be kept.

    Attributes:
        owner: hash of the API key.
        response: JSON; None while it streams.
        expires_ms: when it is purged; of a streaming one, when it is given up.
        listed: its client may fetch it; otherwise it is there for its push alone.
        push: it is to be pushed as soon as possible.
        push_url: where to; None for the operator's webhook.
    """

    owner: str
    request_id: str
    model: str
    status: Status
    response: bytes | None
    expires_ms: int
    listed: bool = True
    push: bool = False
    push_url: str | None = None
    push_bearer: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Push:
    """A record with what its push needs.

    Attributes:
        id: of the record in the store.
        delivery_id: stays the same however often it is tried.
        attempts: that failed before.
        url: a client's; None for the operator's webhook.
    """

    id: int
    owner: str
    delivery_id: str
    record: Record
    attempts: int = 0
    url: str | None = None
    bearer: str | None = field(default=None, repr=False)


def put(connection: Connection, entry: Entry, now: int, per_owner: int, total: int) -> int:
    """Keeps an answer in place of an older one with its owner and id; how many others had to make room."""
    matches = and_(records.c.owner == entry.owner, records.c.request_id == entry.request_id)
    begun = connection.execute(select(records.c.id, records.c.status).where(matches)).first()
    values = {
        "status": entry.status, "response": entry.response, "expires": entry.expires_ms, "listed": entry.listed,
        "push_at": now if entry.push else None, "push_url": entry.push_url, "push_bearer": entry.push_bearer,
        "push_attempts": 0, "delivery_id": secrets.token_hex(16),
    }  # fmt: skip
    if begun is not None and begun.status == Status.STREAMING:
        connection.execute(update(records).where(records.c.id == begun.id).values(values))
        return 0
    connection.execute(delete(records).where(matches))
    dropped = _make_room(connection, entry.owner, per_owner, total)
    values |= {"owner": entry.owner, "request_id": entry.request_id, "model": entry.model, "created": now}
    connection.execute(insert(records).values(values))
    return dropped


def find(connection: Connection, owner: str, request_id: str, now: int) -> Push | None:
    """A listed record with its answer."""
    row = connection.execute(select(records).where(_visible(owner, now), records.c.request_id == request_id)).first()
    return None if row is None else _push(row)


def page(connection: Connection, owner: str, limit: int, after: str | None, now: int) -> list[Record] | None:
    """Listed records without their answers, newest first, from the one before `after`; None when that is unknown."""
    query = select(*_HEAD).where(_visible(owner, now)).order_by(records.c.id.desc()).limit(limit)
    if after is not None:
        place = select(records.c.id).where(_visible(owner, now), records.c.request_id == after)
        last = connection.execute(place).scalar_one_or_none()
        if last is None:
            return None
        query = query.where(records.c.id < last)
    return [_record(row) for row in connection.execute(query)]


def remove(connection: Connection, owner: str, request_id: str, now: int) -> bool:
    """Deletes a listed record and its open push; whether there was one."""
    matches = and_(_visible(owner, now), records.c.request_id == request_id)
    return connection.execute(delete(records).where(matches)).rowcount > 0


def drop_begun(connection: Connection, owner: str, request_id: str) -> None:
    """Deletes a record that was begun and will not be completed."""
    begun = and_(records.c.request_id == request_id, records.c.status == Status.STREAMING)
    connection.execute(delete(records).where(records.c.owner == owner, begun))


def purge(connection: Connection, now: int, retention_ms: int) -> int:
    """Deletes what has expired, and gives up answers that stream beyond their time; how many were deleted."""
    streaming = records.c.status == Status.STREAMING
    lost = failure_body("The server was stopped before the answer was complete.", "request_aborted")
    given_up = {"status": Status.INTERNAL_ERROR, "response": lost, "expires": now + retention_ms}
    connection.execute(update(records).where(records.c.expires <= now, streaming).values(given_up))
    return connection.execute(delete(records).where(records.c.expires <= now, not_(streaming))).rowcount


def claim(connection: Connection, now: int, lease_ms: int, busy_owners: Collection[str]) -> Push | None:
    """The push that is due longest, due again after the lease."""
    due = select(records).where(records.c.push_at <= now, _pushable(now, busy_owners)).order_by(records.c.push_at)
    row = connection.execute(due.limit(1)).first()
    if row is None:
        return None
    same = and_(records.c.id == row.id, records.c.push_at == row.push_at)  # or another server was faster
    moved = connection.execute(update(records).where(same).values(push_at=now + lease_ms))
    return _push(row) if moved.rowcount else None


def next_push(connection: Connection, now: int, busy_owners: Collection[str]) -> int | None:
    """When `claim` will find the next push, or None."""
    return connection.execute(select(func.min(records.c.push_at)).where(_pushable(now, busy_owners))).scalar()


def settle(connection: Connection, push: Push) -> None:
    """Ends a push; what was kept for it alone goes."""
    connection.execute(delete(records).where(_same(push), records.c.listed == false()))
    connection.execute(update(records).where(_same(push)).values(push_at=null(), push_url=null(), push_bearer=null()))


def postpone(connection: Connection, push: Push, attempts: int, due: int) -> None:
    """The push is due again at `due`."""
    values = {"push_at": due, "push_attempts": attempts}
    connection.execute(update(records).where(_same(push), records.c.push_at.is_not(None)).values(values))


def _make_room(connection: Connection, owner: str, per_owner: int, total: int) -> int:
    """Deletes the oldest records of `owner`, then of whoever has most, so that one more fits."""
    dropped = _drop_oldest(connection, owner, _count(connection, records.c.owner == owner) - per_owner + 1)
    for _ in range(min(_count(connection) - total + 1, _ROOM_AT_ONCE)):
        by_owner = select(records.c.owner).group_by(records.c.owner).order_by(func.count().desc()).limit(1)
        dropped += _drop_oldest(connection, connection.execute(by_owner).scalar_one(), 1)
    return dropped


def _drop_oldest(connection: Connection, owner: str, number: int) -> int:
    """Deletes `number` records of one key: finished ones first, those without an open push before others, by age."""
    if number <= 0:
        return 0
    order = (records.c.status == Status.STREAMING, records.c.push_at.is_not(None), records.c.id)
    oldest = select(records.c.id).where(records.c.owner == owner).order_by(*order).limit(number)
    return connection.execute(delete(records).where(records.c.id.in_(oldest.scalar_subquery()))).rowcount


def _count(connection: Connection, *where: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).select_from(records).where(*where)).scalar_one()


def _visible(owner: str, now: int) -> ColumnElement[bool]:
    alive = or_(records.c.expires > now, records.c.status == Status.STREAMING)
    return and_(records.c.owner == owner, records.c.listed, alive)


def _pushable(now: int, busy_owners: Collection[str]) -> ColumnElement[bool]:
    return and_(records.c.push_at.is_not(None), records.c.expires > now, records.c.owner.not_in(sorted(busy_owners)))


def _same(push: Push) -> ColumnElement[bool]:
    """The record of a push, unless another answer has taken its place."""
    return and_(records.c.id == push.id, records.c.delivery_id == push.delivery_id)


def _record(row: Any) -> Record:
    fields = {} if getattr(row, "response", None) is None else {"response": msgspec.Raw(row.response)}
    return Record(
        request_id=row.request_id, model=row.model, created=row.created // 1000, status=Status(row.status), **fields
    )


def _push(row: Any) -> Push:
    return Push(row.id, row.owner, row.delivery_id, _record(row), row.push_attempts, row.push_url, row.push_bearer)
