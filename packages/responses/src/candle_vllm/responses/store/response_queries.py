"""What the store does with responses in its thread: each function is one transaction.

A response that somebody works on has a lease, which its server renews. Where that server has died, the lease ends and
the response has failed: whoever looks at it next writes that down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, insert, or_, select, update

from candle_vllm.responses.store.errors import NotStoredError, StoreLimitError
from candle_vllm.responses.store.options import StoreOptions
from candle_vllm.responses.store.records import ACTIVE, STOPPED, StoredResponse, settled
from candle_vllm.responses.store.references import note_places
from candle_vllm.responses.store.room import drop, make_room
from candle_vllm.responses.store.schema import OVERHEAD, records

LEASE_MS = 60_000
_AT_ONCE = 100


def put(connection: Connection, record: StoredResponse, now: int, options: StoreOptions) -> int:
    """Keeps a response in the place of one with its id; how many others had to make room."""
    size = _checked_size(record.response, record.input_items, options)
    older = connection.execute(select(records.c.number).where(_named(record.owner, record.id))).scalars()
    drop(connection, list(older))
    dropped = make_room(connection, options, size, rows=1)
    days = options.retention_days * 86_400
    expires = record.created_at + days if record.expires_at is None else record.expires_at
    made = connection.execute(
        insert(records).values(
            owner=record.owner, id=record.id, conversation=False, created=record.created_at, used=now,
            expires=expires * 1000, lease=now + LEASE_MS if record.active else None, size=size, status=record.status,
            background=record.background, previous_id=record.previous_response_id,
            conversation_id=record.conversation_id, body=record.response, input_items=record.input_items,
        )
    )  # fmt: skip
    assert made.inserted_primary_key is not None
    note_places(connection, made.inserted_primary_key[0], record.response, record.input_items)
    return dropped


def get(connection: Connection, owner: str, response_id: str, now: int) -> StoredResponse | None:
    """A response."""
    row = _find(connection, owner, response_id, now)
    return None if row is None else _record(row)


def remove(connection: Connection, owner: str, response_id: str, now: int) -> bool:
    """Deletes a response; whether there was one."""
    row = connection.execute(select(records.c.number).where(_visible(owner, response_id, now))).first()
    if row is not None:
        drop(connection, [row.number])
    return row is not None


def change(
    connection: Connection, owner: str, response_id: str, status: str, response: bytes, now: int, options: StoreOptions
) -> bool:
    """Writes how far a response is, or how it ended; False when nobody works on it any more."""
    where = and_(_named(owner, response_id), records.c.status.in_(ACTIVE))
    row = connection.execute(select(records.c.number, records.c.size, records.c.input_items).where(where)).first()
    if row is None:
        return False
    size = _checked_size(response, row.input_items, options)
    if size > row.size:
        make_room(connection, options, size - row.size, keep=row.number)
    lease = now + LEASE_MS if status in ACTIVE else None
    values = {"status": status, "body": response, "size": size, "lease": lease, "used": now}
    if not connection.execute(update(records).where(where).values(values)).rowcount:
        return False
    if status not in ACTIVE:
        note_places(connection, row.number, response, row.input_items)
    return True


def renew(connection: Connection, names: Sequence[tuple[str, str]], now: int) -> set[tuple[str, str]]:
    """Says that owners' responses are still worked on; those of them that somebody else has ended or deleted."""
    ended = set(names)
    for owner, response_id in names:
        where = and_(_named(owner, response_id), records.c.status.in_(ACTIVE))
        if connection.execute(update(records).where(where).values(lease=now + LEASE_MS)).rowcount:
            ended.discard((owner, response_id))
    return ended


def chain(
    connection: Connection, owner: str, response_id: str, now: int, options: StoreOptions
) -> list[StoredResponse]:
    """A response and those before it, the oldest first; what it says is used now and makes room last."""
    found: list[StoredResponse] = []
    numbers: list[int] = []
    size, name = 0, response_id
    while name:
        row = _find(connection, owner, name, now)
        if row is None:
            raise _broken(response_id, name)
        if row.status in ACTIVE:
            raise StoreLimitError(f"The response {name!r} is still {row.status}: wait until it has ended.", _PREVIOUS)
        found.append(_record(row))
        numbers.append(row.number)
        size += row.size
        if len(found) > options.max_chain or size > options.max_chain_bytes:
            raise StoreLimitError(
                f"The responses before this one are too long: at most {options.max_chain} of them and "
                f"{options.max_chain_bytes} bytes may follow each other. Begin anew with a summary.",
                _PREVIOUS,
            )
        name = row.previous_id
    for start in range(0, len(numbers), _AT_ONCE):
        part = numbers[start : start + _AT_ONCE]
        connection.execute(update(records).where(records.c.number.in_(part)).values(used=now))
    return found[::-1]


def purge(connection: Connection, now: int) -> int:
    """Deletes what has expired, and ends what nobody works on any more; how many were deleted."""
    stale = select(records).where(records.c.lease <= now).limit(_AT_ONCE)
    for row in connection.execute(stale).all():
        _give_up(connection, row)
    expired = select(records.c.number).where(records.c.expires <= now, records.c.lease.is_(None)).limit(10 * _AT_ONCE)
    numbers = list(connection.execute(expired).scalars())
    drop(connection, numbers)
    return len(numbers)


_PREVIOUS = "previous_response_id"


def _broken(response_id: str, missing: str) -> NotStoredError:
    if response_id == missing:
        return NotStoredError("Previous response", missing, _PREVIOUS)
    return NotStoredError(f"Response {response_id!r:.80} cannot be continued: the earlier response", missing, _PREVIOUS)


def _find(connection: Connection, owner: str, response_id: str, now: int) -> Any:
    row = connection.execute(select(records).where(_visible(owner, response_id, now))).first()
    if row is not None and row.lease is not None and row.lease <= now:
        _give_up(connection, row)
        row = connection.execute(select(records).where(records.c.number == row.number)).first()
    return row


def _give_up(connection: Connection, row: Any) -> None:
    """The server that worked on a response has died."""
    body = settled(row.body, "failed", ("server_error", STOPPED))
    where = and_(records.c.number == row.number, records.c.lease == row.lease)  # or it was renewed meanwhile
    connection.execute(update(records).where(where).values(status="failed", lease=None, body=body))


def _checked_size(response: bytes, input_items: bytes, options: StoreOptions) -> int:
    size = len(response) + len(input_items)
    if size > options.max_record_bytes:
        raise StoreLimitError(
            f"The response has {size} bytes with its input, and the store keeps at most {options.max_record_bytes} of "
            "one. Send less, or ask with store: false.",
            "input",
        )
    return size + OVERHEAD


def _named(owner: str, name: str) -> ColumnElement[bool]:
    return and_(records.c.owner == owner, records.c.id == name, ~records.c.conversation)


def _visible(owner: str, name: str, now: int) -> ColumnElement[bool]:
    return and_(_named(owner, name), or_(records.c.expires > now, records.c.lease.is_not(None)))


def _record(row: Any) -> StoredResponse:
    return StoredResponse(
        id=row.id, owner=row.owner, created_at=row.created, response=bytes(row.body),
        input_items=bytes(row.input_items), previous_response_id=row.previous_id, conversation_id=row.conversation_id,
        status=row.status, background=row.background, expires_at=row.expires // 1000,
    )  # fmt: skip
