# SPDX-License-Identifier: MIT
"""MailboxStore: answers and their pending pushes, by the hash of the API key and the answer's id; and their wire types.

A record is made at step 10 of a request's life, when the answer is complete or has failed, or earlier as `streaming`.
An answer that its client may fetch is an entry of the kind `answer`, an answer that is only pushed is a `push`. The
lease of a streaming answer ends a minute after its request's deadline; any other lease ends when a push is due.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.core.errors import EngineDeadError
from candle_vllm.openai import to_error, to_json_bytes
from candle_vllm.openai.errors import ErrorBody, ErrorEnvelope, GenerationFailedError
from candle_vllm.responses.store.backend import Bounds, Held, Place, backend_at
from candle_vllm.responses.store.entries import Entry
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.mailbox.options import MailboxOptions

if TYPE_CHECKING:
    from candle_vllm.responses.store.sql import SqlBackend

SETTING = "mailbox"
ANSWER, PUSH = "answer", "push"


class Status(StrEnum):
    """The state of an answer."""

    COMPLETED = "completed"
    STREAMING = "streaming"  # still being generated
    VALIDATION_ERROR = "validation_error"
    MODEL_ERROR = "model_error"
    INTERNAL_ERROR = "internal_error"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as clients and webhooks see it.

    Attributes:
        request_id: the id of the answer, `chatcmpl-...` or `cmpl-...`.
        model: first name of the model that answered.
        created: Unix seconds at which the record was made.
        status: state of the answer.
        response: the whole OpenAI answer, or the error envelope; absent while it streams and in lists.
    """

    request_id: str
    model: str
    created: int
    status: Status
    response: msgspec.Raw | UnsetType = UNSET


class RecordList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of records, newest first, without their answers."""

    object: str = "list"
    data: Sequence[Record]
    has_more: bool


class MailboxError(HttpError):
    """An error of the mailbox; `param` is a header, a parameter of the URL or a field."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, {"retry-after": "1"} if status == 503 else None, param=param)


def invalid(param: str, text: str) -> MailboxError:
    """Return the 400 for an invalid value of the parameter `param`; `text` follows its name in the message."""
    return MailboxError(400, f"{param} {text}", "invalid_value", param)


def not_found(request_id: str) -> MailboxError:
    """Return the 404 for a record that this key does not have, even if another key has it."""
    return MailboxError(
        404, f"The mailbox has no record {request_id!r:.80} of this API key.", "not_found", "request_id"
    )


def settled(answer: msgspec.Struct | bytes | Exception, most: int) -> tuple[Status, bytes]:
    """Return the status and the JSON of an answer, or of the failure of its request.

    `answer` is OpenAI's answer object, its JSON, or the exception that ended the request. An answer of more than `most`
    bytes becomes an error that says so, because half an answer is of no use.
    """
    if isinstance(answer, Exception):
        error = to_error(answer)
        status = Status.VALIDATION_ERROR if error.status < 500 else Status.INTERNAL_ERROR
        failed = isinstance(answer, GenerationFailedError | EngineDeadError)
        return Status.MODEL_ERROR if failed else status, to_json_bytes(error.body)
    data = answer if isinstance(answer, bytes) else to_json_bytes(answer)
    if len(data) <= most:
        return Status.COMPLETED, data
    text = f"The answer has {len(data)} bytes, and the mailbox stores answers of at most {most} bytes."
    return Status.INTERNAL_ERROR, failure_body(text, "answer_too_large")


def failure_body(message: str, code: str) -> bytes:
    """Return an error envelope of the mailbox itself, as JSON."""
    return to_json_bytes(ErrorEnvelope(error=ErrorBody(message=message, type="server_error", code=code)))


_LOST = failure_body("The server was stopped before the answer was complete.", "request_aborted")


@dataclass(frozen=True)
class StoredAnswer:
    """An answer with the data of its push.

    Attributes:
        owner: hash of the API key.
        response: JSON; None while it streams.
        expires: time of its deletion, or the end of a streaming answer's lease (ms since 1970).
        listed: whether its client may fetch it; otherwise it is only pushed.
        push: whether a push is pending; `put` makes it due at once.
        url: URL for the push; None is the operator's webhook.
        bearer: token for `url`, or None.
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
        """The record that clients and webhooks see."""
        fields = {} if self.response is None else {"response": msgspec.Raw(self.response)}
        seconds = self.created // 1000
        return Record(request_id=self.request_id, model=self.model, created=seconds, status=self.status, **fields)

    @property
    def held(self) -> Held:
        """The key of the entry in the store, with the push's id as its holder."""
        return Held(self.owner, self.request_id, self.delivery_id)

    def about(self, attempts: int = 0, *, pushed: bool = False) -> dict[str, object]:
        """Return the metadata of the store's entry; after the push, without URL and token."""
        where = {} if pushed else {"url": self.url, "bearer": self.bearer}
        return {"model": self.model, "attempts": attempts, **where}


