# SPDX-License-Identifier: MIT
"""docs/metrics.md and the dashboard speak of the series that there are."""

from __future__ import annotations

import json
import re

from candle_vllm.server.observing.request_record import MAX_KEYS
from candle_vllm.server.observing.series import ALL_SERIES
from packages.server.tests.observing.dashboard_queries import ROOT, expressions, names_in, process_series

ROW = re.compile(r"\| `([a-z_:0-9]+)` \| (counter|gauge|histogram) \| (.*?) \| (.*) \|")
SUFFIXES = ("_bucket", "_sum", "_count")


def test_the_page_lists_every_series_as_it_is() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = [match.groups() for line in page.splitlines() if (match := ROW.fullmatch(line))]
    expected = [
        (series.name, series.kind, ", ".join(f"`{label}`" for label in series.labels) or "–", series.help)
        for series in (*ALL_SERIES, *process_series())
    ]
    assert rows == expected
    assert f"beyond {MAX_KEYS} keys" in " ".join(page.split())


def test_the_page_mentions_no_other_series() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    known = {series.name for series in (*ALL_SERIES, *process_series())}
    assert set(re.findall(r"`((?:vllm|candle_vllm):[a-z_0-9]+)`", page)) <= known


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    names = {series.name for series in (*ALL_SERIES, *process_series()) if series.kind != "histogram"}
    names |= {series.name + suffix for series in ALL_SERIES if series.kind == "histogram" for suffix in SUFFIXES}
    asked = list(expressions())
    assert len(asked) > 30
    for panel, expression in asked:
        found = names_in(expression)
        assert found, panel
        assert found <= names, panel


def test_the_dashboard_shows_every_series_but_a_second_name() -> None:
    shown = {name for _, expression in expressions() for name in names_in(expression)}
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {series.name for series in ALL_SERIES} - bare == {"vllm:time_per_output_token_seconds"}


def test_panels_do_not_overlap() -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "candle-vllm.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        mine = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert not mine & cells
        assert max(column for column, _ in mine) < 24
        cells |= mine
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_series_are_named_as_prometheus_wants_them() -> None:
    names = [series.name for series in ALL_SERIES]
    assert len(names) == len(set(names))
    for series in ALL_SERIES:
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert list(series.buckets) == sorted(set(series.buckets))
        assert series.help.endswith(".")
