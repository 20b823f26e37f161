# SPDX-License-Identifier: MIT
"""SqlBackend: a store in SQLite or PostgreSQL, or in this process's memory. Each method is one transaction."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, not_, or_, select, update

from candle_vllm.responses.store.backend import Bounds, Held, Order, Place
from candle_vllm.responses.store.database import Database, tables_of
from candle_vllm.responses.store.entries import (
    ACTIVE,
    MAX_ID,
    OVERHEAD,
    Entry,
    EntryItem,
    NotStoredError,
    StoreLimitError,
)
from candle_vllm.responses.store.room import NAMES_AT_ONCE, ROWS_AT_ONCE, Room

MAX_WAITING = 1024  # maximum number of calls that wait for the database

P = ParamSpec("P")
T = TypeVar("T")


def _transaction(
    work: Callable[Concatenate[SqlBackend, Connection, P], T],
) -> Callable[Concatenate[SqlBackend, P], Coroutine[Any, Any, T]]:
    """Return a method that runs `work` in the database's thread, inside a transaction that ends with it."""

    @functools.wraps(work)
    async def call(self: SqlBackend, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.database.run(lambda connection: work(self, connection, *args, **kwargs))

    return call


class SqlBackend:
    """A store in tables of an SQL database; opened, used and closed in one event loop.

    Every method is atomic for all servers that share the store. All methods except `open`, `close` and `owner` raise
    StoreUnavailableError if the store cannot be used now.

    Every method locks in one order, so that servers cannot deadlock: an entry's row, then `Room.make`, then its parts.
    `clock` returns seconds since 1970.
    """

    def __init__(self, place: Place, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self.tables = tables_of(place.name)
        self.database = Database(place, self.tables, MAX_WAITING)
        self.open, self.close, self.owner = self.database.open, self.database.close, self.database.owner
        self._place = place
        self._bounds = bounds
        self._clock = clock
        self._entries, self._parts, self._names = self.tables.entries, self.tables.parts, self.tables.names
        self._summary = [each for each in self._entries.c if each.name not in ("body", "given")]  # no contents
        self._active = self._entries.c.status.in_(ACTIVE)

    @property
    def now(self) -> int:
        return int(self._clock() * 1000)

    # ---- entries -----------------------------------------------------------------------------------------------------

    @_transaction
    def put(
        self, connection: Connection, entry: Entry, names: Collection[str] = (), parts: Sequence[EntryItem] = ()
    ) -> int:
        """Store an entry, or replace the one with its owner and id; return how many other entries were dropped.

        A replaced entry that is active (`entries.ACTIVE`) keeps `created`, its place in lists and its parts; otherwise
        it is deleted first. `names` are ids in the entry's contents, for `find`; `parts` are added to its parts. Raises
        StoreLimitError if a limit prevents it, and InvalidParameterError if two parts have one id.
        """
        self._check_size(entry.kind, entry.size)
        entries, room = self._entries, self._room(connection)
        same = and_(entries.c.owner == entry.owner, entries.c.id == entry.id)
        old = select(entries.c.number, entries.c.size, self._active.label("active")).where(same)
        there = connection.execute(old.with_for_update()).first()
        values = {
            "kind": entry.kind, "status": entry.status, "expires": entry.expires, "lease": entry.lease,
            "holder": entry.holder, "follows": entry.follows, "size": entry.size,
            "about": msgspec.json.encode(entry.about), "body": entry.body, "given": entry.given,
        }  # fmt: skip
        if there is not None and there.active:
            held = select(func.coalesce(func.sum(self._parts.c.size), 0)).where(self._parts.c.entry == there.number)
            values["size"] += int(connection.execute(held).scalar_one())  # its parts are not deleted
            grown = values["size"] - there.size
            dropped = room.make(entry.owner, grown, keep=there.number) if grown > 0 else 0
            connection.execute(update(entries).where(entries.c.number == there.number).values(values))
            number = there.number
        else:
            if there is not None:
                room.drop([there.number])
            dropped = room.make(entry.owner, entry.size, rows=1)
            values |= {"owner": entry.owner, "id": entry.id, "created": entry.created, "used": self.now}
            made = connection.execute(insert(entries).values(values))
            assert made.inserted_primary_key is not None
            number = made.inserted_primary_key[0]
        self._note(connection, number, names)
        return dropped + (room.append(entry.kind, number, entry.owner, parts, skip_known=False) if parts else 0)

    @_transaction
    def get(self, connection: Connection, kind: str, owner: str, name: str) -> Entry | None:
        """Return an unexpired entry, or None. Active and, with `spares_leased`, leased entries never expire."""
        row = connection.execute(select(self._entries).where(self._visible(kind, owner, name))).first()
        return None if row is None else _entry(row)

    @_transaction
    def page(
        self, connection: Connection, kind: str, owner: str, limit: int, after: str | None = None, order: Order = "desc"
    ) -> list[Entry] | None:
        """Return up to `limit` entries that follow `after`, without contents; None for an unknown `after`."""
        query, number = select(*self._summary).where(self._visible(kind, owner)), self._entries.c.number
        place = None if after is None else select(number).where(self._visible(kind, owner, after))
        rows = _rows(connection, query.limit(limit), number, order, place)
        return None if rows is None else [_entry(row) for row in rows]

    @_transaction
    def chain(self, connection: Connection, kind: str, owner: str, name: str, most: int, most_size: int) -> list[Entry]:
        """Return an entry and the entries that it follows, the newest first.

        The chain ends with an entry that follows none, before a missing one, with an active one, or with the one that
        exceeds `most` entries or `most_size` bytes. Only if it is complete, its entries count as used now.
        """
        found: list[Entry] = []
        numbers: list[int] = []
        size, before = 0, name
        while before:
            row = connection.execute(select(self._entries).where(self._visible(kind, owner, before))).first()
            if row is None:
                return found
            found.append(_entry(row))
            numbers.append(row.number)
            size += row.size
            if found[-1].active or len(found) > most or size > most_size:
                return found
            before = row.follows
        numbers.sort()  # chains that overlap lock their rows in one order
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            part = self._entries.c.number.in_(numbers[start : start + ROWS_AT_ONCE])
            connection.execute(update(self._entries).where(part).values(used=self.now))
        return found

    @_transaction
    def change(
        self,
        connection: Connection,
        kind: str,
        owner: str,
        name: str,
        body: bytes,
        *,
        status: str | None = None,
        lease: int | None = None,
        lease_was: int | None = None,
        expires: int | None = None,
        names: Collection[str] = (),
    ) -> bool:
        """Write the progress of an entry; False if it is not in the expected state, or does not exist.

        Args:
            status: new status of an active entry; None for an inactive entry, whose status and lease do not change.
            lease: new end of the lease; None ends it.
            lease_was: expected end of the lease; if given, no limits apply, so that an entry with an expired lease can
                be ended.
            expires: new time of expiry; None leaves it.
            names: further ids in its contents.

        Raises StoreLimitError if the entry exceeds a limit of one entry or of the store.
        """
        entries = self._entries
        where = and_(entries.c.owner == owner, entries.c.id == name, entries.c.kind == kind)
        where = and_(where, self._active if status is not None else not_(self._active))
        if lease_was is not None:
            where = and_(where, entries.c.lease == lease_was)
        columns = entries.c.number, entries.c.size, func.length(entries.c.body).label("body")
        query = select(*columns, func.length(entries.c.given).label("given")).where(where)
        row = connection.execute(query.with_for_update()).first()
        if row is None:
            return False
        grown = len(body) - row.body
        if lease_was is None:
            self._check_size(kind, row.given + len(body) + OVERHEAD)
        if grown > 0 and lease_was is None:
            self._room(connection).make(owner, grown, keep=row.number, beyond_share=True)  # so that the entry can end
        values: dict[str, Any] = {"body": body, "size": entries.c.size + grown, "used": self.now}
        if status is not None:
            values |= {"status": status, "lease": lease} | ({"holder": None} if lease is None else {})
        if expires is not None:
            values["expires"] = expires
        if not connection.execute(update(entries).where(where).values(values)).rowcount:
            return False
        self._note(connection, row.number, names)
        return True

    @_transaction
    def delete(
        self,
        connection: Connection,
        kind: str,
        owner: str,
        name: str,
        *,
        status: str | None = None,
        holder: str | None = None,
    ) -> bool:
        """Delete an entry that `get` finds if status and holder match (None: any); return whether it was deleted."""
        where = self._visible(kind, owner, name)
        for column, value in ((self._entries.c.status, status), (self._entries.c.holder, holder)):
            where = where if value is None else and_(where, column == value)
        numbers = list(connection.execute(select(self._entries.c.number).where(where).with_for_update()).scalars())
        self._room(connection).drop(numbers)
        return bool(numbers)

    @_transaction
    def expire(self, connection: Connection) -> list[Entry]:
        """Delete some expired entries, and return them without contents."""
        over = and_(self._entries.c.expires <= self.now, not_(self._alive))
        query = select(*self._summary).where(over).limit(10 * ROWS_AT_ONCE)
        rows = connection.execute(query.with_for_update(skip_locked=True)).all()  # another server may expire them now
        self._room(connection).drop([row.number for row in rows])
        return [_entry(row) for row in rows]

    @_transaction
    def find(self, connection: Connection, owner: str, names: Sequence[str]) -> tuple[list[EntryItem], list[Entry]]:
        """Return the owner's parts with these ids, and its entries that have one of these ids in their `names`."""
        parts: list[EntryItem] = []
        found: dict[int, Entry] = {}
        for start in range(0, len(names), NAMES_AT_ONCE):
            some = names[start : start + NAMES_AT_ONCE]
            joined = select(self._parts.c.id, self._parts.c.body).join(self._entries)
            rows = connection.execute(joined.where(self._parts.c.id.in_(some), self._entries.c.owner == owner))
            parts += [EntryItem(id=row.id, body=bytes(row.body)) for row in rows]
            holding = select(self._names.c.entry).where(self._names.c.name.in_(some)).distinct()
            where = and_(self._entries.c.owner == owner, self._alive, self._entries.c.number.in_(holding))
            found |= {row.number: _entry(row) for row in connection.execute(select(self._entries).where(where))}
        return parts, list(found.values())

    # ---- parts -------------------------------------------------------------------------------------------------------

    @_transaction
    def append(
        self,
        connection: Connection,
        kind: str,
        owner: str,
        name: str,
        parts: Sequence[EntryItem],
        *,
        skip_known: bool = False,
    ) -> int:
        """Add parts at the end, all or none; return how many entries were dropped to make room.

        Parts that exist already are skipped with `skip_known`, and refused with InvalidParameterError otherwise. Raises
        StoreLimitError if the parts exceed the limits, and, like the next three methods, NotStoredError if the entry
        does not exist.
        """
        number = self._find(connection, kind, owner, name, locked=True)
        return self._room(connection).append(kind, number, owner, parts, skip_known=skip_known)

    @_transaction
    def parts(
        self,
        connection: Connection,
        kind: str,
        owner: str,
        name: str,
        limit: int | None = None,
        order: Order = "asc",
        after: str | None = None,
    ) -> list[EntryItem] | None:
        """Return up to `limit` parts after `after`, None for an unknown `after`; no `limit` marks the entry as used."""
        number, parts = self._find(connection, kind, owner, name), self._parts
        query = select(parts.c.id, parts.c.body).where(parts.c.entry == number)
        place = select(parts.c.number).where(parts.c.entry == number, parts.c.id == after)
        rows = _rows(connection, query.limit(limit), parts.c.number, order, None if after is None else place)
        if limit is None:
            connection.execute(update(self._entries).where(self._entries.c.number == number).values(used=self.now))
        return None if rows is None else [EntryItem(id=row.id, body=bytes(row.body)) for row in rows]

    @_transaction
    def part(self, connection: Connection, kind: str, owner: str, name: str, part: str) -> EntryItem | None:
        """Return one part, or None."""
        number = self._find(connection, kind, owner, name)
        query = select(self._parts.c.body).where(self._parts.c.entry == number, self._parts.c.id == part)
        body = connection.execute(query).scalar_one_or_none()
        return None if body is None else EntryItem(id=part, body=bytes(body))

    @_transaction
    def delete_part(self, connection: Connection, kind: str, owner: str, name: str, part: str) -> bool:
        """Delete one part; return whether it existed."""
        number = self._find(connection, kind, owner, name, locked=True)
        same = and_(self._parts.c.entry == number, self._parts.c.id == part)
        size = connection.execute(select(self._parts.c.size).where(same)).scalar_one_or_none()
        if size is None:
            return False
        connection.execute(delete(self._parts).where(same))
        smaller = {"size": self._entries.c.size - size}
        connection.execute(update(self._entries).where(self._entries.c.number == number).values(smaller))
        return True

    # ---- leases ------------------------------------------------------------------------------------------------------

    @_transaction
    def claim(self, connection: Connection, kind: str, what: Held, until: int) -> bool:
        """Give an entry's lease to a holder, or renew it; return False while another holder has it.

        Raises NotStoredError if the entry does not exist.
        """
        number = self._find(connection, kind, what.owner, what.id, locked=True)
        entries = self._entries
        free = or_(entries.c.lease.is_(None), entries.c.lease <= self.now, entries.c.holder == what.holder)
        mine = and_(entries.c.number == number, free)
        return connection.execute(update(entries).where(mine).values(lease=until, holder=what.holder)).rowcount > 0

    @_transaction
    def claim_due(self, connection: Connection, until: int, busy_owners: Collection[str]) -> Entry | None:
        """Claim until a time the inactive entry whose lease ended first, or return None; skip owners at their limit."""
        entries = self._entries
        due = select(entries).where(entries.c.lease <= self.now, self._claimable(busy_owners))
        row = connection.execute(due.order_by(entries.c.lease).limit(1)).first()
        if row is None:
            return None
        same = and_(entries.c.number == row.number, entries.c.lease == row.lease)  # unless another server claimed it
        moved = connection.execute(update(entries).where(same).values(lease=until))
        return _entry(row) if moved.rowcount else None

    @_transaction
    def next_due(self, connection: Connection, busy_owners: Collection[str]) -> int | None:
        """Return the time at which `claim_due` will find an entry, or None."""
        return connection.execute(select(func.min(self._entries.c.lease)).where(self._claimable(busy_owners))).scalar()

    @_transaction
    def move(
        self, connection: Connection, held: Sequence[Held], until: int | None, about: bytes | None = None
    ) -> set[Held]:
        """Set the end of leases (None ends them), and the entries' summary, unless `about` is None.

        Return the entries whose lease the holder no longer has.
        """
        entries, lost = self._entries, set[Held]()
        values: dict[str, Any] = {"lease": until} | ({} if about is None else {"about": about})
        for each in held:
            same = and_(entries.c.owner == each.owner, entries.c.id == each.id, entries.c.holder == each.holder)
            theirs = and_(same, entries.c.lease.is_not(None))
            if not connection.execute(update(entries).where(theirs).values(values)).rowcount:
                lost.add(each)
        return lost

    @_transaction
    def lapsed(self, connection: Connection, busy_owners: Collection[str] = ()) -> list[Entry]:
        """Return some active entries with an expired lease, earliest first; skip owners at their limit."""
        entries = self._entries
        over = select(entries).where(entries.c.lease <= self.now, self._active, entries.c.owner.not_in(busy_owners))
        return [_entry(row) for row in connection.execute(over.order_by(entries.c.lease).limit(ROWS_AT_ONCE))]

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _alive(self) -> ColumnElement[bool]:
        entries = self._entries
        alive = or_(entries.c.expires.is_(None), entries.c.expires > self.now, self._active)
        return or_(alive, func.coalesce(entries.c.lease, 0) > self.now) if self._bounds.spares_leased else alive

    def _visible(self, kind: str, owner: str, name: str | None = None) -> ColumnElement[bool]:
        own = and_(self._entries.c.owner == owner, self._entries.c.kind == kind, self._alive)
        return own if name is None else and_(own, self._entries.c.id == name)

    def _claimable(self, busy_owners: Collection[str]) -> ColumnElement[bool]:
        entries = self._entries
        idle = and_(entries.c.lease.is_not(None), not_(self._active), entries.c.expires > self.now)
        return and_(idle, entries.c.owner.not_in(sorted(busy_owners)))

    def _room(self, connection: Connection) -> Room:
        return Room(connection, self._place, self.tables, self._bounds, self.now)

    def _find(self, connection: Connection, kind: str, owner: str, name: str, *, locked: bool = False) -> int:
        """Return the number of an entry; raises NotStoredError if it does not exist."""
        query = select(self._entries.c.number).where(self._visible(kind, owner, name))
        number = connection.execute(query.with_for_update() if locked else query).scalar_one_or_none()
        if number is None:
            raise NotStoredError(kind.capitalize(), name, f"{kind}_id")
        return number

    def _check_size(self, kind: str, size: int) -> None:
        most = self._bounds.entry_size
        if most is not None and size - OVERHEAD > most:
            raise StoreLimitError(
                f"The {kind} has {size - OVERHEAD} bytes with its input, and at most {most} can be stored. Send less, "
                "or send store: false.",
                "input",
            )

    def _note(self, connection: Connection, number: int, names: Collection[str]) -> None:
        """Store further `names` of an entry, see `put`."""
        known = sorted({name for name in names if len(name) <= MAX_ID and "\0" not in name})
        for start in range(0, len(known), NAMES_AT_ONCE):
            some = known[start : start + NAMES_AT_ONCE]
            connection.execute(delete(self._names).where(self._names.c.entry == number, self._names.c.name.in_(some)))
            connection.execute(insert(self._names), [{"entry": number, "name": name} for name in some])


def _rows(connection: Connection, query: Any, number: Any, order: Order, place: Any) -> Sequence[Any] | None:
    """Return the rows of `query` by `number`, after the one that `place` selects (if any); None if there is no such."""
    if place is not None:
        last = connection.execute(place).scalar_one_or_none()
        if last is None:
            return None
        query = query.where(number > last if order == "asc" else number < last)
    return connection.execute(query.order_by(number if order == "asc" else number.desc())).all()


def _entry(row: Any) -> Entry:
    return Entry(
        kind=row.kind, owner=row.owner, id=row.id, created=row.created, status=row.status, expires=row.expires,
        lease=row.lease, holder=row.holder, follows=row.follows, about=msgspec.json.decode(row.about),
        body=bytes(getattr(row, "body", b"")), given=bytes(getattr(row, "given", b"")),
    )  # fmt: skip
