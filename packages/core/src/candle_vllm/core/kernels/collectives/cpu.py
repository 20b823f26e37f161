# SPDX-License-Identifier: MIT
"""Compiled all-reduce and all-gather of ranks in shared memory.

Each rank has a **block** of the memory: a counter, and from `FIRST_SLOT` on two **slots**, which operations use
alternately. For operation n a rank writes its part to a slot, sets its counter to n, and waits until all counters are
at least n: then all parts are written. A rank with counter n + 1 has read all parts of operation n, so operation n + 2
may overwrite them, and each operation needs a single wait.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.collectives import BLOCK_BYTES, FIRST_SLOT, SLOT_BYTES
from candle_vllm.core.kernels.cpu_runtime.operation import IS_X86
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    cpu_relax,
    float32_at,
    int32_at,
    int64_at,
    load_acquire,
    store_release,
)


def add_up(blocks: int, rank: int, size: int, number: int, x: int, count: int, turns: int, state: int) -> None:
    """All-reduce: sum the ranks' parts in the order of the ranks. If a rank is late, return without the sum.

    Args:
        blocks: address of the ranks' blocks.
        rank, size: this rank, and the number of ranks, at least 2.
        number: number of the operation, from 1 on.
        x: address of this rank's part, float32, which the sum overwrites.
        count: number of elements, at most those of a slot.
        turns: maximum number of pauses while a rank's counter is awaited.
        state: address of an int64: 0 before the first call, 1 after this rank's part is written, 2 after the sum is
            written. The caller repeats the call until the state is 2.
    """
    slots = blocks + FIRST_SLOT + (number & 1) * SLOT_BYTES
    if not _have_written(blocks, slots, rank, size, number, x, count, turns, state):
        return
    out, first, second = float32_at(x), float32_at(slots), float32_at(slots + BLOCK_BYTES)
    for at in range(count):
        out[at] = first[at] + second[at]
    for other in range(2, size):
        part = float32_at(slots + other * BLOCK_BYTES)
        for at in range(count):
            out[at] += part[at]
    int64_at(state)[0] = 2


def stand_together(
    blocks: int, rank: int, size: int, number: int, x: int, count: int, out: int, apart: int, turns: int, state: int
) -> None:
    """All-gather: copy the parts of all ranks to `out`. If a rank is late, return without the copies.

    Args:
        blocks, rank, size, number, turns, state: as for `add_up`; both operations share slots and numbers.
        x: address of this rank's part, int32.
        count: number of elements of a part, at most those of a slot.
        out: address to which the first rank's part is copied.
        apart: bytes from one rank's part to the next in the result.
    """
    slots = blocks + FIRST_SLOT + (number & 1) * SLOT_BYTES
    if not _have_written(blocks, slots, rank, size, number, x, count, turns, state):
        return
    for other in range(size):
        _copy(int32_at(out + other * apart), int32_at(slots + other * BLOCK_BYTES), count)
    int64_at(state)[0] = 2


@njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _have_written(blocks, slots, rank, size, number, x, count, turns, state):
    """Write this rank's part once; return whether all ranks have written, after at most `turns` pauses for each."""
    if int64_at(state)[0] == 0:
        _copy(int32_at(slots + rank * BLOCK_BYTES), int32_at(x), count)
        store_release(blocks + rank * BLOCK_BYTES, number)
        int64_at(state)[0] = 1
    for other in range(size):
        left = turns
        while load_acquire(blocks + other * BLOCK_BYTES) < number:
            if left == 0:
                return False
            left -= 1
            cpu_relax(IS_X86)
    return True


@njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _copy(to, source, count):
    for at in range(count):
        to[at] = source[at]
