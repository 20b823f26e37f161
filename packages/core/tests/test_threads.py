"""A process that is all ours looks for garbage seldom, and not while it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What is registered first is called last.
PROGRAM = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from candle_vllm.core.threads import collect_seldom
collect_seldom()
print(gc.get_freeze_count(), gc.get_threshold()[0])
"""


@pytest.mark.parametrize(
    ("more", "frozen"),
    [("", True), ("import sys; sys.modules['triton'] = None", False)],
    ids=["plain", "with Triton, which complains"],
)
def test_nothing_is_looked_for_at_the_end(more: str, frozen: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM + more], capture_output=True, text=True, check=True)
    assert done.stdout == f"0 50000\n{frozen}\n"
