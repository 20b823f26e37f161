"""The threads that run a plan: one pool for the whole step, which share the pieces of its operations.

A step enters the pool once. Threads that wait spin for microseconds, between steps for a fraction of a millisecond, and
then sleep; one that the system does not let run is waited for only where it is in the midst of a piece (`walk.py`). The
caller's thread is number 0. Nothing here holds Python's lock while a plan runs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time

import numpy as np

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function
from candle_vllm.core.threads import STACK_BYTES, deep_stacks

logger = logging.getLogger(__name__)

# The team's shared numbers, each on a cache line of its own (64 bytes), as byte offsets.
JOB, PLAN, ROWS, FIRST_ROW, FIRST_GROUP, NEXT_ROW, GROUPS, DONE, SLEEPERS, STOP, WORKERS = range(0, 11 * 64, 64)
CLAIM, ASLEEP, SEMAPHORE, INSIDE = range(0, 4 * 64, 64)  # of each thread, behind WORKERS
WORKER_BYTES = 4 * 64
_KEPT_PLANS = 8


CODE = "cpu_runtime.walk:take_part"
"""The compiled side."""


class ThreadTeam:
    """A fixed number of threads that run plans together.

    Args:
        threads: how many, the caller's included; more than there are CPUs are slower, and no less right.

    Raises:
        ConfigError: the system does not start so many.
    """

    def __init__(self, threads: int) -> None:
        self._memory = np.zeros(64 + WORKERS + threads * WORKER_BYTES, np.uint8)
        self._shared = -(-address_of(self._memory) // 64) * 64
        self._word(JOB).value = 1  # odd while there is none
        self._plans: dict[int, tuple[np.ndarray, int]] = {}  # and their addresses
        self.threads = threads if self._make_semaphores(threads) else 1
        self._take_part = c_function(CODE, 5)
        self._helpers = [
            threading.Thread(
                target=self._take_part,
                args=(0, 0, self._shared, number, self.threads),
                name=f"candle-vllm-cpu-{number}",
                daemon=True,
            )
            for number in range(1, self.threads)
        ]
        self._start()

    def run(self, plan: np.ndarray, rows: int) -> None:
        """Runs a plan: `rows` operations behind each other in an int64 array. One caller at a time."""
        known = self._plans.get(id(plan))
        if known is None:
            if len(self._plans) == _KEPT_PLANS:
                self._forget_plans()
            known = self._plans[id(plan)] = plan, address_of(plan)
        self._take_part(known[1], rows, self._shared, 0, self.threads)

    def close(self) -> None:
        """Ends the helpers and waits for them."""
        self._word(STOP).value = 1
        self._take_part(0, 0, self._shared, 0, self.threads)  # a job without rows, which wakes them
        for helper in self._helpers:
            if helper.ident is not None:
                helper.join()
        self._helpers = []

    def _word(self, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._shared + offset)

    def _forget_plans(self) -> None:
        """Lets go of plans, once no helper that was late looks at their rows any more."""
        while any(self._word(WORKERS + number * WORKER_BYTES + INSIDE).value for number in range(1, self.threads)):
            time.sleep(0.0005)
        self._plans.clear()

    def _start(self) -> None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.threads > cpus:
            logger.warning("%d threads wait for each other on CPUs: %d; fewer threads are faster", self.threads, cpus)
        try:
            with deep_stacks():
                for helper in self._helpers:
                    helper.start()
        except RuntimeError as error:
            started = sum(helper.ident is not None for helper in self._helpers)
            self.close()
            raise ConfigError(
                f"the system does not start {self.threads} threads ({error}), each of which takes a stack of "
                f"{STACK_BYTES >> 20} MiB: set threads={max(1, min(started, cpus))}",
                "threads",
            ) from error

    def _make_semaphores(self, threads: int) -> bool:
        try:
            libc = ctypes.CDLL(None)
            made = [
                libc.sem_init(ctypes.c_void_p(self._shared + WORKERS + n * WORKER_BYTES + SEMAPHORE), 0, 0)
                for n in range(threads)
            ]
        except (OSError, AttributeError):
            made = [-1]
        if any(made):
            logger.warning("this system has no semaphores in memory: the CPU kernels use one thread")
            return False
        return True
