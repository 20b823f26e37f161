# SPDX-License-Identifier: MIT
"""UsageTable adds up and is bounded; the buckets of token counts."""

from __future__ import annotations

import threading

from candle_vllm.server.observing.request_record import OTHER_KEYS, UsageCounts, UsageTable, token_buckets


def test_buckets_of_token_counts() -> None:
    assert token_buckets(4096) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert token_buckets(1) == (1,)
    assert token_buckets(1 << 24)[-1] == 10_000_000


def test_usage_is_kept_for_so_many_keys() -> None:
    table = UsageTable(max_keys=2)
    for key in ("a", "b", "c", "d", "a"):
        table.add("m", key, UsageCounts(1, 10, 4, 2))
    assert {row.key: row.counts for row in table.rows()} == {
        "a": UsageCounts(2, 20, 8, 4),
        "b": UsageCounts(1, 10, 4, 2),
        OTHER_KEYS: UsageCounts(2, 20, 8, 4),
    }


def test_usage_may_be_added_from_many_threads() -> None:
    table = UsageTable()

    def add() -> None:
        for _ in range(500):
            table.add("m", "k", UsageCounts(1, 1, 1, 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert table.rows()[0].counts == UsageCounts(2000, 2000, 2000, 2000)
