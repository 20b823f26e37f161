# SPDX-License-Identifier: MIT
"""The attacks of the benchmark are told apart, and one of them against a server gives a row that is judged rightly."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from benchmarks.attacks.attacks import ATTACKS
from benchmarks.attacks.harness import HEADER, against, judged, line
from benchmarks.attacks.wire import KEYS
from candle_vllm.core.testing import ScriptedEngine
from tests.live_server import serving


def test_attacks_are_told_apart_and_say_what_they_are() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names) > 20
    assert all(attack.run.__doc__ and attack.allowed and attack.memory > 0 for attack in ATTACKS)


def test_an_attack_gives_a_row() -> None:
    attack = next(one for one in ATTACKS if one.name == "drip")
    with serving(ScriptedEngine(lambda _: "Hello.", name="demo"), api_key=tuple(KEYS.values())) as url:
        address = urlsplit(url)
        row = against(attack, (address.hostname, address.port), os.getpid(), 0.3)
    assert row["statuses"] == {"open": 200}
    assert row["health"]["answers"] > 0
    assert row["health"]["failed"] == 0
    assert row["neighbour"]["before"] is not None
    assert row["neighbour"]["after"] is not None
    missed = judged(attack, row, bar=60)
    assert missed["missed"] == []
    assert line(missed).count(" | ") == HEADER.split("\n")[0].count(" | ")


def test_what_misses_a_bar_is_marked() -> None:
    attack = next(one for one in ATTACKS if one.name == "ws-bad-text")
    idle = {"slowest": 0.01, "answers": 9, "failed": 0}
    times = {"before": 0.1, "during": [0.2], "after": 0.1}
    right = {"statuses": {"closed": 3}, "missed": [], "note": "", "memory": 1.0, "resident": 2.0,
             "health": idle, "idle": idle, "neighbour": times}  # fmt: skip
    assert judged(attack, right, 0.5)["missed"] == []
    for wrong in (
        {"statuses": {"500": 1}},
        {"memory": 1e6},
        {"health": idle | {"slowest": 0.6}},
        {"health": idle | {"failed": 1}},
        {"neighbour": times | {"during": [None]}},
        {"missed": ["a bar of its own"]},
    ):
        row = judged(attack, right | wrong, 0.5)
        assert len(row["missed"]) == 1, wrong
        assert "**" in line(row)
