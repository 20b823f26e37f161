"""Stacks of the threads that run compiled operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

STACK_BYTES = 16 << 20
"""Operations keep rows of activations and widened weights there, up to 4 MiB with the longest rows."""


@contextmanager
def deep_stacks() -> Iterator[None]:
    """Threads that start inside get `STACK_BYTES`; the system's own choice may be 2 MiB (`ulimit -s unlimited`)."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)
