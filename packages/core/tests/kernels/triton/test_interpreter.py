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
    pytest.mark.timeout(900),
]


def check(done: subprocess.CompletedProcess[str], file: str) -> None:
    """Several files share a process: what failed in this one, or whatever kept the process from naming any."""
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    assert [line for line in failed if f"/{file}" in line] == [], done.stdout[-8000:]
    assert failed or (done.returncode == 0 and " passed" in done.stdout), done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file: str, background: Any) -> None:
    check(background.files[file, False].result(), file)


@pytest.mark.every_case
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES)
def test_every_case_under_the_interpreter(file: str, background: Any) -> None:
    check(background.files[file, True].result(), file)
