# SPDX-License-Identifier: MIT
"""Code that the sampling kernels on a GPU share: rows in chunks, logits as integers, and the search for a threshold.

A row is always divided into the same **chunks** of CHUNK logits, and a chunk into GROUPS **groups**. Weights are
integers in units of 2^-43; a **mass** is a sum of weights. Sums of integers have the same bits in any order, so a row's
result cannot depend on other rows, nor on the order of programs. The mass of 2^19 weights is at most 2^62.

A logit's **key** is an int32 in the same order; -0 and 0 have one key. A logit **reaches** keys up to its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import cdiv, next_power_of_2

CHUNK = tl.constexpr(4096)  # logits of a program
GROUPS = tl.constexpr(64)  # groups of each chunk: every 64th logit
BLOCK = tl.constexpr(1024)  # logits that a program loads at a time when it searches a row
WAYS = tl.constexpr(8)  # number of parts into which a program that searches a row divides a range of keys
BUFFER = tl.constexpr(8192)  # maximum number of logits of a row that are copied to a list
MOST_LOGITS = 1 << 19

KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
NONE = tl.constexpr(2147483647)  # above every key


@triton.jit
def key_of(x):
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(key == -1, 0, key)


@triton.jit
def value_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(x, largest, scale):
    """Return the weight exp2((x - largest) * scale), an int64 in units of 2^-43."""
    return (tl.exp2((x - largest) * scale) * 8796093022208.0).to(tl.int64)


@triton.jit
def search(source, count, limit, lo, hi, floor, largest, scale, BY_MASS: tl.constexpr):
    """Find the largest key at which the sum of weights, from the largest key down, reaches `limit`.

    Without BY_MASS every weight is 1; with BY_MASS it is `mass_of`, but 0 below the key `floor`. The sum reaches the
    limit at the key `lo`, but not at `hi`. Returns the key and the sum above it.
    """
    lo, hi, above = lo.to(tl.int64), hi.to(tl.int64), limit * 0
    way = tl.arange(0, WAYS)
    first = True
    while first | (hi - lo > 1):
        # The first round runs even if only `lo` is possible: it has an edge at `hi`, and so finds the sum above `lo`.
        step = tl.maximum((hi - lo + WAYS - 1) // WAYS, 1)
        edges = tl.minimum(lo + (way + 1) * step, hi).to(tl.int32)
        sums = tl.zeros([WAYS], tl.int64)
        for start in tl.range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(source + at, mask=at < count, other=float("-inf"))
            key = key_of(x)
            if BY_MASS:
                weights = tl.where((key >= floor) & (at < count), mass_of(x, largest, scale), 0)
            else:
                weights = (at < count).to(tl.int64)
            sums += tl.sum(tl.where(key[:, None] >= edges[None, :], weights[:, None], 0), axis=0)
        reached = tl.sum((sums >= limit).to(tl.int64))  # below WAYS, because the last edge is `hi`
        above = tl.sum(tl.where(way == reached, sums, 0))
        hi = tl.minimum(lo + (reached + 1) * step, hi)
        lo = lo + reached * step
        first = False
    return lo.to(tl.int32), above


@triton.jit
def gather(source, chunk, count, edge, counts, C, CB: tl.constexpr, values, names):
    """Copy the logits of a chunk that reach the key `edge`, and their ids, to the row's lists.

    counts: [C], the number of such logits in each chunk. The order of ids is preserved.
    """
    part = tl.arange(0, CB)
    offset = tl.sum(tl.load(counts + part, mask=(part < C) & (part < chunk), other=0))
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(source + at, mask=at < count, other=float("-inf"))
    hit = (key_of(x) >= edge) & (at < count)
    place = offset + tl.cumsum(hit.to(tl.int32), axis=0) - 1
    tl.store(values + place, x, mask=hit)
    tl.store(names + place, at, mask=hit)


@triton.jit
def survey_kernel(
    logits,  # [R, V] fp32, rows contiguous
    group_maxima,  # [R, C * GROUPS] fp32
    maxima,  # [R, C] fp32; NaN if the chunk has one
    firsts,  # [R, C] int32: the first id of each chunk's largest logit
    row_stride,
    V,
    C,
):
    """Find the largest logits of chunks and groups. A row's k-th largest logit is at least the k-th largest group's."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tl.arange(0, GROUPS)
    at = chunk * CHUNK + tl.arange(0, CHUNK // GROUPS)[:, None] * GROUPS + group[None, :]
    x = tl.load(logits + row * row_stride + at, mask=at < V, other=float("-inf"))
    tops = tl.max(x, axis=0)
    broken = tl.max(tl.max((x != x).to(tl.int32), axis=0), axis=0)
    top = tl.max(tops, axis=0)
    first = tl.min(tl.min(tl.where((x == top) & (at < V), at, NONE), axis=0), axis=0)
    tl.store(group_maxima + (row * C + chunk) * GROUPS + group, tops)
    tl.store(maxima + row * C + chunk, tl.where(broken > 0, float("nan"), top))
    tl.store(firsts + row * C + chunk, first)


@triton.jit
def largest_of(maxima, C, CB: tl.constexpr):
    """Return the maximum of a row's chunks, or NaN."""
    part = tl.arange(0, CB)
    tops = tl.load(maxima + part, mask=part < C, other=float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), axis=0)
    return tl.where(broken > 0, float("nan"), tl.max(tops, axis=0))


class Rows(NamedTuple):
    """Logits [R, V] and the results of `survey_kernel`; C chunks of a row, CB is C rounded up to a power of two."""

    logits: torch.Tensor
    group_maxima: torch.Tensor
    maxima: torch.Tensor
    firsts: torch.Tensor
    chunks: int

    @property
    def grid(self) -> tuple[int, int]:
        """Grid with a program for each chunk of each row."""
        return len(self.logits), self.chunks

    @property
    def block(self) -> int:
        """The number of chunks, rounded up to a power of two (CB)."""
        return next_power_of_2(self.chunks)


def rows_of(logits: torch.Tensor) -> Rows:
    """Check logits and allocate memory for `survey_kernel`."""
    count, vocabulary = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1 or vocabulary == 1, "each row is contiguous"
    assert 0 < vocabulary <= MOST_LOGITS
    chunks = cdiv(vocabulary, CHUNK.value)
    return Rows(
        logits,
        torch.empty(count, chunks * GROUPS.value, dtype=torch.float32, device=logits.device),
        torch.empty(count, chunks, dtype=torch.float32, device=logits.device),
        torch.empty(count, chunks, dtype=torch.int32, device=logits.device),
        chunks,
    )
