# SPDX-License-Identifier: MIT
"""The protocol of a store: what its users expect, and a backend implements.

A store holds entries: responses, conversations with their parts, answers of the mailbox. Each entry belongs to an
owner, the hash of an API key, and has an id that is unique for this owner. Users of a store (`KeptResponses`, and the
server's mailbox) define kinds of entries; a backend knows only what follows here. Times are milliseconds since 1970.

A **lease** reserves an entry: it is a time and the name of a holder. Until that time, only the holder may change it,
and renew it; afterwards, anyone may claim the entry. There are four kinds of leases:

    a response in the background    held and renewed by the server that answers it. An expired lease means that this
                                    server died: whoever finds it ends the response as failed.
    an answer for the mailbox       likewise; the lease ends at the request's deadline, and is not renewed.
    a conversation's turn           held and renewed by the response that is being answered in it.
    a push to a webhook             due when its lease has ended: the server that claims it extends it, and then ends
                                    or extends it again. Its holder is the push itself, so that no newer push is ended.
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
    """Location of a store.

    Attributes:
        url: `memory`, or the URL of a database.
        name: prefix of its tables' names, so that several stores can share a database.
        title: name of the store in messages.
        setting: name of the setting that holds its URL.
    """

    url: str
    name: str
    title: str
    setting: str


@dataclass(frozen=True)
class Bounds:
    """Limits of a store. If they are exceeded, the oldest entries of the owner with the most are dropped.

    Attributes:
        entries: maximum number of entries of all owners.
        owner_entries: maximum number of entries of one owner, whose own oldest are dropped.
        size: maximum bytes of all entries.
        entry_size: maximum bytes of one entry without its parts.
        parts: maximum number of parts of one entry.
        parts_size: maximum bytes of the parts of one entry.
        spares_leased: whether to refuse new entries rather than drop leased ones, which are otherwise dropped last.
        advice: advice for the message about a full store.
        several: whether there are several owners; then each has half of entries and size, and drops its own oldest.
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


class Backend(Protocol):
    """A store; opened, used and closed in one event loop. Every method is atomic for all servers that share it.

    All methods except `close` and `owner` raise StoreUnavailableError if the store is too slow or has too many calls.
    """

    @property
    def now(self) -> int:
        """Present time of the store."""
        ...

    async def open(self) -> None:
        """Connect, and create what is missing; ConfigError if that fails."""
        ...

    async def close(self) -> None:
        """Wait for the running call; waiting calls are dropped."""
        ...

    def owner(self, key: str) -> str:
        """Return the owner of an API key's data; without keys (""), all share one owner."""
        ...

    # ---- entries -----------------------------------------------------------------------------------------------------

    async def put(self, entry: Entry, names: Collection[str] = (), parts: Sequence[EntryItem] = ()) -> int:
        """Store an entry, and replace one with its owner and id; return how many others were dropped to make room.

        An active entry is replaced at its position in lists; any other is deleted first.

        Args:
            entry: new entry.
            names: names of its contents, for `find`.
            parts: first parts of the entry.

        Raises:
            StoreLimitError: the entry exceeds the limit of one entry, or the store.
        """
        ...

    async def get(self, kind: str, owner: str, name: str) -> Entry | None:
        """Return an entry that has not expired; an active one never expires."""
        ...

    async def page(self, kind: str, owner: str, limit: int, after: str | None = None) -> list[Entry] | None:
        """Return records without contents, newest first, from the one before `after`; None if that is unknown."""
        ...

    async def chain(self, kind: str, owner: str, name: str, most: int, most_size: int) -> list[Entry]:
        """Return an entry and those that it follows, the newest first.

        The chain ends with its first entry, with a missing or an active one, or when it exceeds `most` entries or
        `most_size` bytes; a chain that reaches its first entry counts as used now.
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
        """Write the progress of an entry; False if it is not in the expected state, or does not exist.

        Args:
            kind: kind of the entry.
            owner: owner of the entry.
            name: id of the entry.
            body: new body.
            status: new status of an active entry; None for an inactive one: its status and lease do not change.
            lease: new end of the lease; None ends it.
            lease_was: expected lease; with it, limits are ignored, so that an entry with an expired lease can be ended.
            expires: new time of expiry; None leaves it.
            names: further names of its contents.

        Raises:
            StoreLimitError: the entry exceeds the limit of one entry, or the store.
        """
        ...

    async def delete(
        self, kind: str, owner: str, name: str, *, status: str | None = None, holder: str | None = None
    ) -> bool:
        """Delete an entry that `get` would find, with this status and this holder; return whether it existed."""
        ...

    async def expire(self) -> int:
        """Delete expired entries; return their number."""
        ...

    async def find(self, owner: str, names: Sequence[str]) -> tuple[list[EntryItem], list[Entry]]:
        """Return the parts with these ids, and the entries whose contents have these names."""
        ...

    # ---- parts -------------------------------------------------------------------------------------------------------
    # all raise NotStoredError if the entry does not exist

    async def append(
        self, kind: str, owner: str, name: str, parts: Sequence[EntryItem], *, skip_known: bool = False
    ) -> int:
        """Add parts at the end, all or none; return how many entries were dropped to make room.

        With `skip_known`, parts that exist already are not changed; otherwise they are refused.

        Raises:
            StoreLimitError: the parts exceed the limits.
            InvalidParameterError: an id exists already.
        """
        ...

    async def parts(
        self, kind: str, owner: str, name: str, limit: int | None = None, order: Order = "asc", after: str | None = None
    ) -> list[EntryItem] | None:
        """Return at most `limit` parts after `after`; None if it is unknown. Without a limit, this counts as a use."""
        ...

    async def part(self, kind: str, owner: str, name: str, part: str) -> EntryItem | None:
        """Return one part."""
        ...

    async def delete_part(self, kind: str, owner: str, name: str, part: str) -> bool:
        """Delete one part; return whether it existed."""
        ...

    # ---- leases ------------------------------------------------------------------------------------------------------

    async def claim(self, kind: str, what: Held, until: int) -> bool:
        """Give an entry's lease to a holder; False while another has it; NotStoredError if the entry does not exist."""
        ...

    async def claim_due(self, until: int, busy_owners: Collection[str]) -> Entry | None:
        """Claim until a time the inactive entry whose lease ended first, of an owner not among these."""
        ...

    async def next_due(self, busy_owners: Collection[str]) -> int | None:
        """Time when `claim_due` will find its next entry, or None."""
        ...

    async def move(self, held: Sequence[Held], until: int | None, about: bytes | None = None) -> set[Held]:
        """Change the end of leases, or end them with None; return those that their holder no longer has.

        Args:
            held: entries and their holders.
            until: new end of the leases; None ends them.
            about: new summary of the entries; None leaves it.
        """
        ...

    async def lapsed(self, busy_owners: Collection[str] = ()) -> list[Entry]:
        """Return some active entries whose lease has expired, of owners not among these, the oldest first."""
        ...
