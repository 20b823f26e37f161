# SPDX-License-Identifier: MIT
"""Enforces the limits of a store in tables: drops the least recently used entries of the fullest owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, not_, or_, select, update

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.store.backend import Bounds, Place
from candle_vllm.responses.store.database import Tables
from candle_vllm.responses.store.entries import ACTIVE, CONVERSATION, EntryItem, StoreFullError, StoreLimitError

NAMES_AT_ONCE = 500  # ids in one statement
ROWS_AT_ONCE = 100  # rows that one statement reads


class Room:
    """Limits of a store's tables, enforced in one transaction; `now` is the current time in ms since 1970."""

    def __init__(self, connection: Connection, place: Place, tables: Tables, bounds: Bounds, now: int) -> None:
        self._connection = connection
        self._place = place
        self._tables = tables
        self._entries, self._parts = tables.entries, tables.parts
        self._bounds = bounds
        self._now = now

    def make(self, owner: str, size: int, *, rows: int = 0, keep: int = -1, beyond_share: bool = False) -> int:
        """Delete entries until the new data fits; return their number. With `beyond_share`, no owner's share counts.

        Raises StoreLimitError if the data is larger than the store, or than the owner's share, and StoreFullError if
        too few entries may be deleted.
        """
        if self._connection.dialect.name == "postgresql":  # one server after the other makes room
            self._connection.execute(select(func.pg_advisory_xact_lock(self._tables.lock + 1)))
        bounds, dropped = self._bounds, 0
        most, most_size = (bounds.owner_entries if rows else None), None
        if not beyond_share and bounds.several():
            most, most_size = min(most or bounds.entries, bounds.entries // 2), (bounds.size or 0) // 2 or None
        if most is not None or most_size is not None:
            dropped = self._free(owner, size, rows, keep, most, most_size)
        return dropped + self._free(None, size, rows, keep, bounds.entries, bounds.size)

    def drop(self, numbers: Sequence[int]) -> None:
        """Delete rows of entries, with their parts and names."""
        if numbers:
            for belonging in (self._parts, self._tables.names):
                self._connection.execute(delete(belonging).where(belonging.c.entry.in_(numbers)))
            self._connection.execute(delete(self._entries).where(self._entries.c.number.in_(numbers)))

    def append(self, kind: str, number: int, owner: str, more: Sequence[EntryItem], *, skip_known: bool) -> int:
        """Add parts to a row; return how many other entries were dropped, as in `SqlBackend.append`."""
        parts, bounds = self._parts, self._bounds
        there = self._known(number, more)
        if skip_known:
            more = list({each.id: each for each in more if each.id not in there}.values())
        else:
            _refuse_twins(more, there)
        if not more:
            return 0
        counts = select(func.count(), func.coalesce(func.sum(parts.c.size), 0)).where(parts.c.entry == number)
        count, held = self._connection.execute(counts).one()
        size = sum(each.size for each in more)
        if count + len(more) > bounds.parts or int(held) + size > bounds.parts_size:
            is_conversation = kind == CONVERSATION
            advice = "Delete items of it, or begin another." if is_conversation else bounds.advice
            raise StoreLimitError(
                f"No more fits into the {kind}: at most {bounds.parts} items and {bounds.parts_size} bytes are stored. "
                + advice,
                kind if is_conversation else None,
            )
        dropped = self.make(owner, size, keep=number)
        rows = [{"entry": number, "id": each.id, "size": each.size, "body": each.body} for each in more]
        self._connection.execute(insert(parts), rows)
        values = {"size": self._entries.c.size + size, "used": self._now}
        self._connection.execute(update(self._entries).where(self._entries.c.number == number).values(values))
        return dropped

    def _free(self, owner: str | None, size: int, rows: int, keep: int, most: int | None, most_size: int | None) -> int:
        """Delete entries beyond the limits of number and bytes: one owner's or, with None, all owners'."""
        entries, bounds, dropped = self._entries, self._bounds, 0
        held = select(func.count(), func.coalesce(func.sum(entries.c.size), 0))
        count, total = self._connection.execute(held if owner is None else held.where(entries.c.owner == owner)).one()
        many = 0 if most is None else count + rows - most
        much = 0 if most_size is None else int(total) + size - most_size
        while many > 0 or much > 0:
            measure = func.sum(entries.c.size) if much > 0 else func.count()
            victims = self._victims(self._fullest(measure, keep) if owner is None else owner, keep)
            if not victims:
                what = f"The {self._place.title} is" if owner is None else f"Your half of the {self._place.title} is"
                lack = f"{size} bytes do not fit into its {most_size}" if much > 0 else f"it may have {most} entries"
                said = f"{what} full: {lack}, and nothing in it can be deleted now."
                if most_size is not None and size > most_size:
                    raise StoreLimitError(f"{said} {bounds.advice}")
                raise StoreFullError(f"{said} {bounds.advice}", own=owner is not None)
            gone = []
            for victim in victims:
                if many <= 0 and much <= 0:
                    break
                gone.append(victim.number)
                many, much = many - 1, much - victim.size
            self.drop(gone)
            dropped += len(gone)
        return dropped

    def _fullest(self, most: ColumnElement[Any], keep: int) -> str | None:
        """Return the owner with the most entries or bytes that may be deleted."""
        owner = self._entries.c.owner
        query = select(owner).where(self._may_go(keep)).group_by(owner).order_by(most.desc()).limit(1)
        return self._connection.execute(query).scalar_one_or_none()

    def _victims(self, owner: str | None, keep: int, limit: int = ROWS_AT_ONCE) -> Sequence[Any]:
        """Return rows of an owner to delete, the longest unused first; active and leased entries come last."""
        entries = self._entries
        query = select(entries.c.number, entries.c.size).where(entries.c.owner == owner, self._may_go(keep))
        order = (entries.c.status.in_(ACTIVE), entries.c.lease.is_not(None), entries.c.used, entries.c.number)
        return self._connection.execute(query.order_by(*order).limit(limit).with_for_update(skip_locked=True)).all()

    def _may_go(self, keep: int) -> ColumnElement[bool]:
        """Return the condition of rows that may be deleted: with `spares_leased`, neither active nor leased rows."""
        lease, other = self._entries.c.lease, self._entries.c.number != keep
        if not self._bounds.spares_leased:
            return other
        return and_(other, not_(self._entries.c.status.in_(ACTIVE)), or_(lease.is_(None), lease <= self._now))

    def _known(self, number: int, more: Sequence[EntryItem]) -> set[str]:
        """Return the ids of these parts that the row already has."""
        found: set[str] = set()
        for start in range(0, len(more), NAMES_AT_ONCE):
            names = [each.id for each in more[start : start + NAMES_AT_ONCE]]
            there = select(self._parts.c.id).where(self._parts.c.entry == number, self._parts.c.id.in_(names))
            found.update(self._connection.execute(there).scalars())
        return found


def _refuse_twins(more: Sequence[EntryItem], there: set[str]) -> None:
    seen = set(there)
    for index, each in enumerate(more):
        if each.id in seen:
            raise InvalidParameterError(
                f"items.{index}.id: the conversation has an item {each.id!r:.80} already; leave the id out, or give "
                "another",
                f"items.{index}.id",
            )
        seen.add(each.id)
