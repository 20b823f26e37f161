# SPDX-License-Identifier: MIT
"""What a store must do: the protocol between what is kept and where it is kept.

A store holds entries: responses, conversations with their parts, answers of the mailbox. Each belongs to an owner,
the hash of an API key, and has an id of its own among that owner's. What a kind of entry means is known to those
who keep it (`KeptResponses`, and the server's mailbox); a backend knows what follows here, and no more. Times are
milliseconds since 1970.

A **lease** says who has an entry: a time and the name of a holder. Until that time it is the holder's, who may move
the time; from then on whoever comes gets it. There are four, told in these words alone:

    a response in the background    held by the server that answers it, who renews it. One that is over means that
                                    the server died: whoever sees that ends the response as failed.
    an answer for the mailbox       likewise; its time is its request's deadline, and is not renewed.
    a conversation's turn           held by the response that is answered in it, who renews it.
    a push to a webhook             due when its lease is over: the server that claims it moves it, and ends it or
                                    moves it again. Its holder is the push itself, so that a newer one is not ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from candle_vllm.responses.store.entries import Entry, EntryItem

MEMORY = "memory"

Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Place:
    """Where a store is.

    Attributes:
        url: `memory`, or of a database.
        name: by which its tables begin: several stores may share a database.
        title: what messages call it.
        setting: the setting that holds its URL.
    """

    url: str
    name: str
    title: str
    setting: str


@dataclass(frozen=True)
class Bounds:
    """How much a store holds. Where there is too much, the oldest of the owner that has most makes room.

    Attributes:
        entries: of all owners.
        owner_entries: of one; its own oldest makes room.
        size: bytes of all entries.
        entry_size: bytes of one without its parts.
        parts: of one entry.
        parts_size: their bytes.
        spares_leased: what somebody has now does not make room, and what is new is refused instead; otherwise it
            makes room last.
        advice: what to do about a store that is full.
        several: whether there are several owners, each of whom may have half of entries and size then; its own oldest
            makes room.
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
    """An entry and who has it."""

    owner: str
    id: str
    holder: str


class Backend(Protocol):
    """A store; opened, used and closed in one event loop. Every method is one step for all servers that share it.

    Every method but `close` and `owner` raises StoreUnavailableError when the store does not answer in time, or too
    many calls wait for it.
    """

    @property
    def now(self) -> int:
        """The store's clock."""
        ...

    async def open(self) -> None:
        """Connects, and makes what has to be there; ConfigError when that cannot be."""
        ...

    async def close(self) -> None:
        """Waits for what is running; what still waits is dropped."""
        ...

    def owner(self, key: str) -> str:
        """Whom what is made with an API key belongs to; "" without keys: then all share one owner."""
        ...

    # ---- entries -----------------------------------------------------------------------------------------------------

    async def put(self, entry: Entry, names: Collection[str] = (), parts: Sequence[EntryItem] = ()) -> int:
        """Keeps an entry in the place of one with its owner and id; how many others had to make room.

        One that is being worked on is completed where it stands in lists; another is deleted before.

        Args:
            entry: the new one.
            names: of what is in it, for `find`.
            parts: its first ones.

        Raises:
            StoreLimitError: it is larger than one may be, or than the store.
        """
        ...

    async def get(self, kind: str, owner: str, name: str) -> Entry | None:
        """An entry that has not expired; one that is being worked on does not."""
        ...

    async def page(self, kind: str, owner: str, limit: int, after: str | None = None) -> list[Entry] | None:
        """Records without their contents, newest first, from the one before `after`; None when that is unknown."""
        ...

    async def chain(self, kind: str, owner: str, name: str, most: int, most_size: int) -> list[Entry]:
        """An entry and those that it follows, the newest first.

        It ends with the first entry, with one that is missing or worked on, or beyond `most` entries or `most_size`
        bytes; what ends with its first entry is used now.
        """
        ...

    async def change(
        self,
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
        """Writes how far an entry is; False when it is not as it should be, or gone.

        Args:
            kind: of the entry.
            owner: whose it is.
            name: its id.
            body: the new one.
            status: of one that is being worked on; None for one that nobody works on: its status and lease stay.
            lease: until then its holder has it; None: nobody has it any more.
            lease_was: only where its lease is still this one, and whatever room there is: so ends what nobody works on.
            expires: when; None leaves it.
            names: of what is in it beside what was.

        Raises:
            StoreLimitError: it is larger than one may be, or than the store.
        """
        ...

    async def delete(
        self, kind: str, owner: str, name: str, *, status: str | None = None, holder: str | None = None
    ) -> bool:
        """Deletes an entry that `get` would find, with this status and this holder; whether there was one."""
        ...

    async def expire(self) -> int:
        """Deletes what has expired; how many."""
        ...

    async def find(self, owner: str, names: Sequence[str]) -> tuple[list[EntryItem], list[Entry]]:
        """The parts with these ids, and the entries that have something with these names in them."""
        ...

    # ---- parts -------------------------------------------------------------------------------------------------------
    # NotStoredError where the entry is not there

    async def append(
        self, kind: str, owner: str, name: str, parts: Sequence[EntryItem], *, skip_known: bool = False
    ) -> int:
        """Adds parts at the end, all or none; how many entries had to make room.

        With `skip_known`, those that are there already stay where they are; otherwise they are refused.

        Raises:
            StoreLimitError: they are too many or too much.
            InvalidParameterError: an id is there already.
        """
        ...

    async def parts(
        self, kind: str, owner: str, name: str, limit: int | None = None, order: Order = "asc", after: str | None = None
    ) -> list[EntryItem] | None:
        """At most `limit` parts behind `after`; None when that is none of them. Who reads all of them uses them now."""
        ...

    async def part(self, kind: str, owner: str, name: str, part: str) -> EntryItem | None:
        """One part."""
        ...

    async def delete_part(self, kind: str, owner: str, name: str, part: str) -> bool:
        """Deletes one part; whether there was one."""
        ...

    # ---- leases ------------------------------------------------------------------------------------------------------

    async def claim(self, kind: str, what: Held, until: int) -> bool:
        """Gives an entry to a holder; False while another one has it, NotStoredError where there is no such entry."""
        ...

    async def claim_due(self, until: int, busy_owners: Collection[str]) -> Entry | None:
        """Of entries that nobody works on, the one that is due longest, of an owner not among these; due again then."""
        ...

    async def next_due(self, busy_owners: Collection[str]) -> int | None:
        """When `claim_due` will find the next one, or None."""
        ...

    async def move(self, held: Sequence[Held], until: int | None, about: bytes | None = None) -> set[Held]:
        """Moves leases, or ends them with None; those that their holder does not have any more.

        Args:
            held: entries and their holders.
            until: the new time; None: nobody has them.
            about: what the entries say of themselves from now on; None leaves it.
        """
        ...

    async def lapsed(self, busy_owners: Collection[str] = ()) -> list[Entry]:
        """Some entries that are worked on by somebody whose lease is over, of owners not among these, oldest first."""
        ...
