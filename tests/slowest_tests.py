# SPDX-License-Identifier: MIT
"""Times of a run of tests: its slowest tests and files, in seconds of CPU and of the clock, and the sums of both.

A plugin of pytest, loaded by the workspace's `conftest.py`: runs of half a minute and more end with the table, and
`--times=FILE` writes all rows as JSON. Where a run is divided (`tests/workers.py`), its workers send their rows to the
process that prints the table.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROWS, FILES = 30, 20
SHORT = 30.0  # seconds; a run that took less prints no table
BEGAN = time.monotonic()

Row = tuple[str, float, float]  # a test's name, seconds of the clock, seconds of CPU
_rows: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=Path, help="write each test's seconds of the clock and of CPU to this JSON file")


def rows() -> list[Row]:
    """Times of the tests of this process, in the order in which they ended."""
    return _rows


def cpu() -> float:
    """Seconds of CPU of this process, all its threads, and the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    wall, used = time.monotonic(), cpu()
    result = yield
    _rows.append((str(item.nodeid), time.monotonic() - wall, cpu() - used))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    took, file = time.monotonic() - BEGAN, terminalreporter.config.option.times
    if file and not terminalreporter.config.pluginmanager.has_plugin("worker"):
        file.write_text(json.dumps(_rows, indent=0))
    if _rows and took >= SHORT:
        terminalreporter.section(f"slowest of {len(_rows)} tests")
        for line in table(_rows, took, cpu()):
            terminalreporter.write_line(line)


def table(rows: list[Row], wall: float, used: float) -> list[str]:
    """Return lines for the slowest tests, and for the files that took most CPU.

    The CPU of other threads during a test, and of a child that ends in it, counts for the test.
    """
    slowest = sorted(rows, key=lambda row: -row[1])[:ROWS]
    files: dict[str, tuple[float, float]] = {}
    for name, seconds, cpu in rows:
        before = files.get(path := name.partition("::")[0], (0.0, 0.0))
        files[path] = before[0] + seconds, before[1] + cpu
    longest = sorted(((path, *sums) for path, sums in files.items()), key=lambda row: -row[2])[:FILES]
    shown = [*slowest, *longest, ("the whole run", wall, used)]
    return [f"{seconds:8.1f} s {cpu:8.1f} s CPU  {name}" for name, seconds, cpu in shown]
