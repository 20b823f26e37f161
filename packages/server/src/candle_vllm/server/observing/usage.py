"""UsageTable: tokens by model and key since the start, for `GET /v1/usage`."""

from __future__ import annotations

import threading
from dataclasses import dataclass

MAX_KEYS = 1000
OTHER_KEYS = "other"
"""Where keys beyond `MAX_KEYS` are added up together."""


@dataclass(frozen=True)
class UsageCounts:
    """Sums over requests: how many, and their tokens as their own `usage` has them."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: UsageCounts) -> UsageCounts:
        """Both together."""
        return UsageCounts(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class UsageRow:
    """The counts of one key with one model."""

    model: str
    key: str
    counts: UsageCounts


class UsageTable:
    """Counts of finished requests by model and key label. Thread-safe."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._rows: dict[tuple[str, str], UsageCounts] = {}

    def add(self, model: str, key: str, counts: UsageCounts) -> None:
        """Adds one request."""
        with self._lock:
            if key not in self._keys:
                if len(self._keys) >= self._max_keys:
                    key = OTHER_KEYS
                else:
                    self._keys.add(key)
            self._rows[model, key] = self._rows.get((model, key), UsageCounts()).plus(counts)

    def rows(self) -> list[UsageRow]:
        """In order of model and key."""
        with self._lock:
            return [UsageRow(model, key, counts) for (model, key), counts in sorted(self._rows.items())]
