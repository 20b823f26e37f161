# SPDX-License-Identifier: MIT
"""Thread team: one pool of threads that share the work of each operation of a plan.

A team is given whole plans, not operations. Waiting threads spin for microseconds (between steps for a fraction of a
millisecond) and then sleep. Threads wait for a thread that the system has descheduled only if that thread has begun a
piece of work (`walk.py`). The caller's thread is number 0, the others are helpers. The GIL is released while a plan
runs.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function, operation, plan_row
from candle_vllm.core.threads import STACK_BYTES, deep_stacks, usable_cpus

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.numa import CpuRanks

logger = logging.getLogger(__name__)

# Byte offsets of the team's shared numbers, each in a cache line of its own (64 bytes).
JOB, PLAN, ROWS, FIRST_ROW, FIRST_GROUP, NEXT_ROW, GROUPS, DONE, SLEEPERS, STOP, WAIT, WORKERS = range(0, 12 * 64, 64)
POST = WAIT + 8  # constant, as WAIT is
CLAIM, ASLEEP, SEMAPHORE, INSIDE = range(0, 4 * 64, 64)  # per thread, after WORKERS
RANK = INSIDE + 8  # first thread of the thread's rank, and the rank's number of threads; both are constant
WORKER_BYTES = 4 * 64
_PLACE = SEMAPHORE + 16  # memory for the semaphore itself, up to 32 bytes
_KEPT_PLANS = 8

CODE, PART_CODE = "cpu_runtime.walk:take_part", "cpu_runtime.walk:do_parts"
"""The compiled main function of the threads, and the operation that runs some parts of another operation."""


class PartArguments(NamedTuple):
    """Arguments of `do_parts`.

    Attributes:
        row: address of the divided operation's plan row.
        first, last: first part, and the part after the last one.
        parts: number of parts of the whole operation.
    """

    row: int
    first: int
    last: int
    parts: int


class ThreadTeam:
    """A fixed number of threads that run plans together.

    Args:
        threads: number of threads, the caller's included; more threads than CPUs are slower, but correct. If the system
            has no usable semaphores, the team has one thread and no ranks.
        ranks: division of the threads. Helpers run on their rank's CPUs. The caller runs on the first rank's CPUs from
            its first plan on, unless it is the main thread, whose binding child processes would inherit.
        kept_plans: number of plans whose memory the team keeps, at least 8; before the next, it awaits late helpers.

    Raises:
        ConfigError: the system cannot start that many threads.
    """

    def __init__(self, threads: int, ranks: CpuRanks | None = None, *, kept_plans: int = 0) -> None:
        self._kept_plans = max(_KEPT_PLANS, kept_plans)
        self._memory = np.zeros(64 + WORKERS + threads * WORKER_BYTES, np.uint8)
        self._shared = -(-address_of(self._memory) // 64) * 64
        self._word(JOB).value = 1  # odd while no job runs
        self._plans: dict[int, tuple[np.ndarray, int]] = {}  # plans and their addresses
        self._parts: np.ndarray | None = None
        self._semaphores = system_semaphores() if threads > 1 else None
        self.threads = threads if self._make_semaphores(threads) else 1
        self.ranks = ranks if ranks is not None and ranks.threads == self.threads else None
        self._bound: int | None = None  # the caller thread that is bound to its rank's CPUs
        self._tell_ranks()
        self._take_part = c_function(CODE, 5)
        self._helpers = [
            threading.Thread(
                target=_help,
                args=(self._take_part, self._memory, self._shared, number, self.threads, self._cpus_of(number)),
                name=f"candle-vllm-cpu-{number}",
                daemon=True,
            )
            for number in range(1, self.threads)
        ]
        self._finalizer = weakref.finalize(
            self, _end, self._take_part, self._memory, self._shared, self.threads, self._plans
        )
        self._finalizer.atexit = False
        self._start()

    def run(self, plan: np.ndarray, rows: int) -> None:
        """Run a plan: `rows` consecutive operations in an int64 array. One caller at a time."""
        if self.ranks is not None:
            self._bind_caller()
        known = self._plans.get(id(plan))
        if known is None:
            if len(self._plans) == self._kept_plans:
                self._forget_plans()
            known = self._plans[id(plan)] = plan, address_of(plan)
        self._take_part(known[1], rows, self._shared, 0, self.threads)

    def run_parts(self, plan: np.ndarray, first: int, last: int, parts: int) -> None:
        """Run the parts `first` to `last` - 1 of the first operation of a plan, divided into `parts` consecutive parts.

        So several teams can divide an operation. The results are the same as by `run`.
        """
        if self._parts is None:
            given = PartArguments(0, 0, 0, 1)
            self._parts = np.array(plan_row(operation(PART_CODE), 0, given, barrier=True), np.int64)
        self._parts[-4:] = address_of(plan), first, last, parts
        self.run(self._parts, 1)

    def close(self) -> None:
        """End the helpers and wait for them; the helpers of a garbage-collected team end by themselves."""
        self._finalizer.detach()
        self._word(STOP).value = 1
        self._take_part(0, 0, self._shared, 0, self.threads)  # an empty job, which wakes the helpers
        for helper in self._helpers:
            if helper.ident is not None:
                helper.join()
        self._helpers = []
        self._drop_semaphores()

    def _tell_ranks(self) -> None:
        starts = (0, self.threads) if self.ranks is None else self.ranks.starts
        for first, last in itertools.pairwise(starts):
            for thread in range(first, last):
                at = WORKERS + thread * WORKER_BYTES + RANK
                self._word(at).value, self._word(at + 8).value = first, last - first
        if self.ranks is not None:
            logger.info("%d CPU ranks: %s", len(self.ranks.each), self.ranks)

    def _cpus_of(self, thread: int) -> frozenset[int]:
        """Return the CPUs of a thread; empty for any CPU."""
        return frozenset() if self.ranks is None else self.ranks.each[self.ranks.of_thread(thread)].cpus

    def _bind_caller(self) -> None:
        if self._bound != threading.get_ident():
            self._bound = threading.get_ident()
            if threading.current_thread() is not threading.main_thread():
                _run_on(self._cpus_of(0))

    def _word(self, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._shared + offset)

    def _forget_plans(self) -> None:
        """Release plans once no late helper reads their rows any more."""
        while any(self._word(WORKERS + number * WORKER_BYTES + INSIDE).value for number in range(1, self.threads)):
            time.sleep(0.0005)
        self._plans.clear()

    def _start(self) -> None:
        cpus = len(usable_cpus())
        if self.threads > cpus:
            logger.warning("threads (%d) outnumber CPUs (%d): fewer threads are faster", self.threads, cpus)
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
        system, made = self._semaphores, list[int]()
        if system is not None:
            self._word(WAIT).value, self._word(POST).value = system.wait, system.post
            for at in range(WORKERS, WORKERS + threads * WORKER_BYTES, WORKER_BYTES):
                semaphore = self._word(at + SEMAPHORE).value = system.make(self._shared + at + _PLACE)
                made.append(semaphore)
        if threads > 1 and not (made and all(made)):
            self._drop_semaphores()
            logger.warning("the CPU kernels cannot use this system's semaphores: they use one thread")
            return False
        return True

    def _drop_semaphores(self) -> None:
        for at in range(WORKERS, self._memory.size - 64, WORKER_BYTES):
            word = self._word(at + SEMAPHORE)
            if self._semaphores is not None and word.value:
                self._semaphores.drop(word.value)
            word.value = 0


def _help(
    take_part: Callable[..., object],
    memory: np.ndarray,
    shared: int,
    number: int,
    threads: int,
    cpus: frozenset[int],
) -> None:
    """Main function of a helper thread, which keeps the memory of the thread's semaphore alive."""
    del memory  # the thread's arguments keep the memory alive
    if cpus:
        _run_on(cpus)
    take_part(0, 0, shared, number, threads)


