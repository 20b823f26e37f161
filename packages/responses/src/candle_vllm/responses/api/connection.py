# SPDX-License-Identifier: MIT
"""ConnectionMemory: responses of a client's connection, held while it is open, whether they are stored or not.

The client may continue them on this connection, also with `store: false`. Their number and size are limited.
"""

from __future__ import annotations

from collections import OrderedDict

from candle_vllm.openai.fair_threads import apart, this_request
from candle_vllm.responses.store.entries import Entry, Item, items_of

MAX_REMEMBERED = 64  # maximum number of held responses
MAX_BYTES = 32 << 20  # bytes of all held responses together


class ConnectionMemory:
    """The last responses of one connection, by their ids.

    Beyond `MAX_REMEMBERED` responses, or `MAX_BYTES` of their JSON, the oldest are dropped with their continuations.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._entries

    def remember(self, entry: Entry) -> None:
        """Hold a finished response."""
        self.forget(entry.id)
        self._entries[entry.id] = entry
        self._bytes += _size(entry)
        while self._entries and (len(self._entries) > MAX_REMEMBERED or self._bytes > MAX_BYTES):
            self.forget(next(iter(self._entries)))

    def forget(self, response_id: str) -> None:
        """Drop a response and its continuations, which cannot be continued without it."""
        gone = [response_id] if response_id in self._entries else []
        for name in gone:
            self._bytes -= _size(self._entries.pop(name))
            gone += [other for other, entry in self._entries.items() if entry.follows == name]

    async def history(self, response_id: str) -> tuple[list[Item], str | None]:
        """Return the items of a chain's held responses, and the id of its latest response that is not held, or None."""
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
