"""Every test file of this folder under Triton's interpreter, each in a process of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
DRIVERS = ("test_interpreter.py", "test_ahead_of_time.py", "test_launches.py")
FILES = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in DRIVERS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file: str, background: Any) -> None:
    done = background.files[file].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
