# SPDX-License-Identifier: MIT
"""What stores have in common: their locations, limits and options, the backend that a URL opens, and upkeep.

A store holds entries, such as responses and conversations; some have parts. Each entry belongs to an owner, the hash of
an API key, and has an id that is unique for this owner. Users of a store (`ResponseStore`, the server's mailbox and its
`BatchStore`) define the kinds of entries; a backend does not read their contents. Times are milliseconds since 1970.

A **lease** reserves an entry for a holder until a time. Until then, nobody else can claim or renew it, but others may
still change, end or delete the entry. Kinds of leases (`server/batches/store.py` has two more):

    a response in the background    held and renewed by the server that answers it. An expired lease means that this
                                    server died: the server that finds it ends the response as failed.
    an answer for the mailbox       likewise, but not renewed: the lease ends a minute after the request's deadline.
    a conversation's turn           held and renewed by the response that is generated in the conversation.
    a push to a webhook             due when its lease has ended. A server claims it, tries to push, and ends the lease
                                    or extends it until the next try. The holder is the push, not the server, so that
                                    a server cannot end the lease of a newer push.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from candle_vllm.core.errors import CandleVllmError, ConfigError

SETTING = "responses_store"
MAX_RECORDS = 100_000
MAX_DAYS = 3650
MAX_MB = 1 << 20
MEMORY = "memory"

logger = logging.getLogger(__name__)

Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Place:
    """The location of a store.

    Attributes:
        url: `memory`, or a URL of `BACKENDS`.
        name: prefix of its table names, so that several stores can share a database.
        title: name of the store in messages.
        setting: name of the setting that holds its URL.
    """

    url: str
    name: str
    title: str
    setting: str


@dataclass(frozen=True)
class Bounds:
    """Limits of a store. Beyond them, the least recently used entries of the owner with the most data are dropped.

    Attributes:
        entries: maximum number of entries of all owners.
        owner_entries: maximum number of entries of one owner; beyond it, its least recently used entries are dropped.
        size: maximum bytes of all entries.
        entry_size: maximum bytes of one entry without its parts.
        parts: maximum number of parts of one entry.
        parts_size: maximum bytes of the parts of one entry.
        spares_leased: whether leased entries do not expire, and neither leased nor active entries are dropped, so that
            a new entry may be refused; otherwise only active entries do not expire, and both are dropped last.
        advice: advice for the message about a full store.
        several: whether there are several owners; an owner beyond half of `entries` or `size` then loses its own data.
    """

    entries: int
    owner_entries: int | None = None
    size: int | None = None
    entry_size: int | None = None
    parts: int = 0
    parts_size: int = 0
    spares_leased: bool = False
    advice: str = ""
    several: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Held:
    """An entry and the holder of its lease."""

    owner: str
    id: str
    holder: str


@dataclass(frozen=True)
class StoreOptions:
    """Options of a store of responses and conversations.

    Attributes:
        url: `memory` (ends with the process), or a URL of `BACKENDS`.
        retention_days: days after which a response is deleted; conversations have no such limit.
        max_records: maximum number of responses and conversations; beyond it, the least recently used are deleted.
        max_bytes: maximum bytes of all responses and conversations, likewise.
        max_record_bytes: maximum bytes of one response, input and output together.
        max_item_bytes: maximum bytes of one item as JSON.
        max_items: maximum number of items of one conversation.
        max_conversation_bytes: maximum bytes of the items of one conversation.
        max_chain: maximum number of responses that follow each other by `previous_response_id`.
        max_chain_bytes: maximum bytes of the responses of such a chain, input and output together.
    """

    url: str = field(default=MEMORY, repr=False)
    retention_days: int = 30
    max_records: int = 10_000
    max_bytes: int = 256 << 20
    max_record_bytes: int = 32 << 20
    max_item_bytes: int = 4 << 20
    max_items: int = 10_000
    max_conversation_bytes: int = 64 << 20
    max_chain: int = 1000
    max_chain_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, high in (
            ("retention_days", MAX_DAYS), ("max_records", MAX_RECORDS), ("max_bytes", MAX_MB << 20),
            ("max_record_bytes", 1 << 30), ("max_item_bytes", 1 << 30), ("max_items", 1_000_000),
            ("max_conversation_bytes", 1 << 32), ("max_chain", 100_000), ("max_chain_bytes", 1 << 32),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise ConfigError(f"{name} must be a whole number from 1 to {high}, not {value!r:.40}", name)

    @property
    def place(self) -> Place:
        return Place(self.url, "responses", "store of responses", SETTING)

    @property
    def bounds(self) -> Bounds:
        return Bounds(
            self.max_records,
            size=self.max_bytes,
            entry_size=self.max_record_bytes,
            parts=self.max_items,
            parts_size=self.max_conversation_bytes,
            spares_leased=True,
            advice="Send less, or let the operator raise --responses-max-mb.",
        )


# ---- which backend a URL opens ---------------------------------------------------------------------------------------


BACKENDS = ("sqlite:///", "postgresql://", "postgresql+psycopg://", "postgres://")
"""Beginnings of the URLs of SQL databases; the last two are aliases."""
URLS = ("sqlite:///path", "postgresql://user:password@host/database")  # in messages
SHORT_URLS = ("sqlite:///path", "postgresql://...")  # in the help of flags


def backend_at(place: Place, bounds: Bounds, clock: Callable[[], float]) -> Any:
    """Return the backend of a store, a `SqlBackend`, not opened yet; `clock` returns seconds since 1970.

    Raises ConfigError if the place is neither `memory` nor a URL of `BACKENDS`.
    """
    if place.url != MEMORY and not place.url.startswith(BACKENDS):
        raise wrong_url(place)
    return import_module(f"{__package__}.sql").SqlBackend(place, bounds, clock)  # SQLAlchemy is slow to import


async def open_backend(place: Place, bounds: Bounds, clock: Callable[[], float]) -> Any:
    """Return the backend of a store, a `SqlBackend`, opened; ConfigError if that fails."""
    backend = await asyncio.to_thread(backend_at, place, bounds, clock)  # it imports SQLAlchemy
    try:
        await backend.open()
    except BaseException:
        await backend.close()
        raise
    return backend


def wrong_url(place: Place) -> ConfigError:
    """Return the error for a URL that opens no backend; it omits the URL, which may have a password."""
    return ConfigError(f"{place.setting} must be {' or '.join(URLS)}", place.setting)


class Upkeep:
    """Repeats `work` until it is closed; a failure is logged, and the work is tried again next time.

    Args:
        seconds: time from the end of one run to the next.
        failure: log message for a failed run.
        at_once: whether the first run begins at once; otherwise it begins after `seconds`.
    """

    def __init__(
        self, seconds: float, work: Callable[[], Awaitable[object]], failure: str, *, at_once: bool = False
    ) -> None:
        async def repeat(wait: float) -> None:
            while True:
                await asyncio.sleep(wait)
                try:
                    await work()
                except CandleVllmError as error:
                    logger.warning("%s: %s", failure, error.__cause__ or error)
                except Exception:
                    logger.exception(failure)
                wait = seconds

        repeated = repeat(0.0 if at_once else seconds)
        self._task = asyncio.create_task(repeated, context=Context())  # not in the opening request's context

    async def close(self) -> None:
        """End the work, even during a run."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