def _run_on(cpus: frozenset[int]) -> None:
    """Bind this thread to CPUs, if the system allows it."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)


def _end(take_part: Callable[..., object], memory: np.ndarray, shared: int, threads: int, plans: object) -> None:
    """End the helpers of a team that was not closed; keep the plans while helpers read them, for at most a second."""
    ctypes.c_int64.from_address(shared + STOP).value = 1
    take_part(0, 0, shared, 0, threads)
    inside = [shared + WORKERS + number * WORKER_BYTES + INSIDE for number in range(1, threads)]
    until = time.monotonic() + 1.0
    while any(ctypes.c_int64.from_address(at).value for at in inside) and time.monotonic() < until:
        time.sleep(0.0005)
    del memory, plans


class Semaphores(NamedTuple):
    """The system's semaphores: a thread sleeps on one until another thread wakes it.

    Attributes:
        wait, post: addresses of C functions, which are called as wait(semaphore, -1, 0) and post(semaphore, 1, 0).
        make: creates a semaphore with count 0, given the address of 32 zero bytes (a multiple of 8), which must stay
            valid while it is used. Returns 0 if the system cannot create it.
        drop: releases the semaphore.
    """

    wait: int
    post: int
    make: Callable[[int], int]
    drop: Callable[[int], object]


def system_semaphores() -> Semaphores | None:
    """Return the system's semaphores: Windows', Grand Central Dispatch's (macOS lacks unnamed POSIX ones), or POSIX's.

    The arguments of `wait` and `post` suit all three. For `wait`, -1 is Windows' and Dispatch's infinite timeout. For
    `post`, 1 and 0 are the count and a null pointer for Windows. POSIX functions read the semaphore alone.
    """
    arguments: tuple[int | None, ...] = ()
    try:
        if sys.platform == "win32":
            library = ctypes.WinDLL("kernel32")
            wait, post, drop = library.WaitForSingleObject, library.ReleaseSemaphore, library.CloseHandle
            create = library.CreateSemaphoreW
            create.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_wchar_p)
            arguments = (None, 0, 1 << 30, None)
        elif sys.platform == "darwin":
            library = ctypes.CDLL(None)
            wait, post = library.dispatch_semaphore_wait, library.dispatch_semaphore_signal
            drop, create = library.dispatch_release, library.dispatch_semaphore_create
            create.argtypes, arguments = (ctypes.c_ssize_t,), (0,)
        else:
            library = ctypes.CDLL(None)
            wait, post, drop, create = library.sem_wait, library.sem_post, library.sem_destroy, library.sem_init
            drop.argtypes, create.argtypes = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
            return Semaphores(_address(wait), _address(post), lambda at: at if create(at, 0, 0) == 0 else 0, drop)
        drop.argtypes, drop.restype, create.restype = (ctypes.c_void_p,), None, ctypes.c_void_p
        return Semaphores(_address(wait), _address(post), lambda _: create(*arguments) or 0, drop)
    except (OSError, AttributeError):
        return None


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