class MailboxStore:
    """The stored answers. Calls raise `StoreUnavailableError` if the store fails or does not answer in time."""

    def __init__(self, options: MailboxOptions, clock: Callable[[], float] = time.time) -> None:
        place = Place(options.url, "mailbox", "mailbox", SETTING)
        self.backend: SqlBackend = backend_at(place, Bounds(options.max_records, options.max_records_per_key), clock)
        self.open, self.close, self.owner = self.backend.open, self.backend.close, self.backend.owner
        self._retention = options.retention_secs * 1000

    @property
    def now(self) -> int:
        """The store's clock, in milliseconds since 1970."""
        return self.backend.now

    async def put(self, answer: StoredAnswer) -> int:
        """Store an answer, replacing one with the same owner and id; return how many others it displaced."""
        lease = answer.expires if answer.status is Status.STREAMING else self.now if answer.push else None
        return await self.backend.put(
            Entry(
                kind=ANSWER if answer.listed else PUSH, owner=answer.owner, id=answer.request_id, created=self.now,
                status=answer.status, expires=answer.expires, lease=lease, holder=answer.delivery_id,
                about=answer.about(), body=answer.response or b"",
            )
        )  # fmt: skip

    async def get(self, owner: str, request_id: str) -> StoredAnswer | None:
        """Return a listed answer, or None."""
        found = await self.backend.get(ANSWER, owner, request_id)
        return None if found is None else _answer(found)

    async def page(self, owner: str, limit: int, after: str | None) -> list[Record] | None:
        """Return at most `limit` listed records after the id `after`, newest first; None if `after` is unknown."""
        found = await self.backend.page(ANSWER, owner, limit, after)
        return None if found is None else [_answer(entry).record for entry in found]

    async def remove(self, owner: str, request_id: str, status: Status | None = None) -> bool:
        """Delete a listed answer (of this status, if given) and its pending push; return whether there was one."""
        return await self.backend.delete(ANSWER, owner, request_id, status=status)

    async def purge(self) -> list[StoredAnswer]:
        """Delete expired answers, and turn streaming answers past their deadline into errors.

        Return the deleted answers whose push was due, without their contents.
        """
        for lost in await self.backend.lapsed():
            name, expires = (lost.kind, lost.owner, lost.id), self.now + self._retention
            status = Status.INTERNAL_ERROR
            await self.backend.change(*name, _LOST, status=status, lease_was=lost.lease, expires=expires)
        now = self.now
        deleted = await self.backend.expire()  # a push with a later lease is being sent, and its end is reported
        return [_answer(entry) for entry in deleted if entry.lease is not None and entry.lease <= now]

    async def claim(self, lease_ms: int, busy_owners: Collection[str]) -> StoredAnswer | None:
        """Claim the push that has been due longest, not of `busy_owners`; it is due again after the lease."""
        found = await self.backend.claim_due(self.now + lease_ms, busy_owners)
        return None if found is None else _answer(found)

    async def next_push(self, busy_owners: Collection[str]) -> int | None:
        """Return the time at which `claim` will find a push, or None."""
        return await self.backend.next_due(busy_owners)

    async def settle(self, push: StoredAnswer) -> None:
        """Record that a push was delivered or given up; an answer that is not listed is deleted."""
        if push.listed:
            await self.backend.move([push.held], None, msgspec.json.encode(push.about(pushed=True)))
        else:
            await self.backend.delete(PUSH, push.owner, push.request_id, holder=push.delivery_id)

    async def postpone(self, push: StoredAnswer, attempts: int, wait_ms: int) -> None:
        """Make the push due again after `wait_ms`, and store the number of failed attempts."""
        await self.backend.move([push.held], self.now + wait_ms, msgspec.json.encode(push.about(attempts)))


def _answer(entry: Entry) -> StoredAnswer:
    about, holder = entry.about, entry.holder
    if holder is None:  # the answer was lost, and its lease ended: an id that is the same for each of its pushes
        holder = hashlib.sha256(f"{entry.owner} {entry.id} {entry.created}".encode()).hexdigest()[:32]
    return StoredAnswer(
        entry.owner, entry.id, about["model"], Status(entry.status), entry.body or None, entry.expires or 0,
        listed=entry.kind == ANSWER, push=entry.lease is not None and not entry.active, url=about.get("url"),
        bearer=about.get("bearer"), attempts=about["attempts"], delivery_id=holder, created=entry.created,
    )  # fmt: skip
