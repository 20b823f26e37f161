# SPDX-License-Identifier: MIT
"""Sort pairs of token and expert by expert, in blocks of one expert, on a GPU (step 6 of a request's life).

The order is stable: an expert's pairs stay in the order of the tokens. First the pairs of each expert are counted in
each chunk of pairs; then a program for each chunk adds the counts of the chunks before it. A block is up to `most`
consecutive places of one expert. The table has blocks for the worst case of these shapes, and marks unused ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.moe.arguments import Pairs
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

# Not measured yet.
_CHUNK = 256
_RECOUNT = 4  # up to this number of chunks, every program counts all of them, which saves a launch
_COUNTS = 8192  # maximum counts that a program adds at a time
_PART = 32  # pairs that are compared with a chunk's pairs at a time, and blocks that are looked up at a time
_WARPS = 8


@dataclass(frozen=True)
class Blocks:
    """The sorted pairs, and their blocks.

    Attributes:
        order: int32 [pairs]: the pairs t * k + j of valid experts, sorted by expert; the rest is undefined.
        table: int32 [3, blocks]: a block's expert, or -1 for an unused block; its first place in `order`; the number
            of its pairs.
        most: maximum number of pairs of a block.
    """

    order: torch.Tensor
    table: torch.Tensor
    most: int

    @property
    def count(self) -> int:
        """Number of blocks in the table, of which some may be unused."""
        return self.table.shape[1]


@triton.jit
def _histogram(experts, chunk, pairs, X, CHUNK: tl.constexpr, BINS: tl.constexpr):
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(experts + at, mask=at < pairs, other=-1)
    return tl.histogram(ids, BINS, mask=(ids >= 0) & (ids < X))


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    experts,  # [pairs]
    counts,  # [chunks, BINS]
    pairs,
    X,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk = tl.program_id(0)
    found = _histogram(experts, chunk, pairs, X, CHUNK, BINS)
    tl.store(counts + chunk.to(tl.int64) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def place_kernel(
    experts,  # [pairs]
    counts,  # [chunks, BINS], unless RECOUNT
    order,  # [pairs]
    table,  # [3, blocks]
    pairs,
    blocks,
    X,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PART: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RECOUNT: tl.constexpr,
):
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    number = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    if RECOUNT:
        for other in tl.range(0, chunks):
            found = _histogram(experts, other, pairs, X, CHUNK, BINS)
            total += found
            earlier += tl.where(other < chunk, found, 0)
    else:
        several = tl.arange(0, COUNTS)
        for start in tl.range(0, chunks, COUNTS):
            other = (start + several)[:, None]
            found = tl.load(counts + other.to(tl.int64) * BINS + number[None, :], mask=other < chunks, other=0)
            total += tl.sum(found, 0)
            earlier += tl.sum(tl.where(other < chunk, found, 0), 0)
    first = tl.cumsum(total, 0) - total

    inner = tl.arange(0, CHUNK)
    at = chunk * CHUNK + inner
    ids = tl.load(experts + at, mask=at < pairs, other=-1)
    valid = (ids >= 0) & (ids < X)
    rank = tl.zeros((CHUNK,), tl.int32)
    for start in tl.range(0, CHUNK, PART):
        there = start + tl.arange(0, PART)
        others = tl.load(experts + chunk * CHUNK + there, mask=chunk * CHUNK + there < pairs, other=-1)
        before = (others[None, :] == ids[:, None]) & (there[None, :] < inner[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    place = tl.gather(first + earlier, tl.where(valid, ids, 0), 0) + rank
    tl.store(order + place, at, mask=valid)

    heights = (total + BLOCK - 1) // BLOCK
    ends = tl.cumsum(heights, 0)
    used = tl.max(ends, 0)
    for start in tl.range(chunk * PART, blocks, chunks * PART):
        block = start + tl.arange(0, PART)
        expert = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), 1)
        nearest = tl.minimum(expert, BINS - 1)
        skipped = (block - tl.gather(ends - heights, nearest, 0)) * BLOCK
        inside = block < blocks
        tl.store(table + block, tl.where(block < used, expert, -1), mask=inside)
        tl.store(table + blocks + block, tl.gather(first, nearest, 0) + skipped, mask=inside)
        left = tl.gather(total, nearest, 0) - skipped
        tl.store(table + 2 * blocks + block, tl.minimum(left, BLOCK), mask=inside)


def sort_pairs(given: Pairs, block: int) -> Blocks:
    """Sort pairs, whose experts [T, k] are contiguous, into blocks of up to `block` pairs."""
    experts, pairs, count = given.experts, given.number, given.count
    assert experts.is_contiguous()
    device = experts.device
    chunks = cdiv(pairs, _CHUNK)
    most = min(pairs, (pairs + count * (block - 1)) // block)
    order = torch.empty((pairs,), dtype=torch.int32, device=device)
    table = torch.empty((3, most), dtype=torch.int32, device=device)
    constants = _constants(count, block, chunks)
    counts = None
    if not constants["RECOUNT"]:
        counts = torch.empty((chunks, constants["BINS"]), dtype=torch.int32, device=device)
        shape = {name: constants[name] for name in ("CHUNK", "BINS")}
        count_kernel[(chunks,)](experts, counts, pairs, count, **shape, num_warps=4, **OPTIONS)
    place_kernel[(chunks,)](experts, counts, order, table, pairs, most, count, **constants, num_warps=_WARPS, **OPTIONS)
    return Blocks(order, table, block)


def _constants(experts: int, block: int, chunks: int) -> dict[str, Any]:
    bins = max(32, next_power_of_2(experts))
    return {
        "CHUNK": _CHUNK,
        "BINS": bins,
        "PART": _PART,
        "COUNTS": _COUNTS // bins,
        "BLOCK": block,
        "RECOUNT": chunks <= _RECOUNT,
    }
