# SPDX-License-Identifier: MIT
"""Token counts by model and key, and the buckets of token counts."""

from __future__ import annotations

import threading

import msgspec

MAX_KEYS = 1000
OTHER_KEYS = "other"
"""Label under which the keys beyond `MAX_KEYS` are counted together."""


def token_buckets(most: int) -> tuple[float, ...]:
    """Return the bounds 1, 2, 5, 10, 20, 50 ... up to `most` tokens."""
    bounds: list[float] = []
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step > most:
                return tuple(bounds) or (1,)
            bounds.append(factor * step)
        step *= 10


class UsageCounts(msgspec.Struct, frozen=True):
    """Requests that have ended, and their tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: UsageCounts) -> UsageCounts:
        """Return the sum of both."""
        return UsageCounts(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class UsageRow(msgspec.Struct, frozen=True):
    """The counts of one API key with one model."""

    model: str
    key: str
    counts: UsageCounts


class UsageTable:
    """Counts of finished requests by model and key label, for `GET /v1/usage`, or by model and adapter. Thread-safe."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self.max_keys = max_keys
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._rows: dict[tuple[str, str], UsageCounts] = {}

    def add(self, model: str, key: str, counts: UsageCounts) -> None:
        """Add the counts of one request."""
        with self._lock:
            if key not in self._keys:
                if len(self._keys) >= self.max_keys:
                    key = OTHER_KEYS
                else:
                    self._keys.add(key)
            self._rows[model, key] = self._rows.get((model, key), UsageCounts()).plus(counts)

    def rows(self) -> list[UsageRow]:
        """Return the rows in order of model and key."""
        with self._lock:
            return [UsageRow(model, key, counts) for (model, key), counts in sorted(self._rows.items())]
