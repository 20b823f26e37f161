# SPDX-License-Identifier: MIT
"""What the dashboard asks, and the series that prometheus-client brings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector

from candle_vllm.server.observing.series import Series

ROOT = Path(__file__).parents[4]
NAME = re.compile(r"\b(?:vllm|candle_vllm|http|process)[_:][a-z_:0-9]+")


def process_series() -> list[Series]:
    """Those that prometheus-client brings."""
    families = list(ProcessCollector(registry=CollectorRegistry()).collect())
    assert families
    return [
        Series(family.name + "_total" * (family.type == "counter"), family.type, (), family.documentation)  # type: ignore[arg-type]
        for family in families
    ]


def expressions() -> Iterator[tuple[str, str]]:
    """Panel and expression of every query of the dashboard."""
    board = json.loads((ROOT / "deploy" / "grafana" / "candle-vllm.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def names_in(expression: str) -> set[str]:
    """The series that a PromQL expression speaks of."""
    bare = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", expression)
    return set(NAME.findall(bare))
