"""What a process has once: threads, how many and with which stacks; when Python looks for cycles of garbage."""

from __future__ import annotations

import atexit
import gc
import os
import sys
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


# ---- Python's cycle collector ----------------------------------------------------------------------------------------

# A start makes some 300,000 objects that stay, a thousand streams as many that go: the usual thresholds stop both again
# and again.
_COLLECTOR = (50_000, 20, 20)


def collect_seldom() -> None:
    """For a process that is all ours: the collector runs seldom, and does not run while the process ends.

    Its looks at what stays take a tenth of a start's seconds, and at the end a second, for memory that is given back
    all the same.
    """
    gc.set_threshold(*_COLLECTOR)
    atexit.register(_let_go)


def _let_go() -> None:
    if "triton" not in sys.modules:  # it writes a line for each object of its own that was not collected
        gc.freeze()
