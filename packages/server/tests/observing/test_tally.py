# SPDX-License-Identifier: MIT
"""Histogram and UsageTable: the same numbers as prometheus-client's, and bounded."""

from __future__ import annotations

import threading

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st

from candle_vllm.server.observing.tally import OTHER_KEYS, Histogram, UsageCounts, UsageTable, token_buckets

BOUNDS = (0.01, 0.1, 1.0, 10.0)
VALUES = st.lists(st.one_of(st.sampled_from((0.0, *BOUNDS)), st.floats(0, 100)), max_size=30)


@given(VALUES, VALUES)
def test_buckets_are_prometheus_clients(first: list[float], second: list[float]) -> None:
    theirs = prometheus_client.Histogram("h", "h", buckets=BOUNDS, registry=None)
    ours, more = Histogram(BOUNDS), Histogram(BOUNDS)
    for value in first:
        theirs.observe(value)
        ours.observe(value)
    before = ours.copy()
    for value in second:
        theirs.observe(value)
        more.observe(value)
    ours.merge(more)
    (family,) = theirs.collect()
    expected = [(sample.labels["le"], sample.value) for sample in family.samples if sample.name == "h_bucket"]
    assert ours.buckets() == expected
    assert abs(ours.total - sum(first) - sum(second)) < 1e-6
    assert sum(before.counts) == len(first)


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
