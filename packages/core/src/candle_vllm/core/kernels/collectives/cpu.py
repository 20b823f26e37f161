# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false, reportArgumentType=false
"""The compiled side of what ranks do in shared memory: sums, and parts side by side.

Each rank has a block: its counter on a line of its own, and from `FIRST_SLOT` on two slots, used in turns. It writes
its part into one, counts up, and waits for the others' counters; then all parts are there. Who counts n + 1 has read
all of n, so a slot that is written again, at n + 2, is read by nobody any more: one wait a sum is enough.
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
    """Adds up a piece over ranks, in their order, as far as it comes within so many turns of waiting for each.

    Args:
        blocks: address of the ranks' blocks.
        rank, size: which one this is, of how many.
        number: of the sum, from 1 on.
        x: address of this rank's part, float32, overwritten by the sum.
        count: how many numbers; they fit a slot.
        turns: of waiting.
        state: address of an int64, at first 0: 1 where the part is written, 2 where the sum is there.
    """
    slots = blocks + FIRST_SLOT + (number & 1) * SLOT_BYTES
    out = float32_at(x)
    stands = int64_at(state)
    if stands[0] == 0:
        own = float32_at(slots + rank * BLOCK_BYTES)
        for at in range(count):
            own[at] = out[at]
        store_release(blocks + rank * BLOCK_BYTES, number)
        stands[0] = 1
    if not _have_counted(blocks, size, number, turns):
        return
    first = float32_at(slots)
    second = float32_at(slots + BLOCK_BYTES)
    for at in range(count):
        out[at] = first[at] + second[at]
    for other in range(2, size):
        part = float32_at(slots + other * BLOCK_BYTES)
        for at in range(count):
            out[at] += part[at]
    stands[0] = 2


def stand_together(
    blocks: int, rank: int, size: int, number: int, x: int, count: int, out: int, apart: int, turns: int, state: int
) -> None:
    """Puts pieces of all ranks where each belongs, as far as it comes within so many turns of waiting for each.

    Args:
        blocks, rank, size, number, turns, state: as for `add_up`, whose slots and numbers these are, too.
        x: address of this rank's piece, int32.
        count: how many numbers; they fit a slot.
        out: address at which the first rank's piece is to stand.
        apart: bytes from there to the next rank's.
    """
    slots = blocks + FIRST_SLOT + (number & 1) * SLOT_BYTES
    stands = int64_at(state)
    if stands[0] == 0:
        _copy(int32_at(slots + rank * BLOCK_BYTES), int32_at(x), count)
        store_release(blocks + rank * BLOCK_BYTES, number)
        stands[0] = 1
    if not _have_counted(blocks, size, number, turns):
        return
    for other in range(size):
        _copy(int32_at(out + other * apart), int32_at(slots + other * BLOCK_BYTES), count)
    stands[0] = 2


@njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _have_counted(blocks, size, number, turns):
    """Whether all ranks have counted to a number, waiting so many turns for each."""
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
