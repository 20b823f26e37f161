# SPDX-License-Identifier: MIT
"""ConnectionMemory: responses that are not stored, held while the connection that asked for them is open.

A client that stays connected may continue a response with `store: false`. A limited number of these is held here.
"""

from __future__ import annotations

from collections import OrderedDict

from candle_vllm.openai.fair_threads import apart, this_request
from candle_vllm.responses.store.entries import Entry, Item, items_of

MAX_REMEMBERED = 64  # responses
MAX_BYTES = 32 << 20  # of all of them


class ConnectionMemory:
    """The last responses of one connection, by their ids.

    Args:
        most, most_bytes: limits of responses and of their JSON; the oldest are dropped with their continuations.
    """

    def __init__(self, most: int = MAX_REMEMBERED, most_bytes: int = MAX_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._entries

    def remember(self, entry: Entry) -> None:
        """Hold a response that has ended."""
        self.forget(entry.id)
        self._entries[entry.id] = entry
        self._bytes += _size(entry)
        while self._entries and (len(self._entries) > self._most or self._bytes > self._most_bytes):
            self.forget(next(iter(self._entries)))

    def forget(self, response_id: str) -> None:
        """Drop a response and those that follow it, which cannot be continued without it."""
        gone = [response_id] if response_id in self._entries else []
        for name in gone:
            self._bytes -= _size(self._entries.pop(name))
            gone += [other for other, entry in self._entries.items() if entry.follows == name]

    async def history(self, response_id: str) -> tuple[list[Item], str | None]:
        """Items up to the end of a held response, and the id of the stored response that precedes them."""
        chain: list[Entry] = []
        before: str | None = response_id
        while before is not None and before in self._entries:
            chain.append(self._entries[before])
            before = chain[-1].follows or None
        this_request().add(sum(map(_size, chain)))
        items = await apart(lambda: [item for entry in reversed(chain) for item in items_of(entry.body, entry.given)])
        return items, before


def _size(entry: Entry) -> int:
    return len(entry.body) + len(entry.given)
