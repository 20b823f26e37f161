"""Threads: how many there should be, and the stacks of those that run compiled operations."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

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


LOADING_THREADS: ContextVar[int | None] = ContextVar("LOADING_THREADS", default=None)
"""How many threads decode and lay out one tensor, where somebody said it; a thread that is started asks for itself."""


def loading_threads() -> int:
    """How many threads decode and lay out one tensor: as many as were asked for, or one for each physical core."""
    return LOADING_THREADS.get() or physical_cores()


def physical_cores() -> int:
    """Physical cores among the CPUs that this thread may use; two hyper-threads count as one."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return _cores_of(frozenset(usable))


@cache
def _cores_of(cpus: frozenset[int]) -> int:
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
