# SPDX-License-Identifier: MIT
"""MailboxStore: answers by the hash of their key and their id, with their open pushes.

An answer that its client may fetch is an entry of the kind `answer`, one that is there for its push alone a `push`.
The lease of one that streams is its request's deadline; the lease of another says when it is pushed next.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import msgspec

from candle_vllm.responses.store.backend import Bounds, Held, Place
from candle_vllm.responses.store.entries import Entry
from candle_vllm.responses.store.options import backend_at
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mailbox.record import Record, Status, failure_body

SETTING = "mailbox"
ANSWER, PUSH = "answer", "push"
_LOST = failure_body("The server was stopped before the answer was complete.", "request_aborted")


@dataclass(frozen=True)
class StoredAnswer:
    """An answer with what its push needs.

    Attributes:
        owner: hash of the API key.
        request_id: what it is called.
        model: whose it is.
        status: how far it is.
        response: JSON; None while it streams.
        expires: when it is purged; of a streaming one, when it is given up (ms since 1970).
        listed: its client may fetch it; otherwise it is there for its push alone.
        push: it is to be pushed as soon as possible.
        url: where to; None for the operator's webhook.
        bearer: token for `url`, or None.
        attempts: to push it, that failed before.
        delivery_id: stays the same however often it is tried.
        created: ms since 1970; set by the store.
    """

    owner: str
    request_id: str
    model: str
    status: Status
    response: bytes | None
    expires: int
    listed: bool = True
    push: bool = False
    url: str | None = None
    bearer: str | None = field(default=None, repr=False)
    attempts: int = 0
    delivery_id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = 0

    @property
    def record(self) -> Record:
        """What clients and webhooks see of it."""
        fields = {} if self.response is None else {"response": msgspec.Raw(self.response)}
        seconds = self.created // 1000
        return Record(request_id=self.request_id, model=self.model, created=seconds, status=self.status, **fields)

    @property
    def held(self) -> Held:
        """By which its push is known."""
        return Held(self.owner, self.request_id, self.delivery_id)

    def about(self, attempts: int = 0, *, pushed: bool = False) -> dict[str, object]:
        """What the store says of it in short; once it has been pushed, nothing of where to."""
        where = {} if pushed else {"url": self.url, "bearer": self.bearer}
        return {"model": self.model, "attempts": attempts, **where}


class MailboxStore:
    """Answers; a call that is not answered in time raises StoreUnavailableError."""

    def __init__(self, options: MailboxOptions, clock: Callable[[], float] = time.time) -> None:
        place = Place(options.url, "mailbox", "mailbox", SETTING)
        self.backend = backend_at(place, Bounds(options.max_records, options.max_records_per_key), clock)
        self.open, self.close, self.owner = self.backend.open, self.backend.close, self.backend.owner
        self._retention = options.retention_secs * 1000

    @property
    def now(self) -> int:
        """The store's clock, in milliseconds since 1970."""
        return self.backend.now

    async def put(self, answer: StoredAnswer) -> int:
        """Keeps an answer in place of an older one with its owner and id; how many others had to make room."""
        lease = answer.expires if answer.status is Status.STREAMING else self.now if answer.push else None
        return await self.backend.put(
            Entry(
                kind=ANSWER if answer.listed else PUSH, owner=answer.owner, id=answer.request_id, created=self.now,
                status=answer.status, expires=answer.expires, lease=lease, holder=answer.delivery_id,
                about=answer.about(), body=answer.response or b"",
            )
        )  # fmt: skip

    async def get(self, owner: str, request_id: str) -> StoredAnswer | None:
        """A listed answer."""
        found = await self.backend.get(ANSWER, owner, request_id)
        return None if found is None else _answer(found)

    async def page(self, owner: str, limit: int, after: str | None) -> list[Record] | None:
        """At most `limit` listed records, newest first, from the one before `after`; None when `after` is unknown."""
        found = await self.backend.page(ANSWER, owner, limit, after)
        return None if found is None else [_answer(entry).record for entry in found]

    async def remove(self, owner: str, request_id: str) -> bool:
        """Deletes a listed answer and its open push; whether there was one."""
        return await self.backend.delete(ANSWER, owner, request_id)

    async def drop(self, owner: str, request_id: str) -> None:
        """Deletes an answer that was begun and will not be completed."""
        await self.backend.delete(ANSWER, owner, request_id, status=Status.STREAMING)

    async def purge(self) -> int:
        """Deletes what has expired, and gives up answers that stream beyond their time; how many were deleted."""
        for lost in await self.backend.lapsed():
            name, expires = (lost.kind, lost.owner, lost.id), self.now + self._retention
            status = Status.INTERNAL_ERROR
            await self.backend.change(*name, _LOST, status=status, lease_was=lost.lease, expires=expires)
        return await self.backend.expire()

    async def claim(self, lease_ms: int, busy_owners: Collection[str]) -> StoredAnswer | None:
        """The push that is due longest, of an owner not among `busy_owners`; it is due again after the lease."""
        found = await self.backend.claim_due(self.now + lease_ms, busy_owners)
        return None if found is None else _answer(found)

    async def next_push(self, busy_owners: Collection[str]) -> int | None:
        """When `claim` will find the next push, or None."""
        return await self.backend.next_due(busy_owners)

    async def settle(self, push: StoredAnswer) -> None:
        """The push has been delivered or given up: what was kept for it alone goes."""
        if push.listed:
            await self.backend.move([push.held], None, msgspec.json.encode(push.about(pushed=True)))
        else:
            await self.backend.delete(PUSH, push.owner, push.request_id, holder=push.delivery_id)

    async def postpone(self, push: StoredAnswer, attempts: int, wait_ms: int) -> None:
        """The push is due again after `wait_ms`."""
        await self.backend.move([push.held], self.now + wait_ms, msgspec.json.encode(push.about(attempts)))


def _answer(entry: Entry) -> StoredAnswer:
    about = entry.about
    return StoredAnswer(
        entry.owner, entry.id, about["model"], Status(entry.status), entry.body or None, entry.expires or 0,
        listed=entry.kind == ANSWER, push=entry.lease is not None and not entry.active, url=about.get("url"),
        bearer=about.get("bearer"), attempts=about["attempts"], delivery_id=entry.holder or "", created=entry.created,
    )  # fmt: skip
