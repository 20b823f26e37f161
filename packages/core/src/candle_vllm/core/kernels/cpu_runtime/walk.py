# SPDX-License-Identifier: MIT
"""Compiled code of the thread team: run a plan, divide its operations, wait; and the main loop of a helper.

**Pieces.** A row (an operation of the plan) is divided into one piece per thread. Piece n belongs to thread n, but a
thread without work may take a free piece of another thread. So on a busy machine, threads wait for a descheduled thread
only if it has begun a piece. Pieces of another rank (`numa.py`), which read remote memory, are taken only after they
have been free for a longer time. A thread claims a piece by incrementing the owner's **claim**, which contains the
row's number. Rows are numbered over the team's life, so a late thread cannot claim a piece of an old row.

**Groups.** Rows up to a barrier are a group; a **job** is one run of a plan. In each group a thread adds to DONE the
number of its own pieces that it has done, then of others' pieces. The thread that completes the group opens the next
group by incrementing GROUPS. A group cannot end before all its pieces are done. A late thread skips ended groups.

**Waiting** is a short spin, then sleep, never a yield. A yielding thread loses its time slice; a sleeping thread keeps
its scheduler credit and resumes at once, so that threads that wait for each other run at the same time.

All arguments are int64. `team.py` starts the threads and owns the memory.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.operation import BARRIER, IS_X86
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    call_operation,
    call_system,
    compare_exchange,
    cpu_relax,
    exchange,
    fetch_add,
    int64_at,
    load_acquire,
    read,
    store_release,
)
from candle_vllm.core.kernels.cpu_runtime.team import (
    ASLEEP,
    CLAIM,
    DONE,
    FIRST_GROUP,
    FIRST_ROW,
    GROUPS,
    INSIDE,
    JOB,
    NEXT_ROW,
    PLAN,
    POST,
    RANK,
    ROWS,
    SEMAPHORE,
    SLEEPERS,
    STOP,
    WAIT,
    WORKER_BYTES,
    WORKERS,
    PartArguments,
)

_TAKEN_BITS = 20  # bits of a claim that count the claimed pieces; the row's number is above them
_PATIENCE = 200  # spins before a thread looks for pieces of other threads: some 2 us
_SPINS = 6000  # spins before sleeping: some 60 us
_FAR = 10  # factor of _PATIENCE before a thread looks for pieces of other ranks
_IDLE_SPINS = 20_000  # spins before sleeping between steps: some 0.2 ms


# ---- waiting ---------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _await_change(shared: int, thread: int, word: int, seen: int, spins: int) -> None:
    """Wait until `word` differs from `seen`: spin, then sleep until `_wake`."""
    for _ in range(spins):
        if load_acquire(word) != seen:
            return
        cpu_relax(IS_X86)
    at = shared + WORKERS + thread * WORKER_BYTES
    while load_acquire(word) == seen:
        fetch_add(shared + SLEEPERS, 1)
        store_release(at + ASLEEP, 1)
        # If another thread changes the word now, either it sees ASLEEP and posts, or this thread sees the change.
        if load_acquire(word) == seen or exchange(at + ASLEEP, 0) == 0:
            call_system(load_acquire(shared + WAIT), load_acquire(at + SEMAPHORE), -1)
        fetch_add(shared + SLEEPERS, -1)


@njit(inline="always")
def _wake(shared: int, threads: int) -> None:
    """Wake sleeping threads; no system call if no thread sleeps."""
    if load_acquire(shared + SLEEPERS) != 0:
        for thread in range(threads):
            at = shared + WORKERS + thread * WORKER_BYTES
            if exchange(at + ASLEEP, 0) != 0:
                call_system(load_acquire(shared + POST), load_acquire(at + SEMAPHORE), 1)


# ---- sharing ---------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _claim(word: int, number: int, count: int) -> int:
    """Claim one of `count` pieces of row `number`; return its index, or -1 if all are claimed or the row has ended."""
    while True:
        found = load_acquire(word)
        if found >> _TAKEN_BITS > number:
            return -1
        taken = found & ((1 << _TAKEN_BITS) - 1) if found >> _TAKEN_BITS == number else 0
        if taken >= count:
            return -1
        if compare_exchange(word, found, (number << _TAKEN_BITS) + taken + 1):
            return taken


@njit(inline="always")
def _do_share(at: int, number: int, shared: int, owner: int, threads: int) -> int:
    """Run thread `owner`'s piece of a row if it is unclaimed; return the number of pieces that were run."""
    if _claim(shared + WORKERS + owner * WORKER_BYTES + CLAIM, number, 1) < 0:
        return 0
    call_operation(int64_at(at)[0], at, owner, threads)
    return 1


@njit
def _do_some(at: int, number: int, rows: int, shared: int, first: int, count: int, turn: int, threads: int) -> int:
    """Run the unclaimed pieces, in a group of rows, of `count` threads from `first` on, beginning with thread
    `first` + `turn`; return their number."""
    done = 0
    for index in range(rows):
        for other in range(count):
            done += _do_share(at, number + index, shared, first + (turn + other) % count, threads)
        at += int64_at(at)[1] >> 8
    return done


