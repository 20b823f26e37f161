# pyright: reportCallIssue=false
"""The compiled side of the thread team: walking a plan, the barriers between operations, and a helper's life.

All arguments are int64. `team.py` starts the threads and says what they wait for.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.operation import BARRIER, IS_X86
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
from candle_vllm.core.kernels.cpu_runtime.team import (
    ARRIVED,
    ASLEEP,
    JOB,
    PLAN,
    ROUND,
    ROWS,
    SEMAPHORE,
    STOP,
    WORKER_BYTES,
    WORKERS,
)

_SPINS_BEFORE_YIELD = 400  # some 5 us
_YIELDS_BEFORE_SLEEP = 400  # some 0.2 ms


@njit(inline="always")
def _barrier(shared: int, threads: int) -> None:
    """Waits until all threads are here."""
    if threads == 1:
        return
    current = load_acquire(shared + ROUND)
    if fetch_add(shared + ARRIVED, 1) == threads - 1:
        store_release(shared + ARRIVED, 0)
        store_release(shared + ROUND, current + 1)
        return
    spins = 0
    while load_acquire(shared + ROUND) == current:
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


def run(plan: int, rows: int, shared: int, threads: int) -> None:
    """The caller's side of a step."""
    store_release(shared + PLAN, plan)
    store_release(shared + ROWS, rows)
    fetch_add(shared + JOB, 1)
    for worker in range(1, threads):
        at = shared + WORKERS + worker * WORKER_BYTES
        if exchange(at + ASLEEP, 0):
            sem_post(at + SEMAPHORE)
    _walk(plan, rows, shared, 0, threads)


def work(shared: int, thread: int, threads: int) -> None:
    """A helper's life: wait for a job, walk its plan, until told to stop."""
    at = shared + WORKERS + thread * WORKER_BYTES
    seen = 0
    while True:
        waits = 0
        while load_acquire(shared + JOB) == seen:
            waits += 1
            if waits < _SPINS_BEFORE_YIELD:
                cpu_relax(IS_X86)
            elif waits < _SPINS_BEFORE_YIELD + _YIELDS_BEFORE_SLEEP:
                sched_yield()
            else:
                store_release(at + ASLEEP, 1)
                # A job that came just now has either seen the flag and posted, or is seen here.
                if load_acquire(shared + JOB) == seen or exchange(at + ASLEEP, 0) == 0:
                    sem_wait(at + SEMAPHORE)
        seen += 1
        if load_acquire(shared + STOP):
            return
        _walk(load_acquire(shared + PLAN), load_acquire(shared + ROWS), shared, thread, threads)
