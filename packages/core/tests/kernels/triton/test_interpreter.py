# SPDX-License-Identifier: MIT
"""Every test file of this folder under Triton's interpreter, in processes of their own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
DRIVERS = ("test_interpreter.py", "test_ahead_of_time.py", "test_launches.py")
FILES = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in DRIVERS)


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.timeout(0),  # the processes have a limit in seconds of CPU
]


def check(done: subprocess.CompletedProcess[str], file: str) -> None:
    """Several files share a process: what failed in this one, or whatever kept the process from naming any."""
    failed = re.findall(r"^(?:FAILED|ERROR) (?:.*/)?(test_\w+\.py)\b", done.stdout, re.MULTILINE)
    assert file not in failed, done.stdout[-8000:]
    told = f"exit {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert failed or (done.returncode == 0 and " passed" in done.stdout), told


@pytest.mark.parametrize(
    ("code", "output", "says"),
    [
        (1, "FAILED test_a.py::test_b - assert 0\n1 failed, 3 passed", "FAILED"),
        (2, "ERROR packages/core/test_a.py - ImportError", "ERROR"),
        (-11, "4 passed", "exit -11"),
        (5, "no tests ran", "exit 5"),
    ],
)
def test_what_fails_under_the_interpreter_is_seen(code: int, output: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check(subprocess.CompletedProcess([], code, output, ""), "test_a.py")


def test_what_fails_in_another_file_is_said_there() -> None:
    check(subprocess.CompletedProcess([], 1, "FAILED test_a.py::test_b\n1 failed, 3 passed", ""), "test_aa.py")


@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file: str, background: Any) -> None:
    check(background.files[file, False].result(), file)


@pytest.mark.every_case
@pytest.mark.parametrize("file", FILES)
def test_every_case_under_the_interpreter(file: str, background: Any) -> None:
    check(background.files[file, True].result(), file)
