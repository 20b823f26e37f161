# pyright: reportCallIssue=false
"""The threads that run a plan: one pool for the whole step, with barriers of their own between operations.

A step enters the pool once. Waiting is a short spin, then yields of the core, so that a busy machine slows the step
instead of stopping it; between steps the helpers spin for a fraction of a millisecond and then sleep. The caller's
thread is number 0. Nothing here holds Python's lock while a plan runs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compile_kept
from candle_vllm.core.kernels.cpu_runtime.operation import BARRIER, IS_X86, address_of
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    call_operation,
    cpu_relax,
    exchange,
    fetch_add,
    int64_at,
    load_acquire,
    sched_yield,
    sem_post,
    sem_wait,
    store_release,
)
from candle_vllm.core.threads import deep_stacks

logger = logging.getLogger(__name__)

# The team's shared numbers, each on a cache line of its own (64 bytes), as byte offsets.
_JOB, _ARRIVED, _ROUND, _STOP, _PLAN, _ROWS, _WORKERS = range(0, 7 * 64, 64)
_ASLEEP, _SEMAPHORE = 0, 64  # of each worker, behind _WORKERS
_WORKER_BYTES = 128
_SPINS_BEFORE_YIELD = 400  # some 5 us
_YIELDS_BEFORE_SLEEP = 400  # some 0.2 ms


@njit(inline="always")
def _barrier(shared: int, threads: int) -> None:
    """Waits until all threads are here."""
    if threads == 1:
        return
    current = load_acquire(shared + _ROUND)
    if fetch_add(shared + _ARRIVED, 1) == threads - 1:
        store_release(shared + _ARRIVED, 0)
        store_release(shared + _ROUND, current + 1)
        return
    spins = 0
    while load_acquire(shared + _ROUND) == current:
        spins += 1
        if spins < _SPINS_BEFORE_YIELD:
            cpu_relax(IS_X86)
        else:
            sched_yield()


@njit(inline="always")
def _walk(plan: int, rows: int, shared: int, thread: int, threads: int) -> None:
    """Runs the operations of a plan in order; a row begins with the address and the length of its arguments."""
    at = plan
    for _ in range(rows):
        row = int64_at(at)
        call_operation(row[0], at, thread, threads)
        if row[1] & BARRIER:
            _barrier(shared, threads)
        at += row[1] >> 8
    _barrier(shared, threads)


def _run(plan: int, rows: int, shared: int, threads: int) -> None:
    """The caller's side of a step."""
    store_release(shared + _PLAN, plan)
    store_release(shared + _ROWS, rows)
    fetch_add(shared + _JOB, 1)
    for worker in range(1, threads):
        at = shared + _WORKERS + worker * _WORKER_BYTES
        if exchange(at + _ASLEEP, 0):
            sem_post(at + _SEMAPHORE)
    _walk(plan, rows, shared, 0, threads)


def _work(shared: int, thread: int, threads: int) -> None:
    """A helper's life: wait for a job, walk its plan, until told to stop."""
    at = shared + _WORKERS + thread * _WORKER_BYTES
    seen = 0
    while True:
        waits = 0
        while load_acquire(shared + _JOB) == seen:
            waits += 1
            if waits < _SPINS_BEFORE_YIELD:
                cpu_relax(IS_X86)
            elif waits < _SPINS_BEFORE_YIELD + _YIELDS_BEFORE_SLEEP:
                sched_yield()
            else:
                store_release(at + _ASLEEP, 1)
                # A job that came just now has either seen the flag and posted, or is seen here.
                if load_acquire(shared + _JOB) == seen or exchange(at + _ASLEEP, 0) == 0:
                    sem_wait(at + _SEMAPHORE)
        seen += 1
        if load_acquire(shared + _STOP):
            return
        _walk(load_acquire(shared + _PLAN), load_acquire(shared + _ROWS), shared, thread, threads)


@cache
def _compiled(function: Callable[..., None], signature: str) -> Any:
    return compile_kept(lambda cached: njit(signature, nogil=True, cache=cached, error_model="numpy")(function))


class ThreadTeam:
    """A fixed number of threads that run plans together.

    Args:
        threads: how many, the caller's included; more than there are CPUs are slower, and no less right.

    Raises:
        ConfigError: the system does not start so many.
    """

    def __init__(self, threads: int) -> None:
        self._memory = np.zeros(64 + _WORKERS + threads * _WORKER_BYTES, np.uint8)
        self._shared = -(-address_of(self._memory) // 64) * 64
        self.threads = threads if self._make_semaphores(threads) else 1
        self._enter = _compiled(_run, "void(int64, int64, int64, int64)")
        work = _compiled(_work, "void(int64, int64, int64)")
        self._helpers = [
            threading.Thread(
                target=work, args=(self._shared, number, self.threads), name=f"candle-vllm-cpu-{number}", daemon=True
            )
            for number in range(1, self.threads)
        ]
        self._start()

    def run(self, plan: np.ndarray, rows: int) -> None:
        """Runs a plan: `rows` operations behind each other in an int64 array. One caller at a time."""
        self._enter(address_of(plan), rows, self._shared, self.threads)

    def close(self) -> None:
        """Ends the helpers and waits for them."""
        ctypes.c_int64.from_address(self._shared + _STOP).value = 1
        self._enter(0, 0, self._shared, 1)
        for worker in range(1, self.threads):
            at = self._shared + _WORKERS + worker * _WORKER_BYTES
            if ctypes.c_int64.from_address(at + _ASLEEP).value:
                ctypes.CDLL(None).sem_post(ctypes.c_void_p(at + _SEMAPHORE))
        for helper in self._helpers:
            if helper.ident is not None:
                helper.join()
        self._helpers = []

    def _start(self) -> None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.threads > cpus:
            logger.warning("%d threads wait for each other on CPUs: %d; fewer threads are faster", self.threads, cpus)
        try:
            with deep_stacks():
                for helper in self._helpers:
                    helper.start()
        except RuntimeError as error:
            self.close()
            raise ConfigError(
                f"the system does not start {self.threads} threads ({error}): set --threads {cpus} or less", "threads"
            ) from error

    def _make_semaphores(self, threads: int) -> bool:
        try:
            libc = ctypes.CDLL(None)
            made = [
                libc.sem_init(ctypes.c_void_p(self._shared + _WORKERS + n * _WORKER_BYTES + _SEMAPHORE), 0, 0)
                for n in range(1, threads)
            ]
        except (OSError, AttributeError):
            made = [-1]
        if any(made):
            logger.warning("this system has no semaphores in memory: the CPU kernels use one thread")
            return False
        return True
