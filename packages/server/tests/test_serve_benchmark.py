# SPDX-License-Identifier: MIT
"""The benchmark of the server runs from end to end for a few seconds, and what it notes and judges is right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "benchmarks" / "serve"
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules that start no process."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(SCRIPTS)
    yield {name: importlib.import_module(name) for name in ("figures", "client", "load")}
    for name in {path.stem for path in SCRIPTS.glob("*.py")} - known:
        sys.modules.pop(name, None)


def _chunk(*texts: str, **more: str) -> bytes:
    events = [json.dumps({"delta": more | {"content": text}}, separators=(",", ":")) for text in texts]
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


def test_load_runs() -> None:
    command = [sys.executable, str(SCRIPTS / "run.py"), "load", "--quick", "--streams", "1", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["streams"] for line in lines] == [1, 4]
    for line in lines:
        assert {"machine", "commit", "versions", "date"} <= line.keys()
        assert line["failures"] == []
        assert line["probes"] > 0
        assert line["share_of_offered"] > 0
        assert line["gap_ms"]["p50"] > 0
        assert line["delay_ms"]["p50"] > 0
        assert min(line["server_rss_mb"]) > 10
        assert line["server_cpu_s_per_1000_tokens"] > 0


def test_out_of_range() -> None:
    command = [sys.executable, str(SCRIPTS / "run.py"), "load", "--streams", "100000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "--streams must be" in run.stderr


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
async def test_answers_are_read_however_they_are_cut(scripts: dict[str, ModuleType], size: int) -> None:
    client_module = scripts["client"]
    notes = client_module.Notes()
    notes.open = True
    client = client_module.StreamClient(b"", notes)
    first, rest = _chunk("", role="assistant") + _chunk(" 1000000:1250000"), _chunk(" 1300000", " 1350000")
    answer = HEAD + first + rest + b"0\r\n\r\n"
    for at in range(0, len(answer), size):
        client.data_received(answer[at : at + size])
    assert client.done.done()
    assert (notes.begun, notes.tokens, notes.failures) == (1, 3, [])
    assert notes.gaps.count == 2
    assert notes.delays.count == 3


async def test_what_is_no_stream_is_a_failure(scripts: dict[str, ModuleType]) -> None:
    client_module = scripts["client"]
    notes = client_module.Notes()
    client_module.StreamClient(b"", notes).data_received(b"HTTP/1.1 503 Service Unavailable\r\n\r\nfull")
    ended = client_module.StreamClient(b"", notes)
    ended.data_received(HEAD + _chunk(" 1:2"))
    ended.connection_lost(None)
    assert len(notes.failures) == 2
    assert "503" in notes.failures[0]
    assert "closed" in notes.failures[1]


def test_percentiles(scripts: dict[str, ModuleType]) -> None:
    histogram = scripts["figures"].Histogram()
    assert histogram.percentile(0.5) == 0
    for milliseconds in range(1, 101):
        histogram.add(milliseconds / 1e3)
    histogram.add(7.0)
    figures = histogram.milliseconds()
    assert figures["p50"] == pytest.approx(51, abs=0.2)
    assert figures["p99"] == pytest.approx(100, abs=0.2)
    assert figures["max"] == 7000


def test_bars(scripts: dict[str, ModuleType]) -> None:
    good: dict[str, Any] = {
        "gap_ms": {"p50": 50.0, "p99": 60.0},
        "rate": 20.0,
        "stalls": 0,
        "first_token_above_engine_ms": {"p50": 3.0},
        "failures": [],
        "server_rss_mb": [90.0, 100.0, 100.5],
    }
    judge = scripts["load"].bars
    assert all(judge(good, minutes=True).values())
    worse = {
        "no_stall_over_250_ms": {"stalls": 1},
        "p99_gap_under_2_medians": {"gap_ms": {"p50": 50.0, "p99": 100.0}},
        "first_token_under_15_ms_above_engine": {"first_token_above_engine_ms": {"p50": 15.0}},
        "no_failures": {"failures": ["closed"]},
        "memory_flat": {"server_rss_mb": [90.0, 100.0, 105.0]},
    }
    for bar, change in worse.items():
        assert [name for name, met in judge(good | change, minutes=True).items() if not met] == [bar]