@njit
def _do_others(
    at: int, number: int, rows: int, group: int, shared: int, thread: int, threads: int, patience: int
) -> int:
    """Run unclaimed pieces of other threads in a group of rows; return their number."""
    rank = shared + WORKERS + thread * WORKER_BYTES + RANK
    first, count = load_acquire(rank), load_acquire(rank + 8)
    done = _do_some(at, number, rows, shared, first, count, thread - first + 1, threads)
    if done == 0 and count < threads:
        for _ in range(_FAR * patience):
            if load_acquire(shared + GROUPS) != group:
                return 0
            cpu_relax(IS_X86)
        done = _do_some(at, number, rows, shared, 0, threads, first + count, threads)
    return done


@njit(inline="always")
def _completes(shared: int, done: int, total: int) -> bool:
    """Count `done` pieces as done; return whether they were the last pieces of the group."""
    return done != 0 and fetch_add(shared + DONE, done) + done == total


@njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _walk(job: int, plan: int, rows: int, number: int, group: int, shared: int, thread: int, threads: int) -> None:
    """Run the operations of a plan in order; a row begins with the operation's address, flags and the row's length.

    `number` and `group` belong to the first row.
    """
    at = begin = plan
    first, done, patience = 0, 0, _PATIENCE
    for index in range(rows):
        flags = int64_at(at)[1]
        if load_acquire(shared + JOB) != job:
            return
        done += _do_share(at, number + index, shared, thread, threads)
        at += flags >> 8
        if flags & BARRIER == 0 and index + 1 < rows:
            continue
        total = (index + 1 - first) * threads
        last = _completes(shared, done, total)
        if not last:
            for _ in range(patience):
                if load_acquire(shared + GROUPS) != group:
                    break
                cpu_relax(IS_X86)
            done = 0
            if load_acquire(shared + GROUPS) == group:
                count = index + 1 - first
                done = _do_others(begin, number + first, count, group, shared, thread, threads, patience)
            patience = _PATIENCE if done == 0 else 0  # threads that were late are probably late for the next group too
            last = _completes(shared, done, total)
        if last:
            store_release(shared + DONE, 0)
            store_release(shared + GROUPS, group + 1)
            _wake(shared, threads)
        else:
            _await_change(shared, thread, shared + GROUPS, group, _SPINS)
        group += 1
        begin, first, done = at, index + 1, 0


def do_parts(row, thread, threads):
    """Run one thread's shares of some parts of another operation."""
    given = read(PartArguments, row)
    for part in range(given.first, given.last):
        at = part * threads + thread
        call_operation(int64_at(given.row)[0], given.row, at, given.parts * threads)


# ---- caller and helpers ----------------------------------------------------------------------------------------------


def take_part(plan: int, rows: int, shared: int, thread: int, threads: int) -> None:
    """Run a plan (thread 0, the caller) or a helper's loop; one function, so that `_walk` is compiled once."""
    if thread == 0:
        _run(plan, rows, shared, threads)
    else:
        _work(shared, thread, threads)


@njit(inline="always")
def _run(plan: int, rows: int, shared: int, threads: int) -> None:
    """Run a plan as the caller's thread."""
    if threads == 1:
        at = plan
        for _ in range(rows):
            row = int64_at(at)
            call_operation(row[0], at, 0, 1)
            at += row[1] >> 8
        return
    number, group = load_acquire(shared + NEXT_ROW), load_acquire(shared + GROUPS)
    store_release(shared + NEXT_ROW, number + rows)
    store_release(shared + PLAN, plan)
    store_release(shared + ROWS, rows)
    store_release(shared + FIRST_ROW, number)
    store_release(shared + FIRST_GROUP, group)
    job = fetch_add(shared + JOB, 1) + 1
    _wake(shared, threads)
    _walk(job, plan, rows, number, group, shared, 0, threads)
    fetch_add(shared + JOB, 1)


@njit(inline="always")
def _work(shared: int, thread: int, threads: int) -> None:
    """Run a helper: wait for a job, walk its plan, until STOP is set."""
    inside = shared + WORKERS + thread * WORKER_BYTES + INSIDE
    seen = 0
    while True:
        _await_change(shared, thread, shared + JOB, seen, _IDLE_SPINS)
        seen = load_acquire(shared + JOB)
        if load_acquire(shared + STOP) != 0:
            return
        if seen & 1 == 0:
            store_release(inside, 1)
            plan, rows = load_acquire(shared + PLAN), load_acquire(shared + ROWS)
            number, group = load_acquire(shared + FIRST_ROW), load_acquire(shared + FIRST_GROUP)
            if load_acquire(shared + JOB) == seen:  # the numbers that were just read belong to this job
                _walk(seen, plan, rows, number, group, shared, thread, threads)
            store_release(inside, 0)
