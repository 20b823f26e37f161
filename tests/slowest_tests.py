# SPDX-License-Identifier: MIT
"""What a run of tests took: its slowest tests and files, seconds of CPU beside those of the clock, and both as a whole.

A plugin of pytest, loaded by the workspace's `conftest.py`: runs of half a minute and more end with the table. With
TEST_TIMES in the environment the rows go to a file of that folder instead, and `python tests/slowest_tests.py FOLDER`
prints one table for all processes that wrote there, as `.ci/run` does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROWS, FILES = 30, 20
SHORT = 30.0  # seconds; a run that took less prints no table

Row = tuple[str, float, float]  # a test's name, seconds of the clock, seconds of CPU
_rows: list[Row] = []


def cpu() -> float:
    """Seconds of CPU of this process, all its threads, and the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in used)


_BEGAN = time.monotonic()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    wall, used = time.monotonic(), cpu()
    result = yield
    _rows.append((item.nodeid, time.monotonic() - wall, cpu() - used))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    folder, took = os.environ.get("TEST_TIMES"), time.monotonic() - _BEGAN
    if folder:
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps([[took, cpu()], _rows]))
    elif _rows and took >= SHORT:
        terminalreporter.section(f"slowest of {len(_rows)} tests")
        for line in table(_rows, took, cpu()):
            terminalreporter.write_line(line)


def table(rows: list[Row], wall: float, used: float) -> list[str]:
    """Lines for the slowest tests, and for the files that took most CPU.

    What runs beside a test, and a child that ends in it, count as the test's CPU.
    """
    slowest = sorted(rows, key=lambda row: -row[1])[:ROWS]
    files: dict[str, tuple[float, float]] = {}
    for name, seconds, cpu in rows:
        before = files.get(path := name.partition("::")[0], (0.0, 0.0))
        files[path] = before[0] + seconds, before[1] + cpu
    longest = sorted(((path, *sums) for path, sums in files.items()), key=lambda row: -row[2])[:FILES]
    shown = [*slowest, *longest, ("the whole run", wall, used)]
    return [f"{seconds:8.1f} s {cpu:8.1f} s CPU  {name}" for name, seconds, cpu in shown]


def main(folder: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    totals, rows = [total for total, _ in runs], [tuple(row) for _, rows in runs for row in rows]
    wall, used = max((wall for wall, _ in totals), default=0.0), sum(used for _, used in totals)
    print(f"the slowest of {len(rows)} tests, of {len(runs)} processes")
    print("\n".join(table(rows, wall, used)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
