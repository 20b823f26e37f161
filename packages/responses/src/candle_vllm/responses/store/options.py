# SPDX-License-Identifier: MIT
"""The operator's options of the store: its location, its limits, and how long it holds responses."""

from __future__ import annotations

from dataclasses import dataclass, field

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.store.backend import MEMORY, Bounds, Place

SETTING = "responses_store"
MAX_RECORDS = 100_000
MAX_DAYS = 3650
MAX_MB = 1 << 20


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
        max_chain_bytes: maximum bytes of the items of such a chain.
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
        """Location of the store."""
        return Place(self.url, "responses", "store of responses", SETTING)

    @property
    def bounds(self) -> Bounds:
        """Limits of the store."""
        return Bounds(
            self.max_records,
            size=self.max_bytes,
            entry_size=self.max_record_bytes,
            parts=self.max_items,
            parts_size=self.max_conversation_bytes,
            spares_leased=True,
            advice="Send less, or let its operator raise --responses-max-mb.",
        )
