"""The store of the mailbox: answers and their open pushes, in SQLite or PostgreSQL.

One thread and one connection do all the work, so there is one writer; what waits for it is bounded in number and
in time. A push is claimed by moving its time beyond a lease: whoever moved it has it, also among several servers,
and when that server dies the push is due again at the end of the lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.store.database import MAX_WAITING, Database
from candle_vllm.responses.store.errors import StoreUnavailableError
from candle_vllm.server.mailbox import queries
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mailbox.queries import Entry, Push
from candle_vllm.server.mailbox.record import Record
from candle_vllm.server.mailbox.refusals import busy
from candle_vllm.server.mailbox.schema import LAYOUT, connect
from candle_vllm.server.settings.kinds import UsageError

P = ParamSpec("P")
T = TypeVar("T")


class Store:
    """Records by the hash of their key and their id; a call that is not answered in time raises `MailboxError` 503."""

    def __init__(self, options: MailboxOptions, clock: Callable[[], float] = time.time) -> None:
        self._options = options
        self._clock = clock
        self._database = Database(LAYOUT, lambda: connect(options.url), MAX_WAITING)

    async def open(self) -> None:
        """Connects and makes the tables; UsageError when that cannot be."""
        try:
            await self._database.open()
        except ConfigError as error:
            raise UsageError(str(error)) from None

    async def close(self) -> None:
        """Waits for what is running; what still waits is dropped."""
        await self._database.close()

    def owner(self, key: str) -> str:
        """An API key as this store knows it."""
        return self._database.owner(key)

    @property
    def now_ms(self) -> int:
        """The store's clock."""
        return int(self._clock() * 1000)

    async def put(self, entry: Entry) -> int:
        """Keeps an answer in place of an older one with its owner and id; how many others had to make room."""
        limits = self._options
        return await self._run(queries.put, entry, self.now_ms, limits.max_records_per_key, limits.max_records)

    async def get(self, owner: str, request_id: str) -> Record | None:
        """A listed record with its answer."""
        push = await self.get_push(owner, request_id)
        return None if push is None else push.record

    async def get_push(self, owner: str, request_id: str) -> Push | None:
        """A listed record with what its push needs."""
        return await self._run(queries.find, owner, request_id, self.now_ms)

    async def list(self, owner: str, limit: int, after: str | None) -> list[Record] | None:
        """At most `limit` listed records, newest first, from the one before `after`; None when `after` is unknown."""
        return await self._run(queries.page, owner, limit, after, self.now_ms)

    async def remove(self, owner: str, request_id: str) -> bool:
        """Deletes a listed record and its open push; whether there was one."""
        return await self._run(queries.remove, owner, request_id, self.now_ms)

    async def drop(self, owner: str, request_id: str) -> None:
        """Deletes a record that was begun and will not be completed."""
        await self._run(queries.drop_begun, owner, request_id)

    async def purge(self) -> int:
        """Deletes what has expired, and gives up answers that stream beyond their time; how many were deleted."""
        return await self._run(queries.purge, self.now_ms, self._options.retention_secs * 1000)

    async def claim(self, lease_ms: int, busy_owners: Collection[str]) -> Push | None:
        """The push that is due longest, of an owner not among `busy_owners`; it is due again after the lease."""
        return await self._run(queries.claim, self.now_ms, lease_ms, frozenset(busy_owners))

    async def next_push_ms(self, busy_owners: Collection[str]) -> int | None:
        """When `claim` will find the next push, or None."""
        return await self._run(queries.next_push, self.now_ms, frozenset(busy_owners))

    async def settle(self, push: Push) -> None:
        """The push has been delivered or given up: what was kept for it alone goes."""
        await self._run(queries.settle, push)

    async def postpone(self, push: Push, attempts: int, wait_ms: int) -> None:
        """The push is due again after `wait_ms`."""
        await self._run(queries.postpone, push, attempts, self.now_ms + wait_ms)

    async def _run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await self._database.run(work, *args, **kwargs)
        except StoreUnavailableError as error:
            raise busy() from error.__cause__
