# SPDX-License-Identifier: MIT
"""What the benchmarks share: histograms, facts of the machine, lines of JSON."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEP = 1e-4  # seconds of a bucket
BUCKETS = 20_000  # two seconds; what is longer counts in the last one


class Histogram:
    """Durations in buckets of 0.1 ms, and the longest one as it was."""

    def __init__(self) -> None:
        self._counts = [0] * BUCKETS
        self.count = 0
        self.longest = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Counts a duration; one below zero counts as zero."""
        self._counts[min(max(int(seconds / STEP), 0), BUCKETS - 1)] += times
        self.count += times
        if seconds > self.longest:
            self.longest = seconds

    def percentile(self, share: float) -> float:
        """Seconds below which this share of the durations lies, to the middle of a bucket; 0 without any."""
        left = share * self.count
        for number, count in enumerate(self._counts):
            left -= count
            if left <= 0 and self.count:
                return (number + 0.5) * STEP
        return 0.0

    def milliseconds(self) -> dict[str, float]:
        """p50, p99 and the longest."""
        return {
            "p50": round(1e3 * self.percentile(0.5), 2),
            "p99": round(1e3 * self.percentile(0.99), 2),
            "max": round(1e3 * self.longest, 2),
        }


@functools.cache
def facts() -> dict[str, Any]:
    """What stands in every line: machine, commit, versions, date."""
    return {
        "machine": _machine(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("uvicorn", "fastapi")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _commit() -> str:
    """Of the files that are measured, with "+" where they differ from it; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def report(benchmark: str, **figures: Any) -> None:
    """One result as a line of JSON, with the machine's facts behind it."""
    line = {"benchmark": f"serve/{benchmark}", **figures, **facts()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
