# SPDX-License-Identifier: MIT
"""Find the cut of a row of logits without sorting: the k-th largest logit, and the last token that top_p keeps.

The **cut** is the logit at which the sum of the weights, from the largest logit down, reaches a limit. (For top_k every
weight is 1.) One pass sums the weights at or above each of eight logits, the **edges**, and so finds the two edges
between which the cut is. The logits between these edges are copied, and are searched in the same way, until few are
left or all are equal. (A literal 0 as an argument would compile a function a second time, hence `np.int64(0)`.)

A row's workspace has a few fixed arrays, then the chunks' maxima, the chunks' sums and the copied logits. Functions
take a row as the address of its first chunk, the address of its last chunk's copy, and the number of chunks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float64_at
from candle_vllm.core.kernels.sampling import cpu_chunks
from candle_vllm.core.kernels.sampling.contract import (
    CHUNK,
    CHUNK_BYTES,
    EDGES_AT,
    MASSES_AT,
    MAXIMA_AT,
    MAXIMA_BYTES,
    SUMS_AT,
    TAIL_AT,
)

_VALUES_AT = SUMS_AT  # plus chunks * (MAXIMA_BYTES + 8): offset of the copied logits
ALL = 1 << 40  # more ties than a row can have
LOG2_E = math.log2(math.e)
LOWEST = np.float32(np.finfo(np.float32).min)
INFINITE = np.float32(np.inf)
_FEW = 48  # maximum number of logits that are sorted instead of searched
_EVEN_ROUNDS = 6  # rounds with evenly spaced edges; then the edges' keys are evenly spaced, so that the search ends


@cpu_chunks.inner
def survey(row, vocabulary, work):
    """Prepare a row: fill up its last chunk, find the maxima of all chunks. Return the largest logit, or NaN."""
    chunks = (vocabulary + CHUNK - 1) // CHUNK
    whole = (chunks - 1) * CHUNK
    rest, last = float32_at(row + 4 * whole), float32_at(work + TAIL_AT)
    for place in range(CHUNK):
        last[place] = rest[place] if place < vocabulary - whole else -INFINITE
    odd = 0
    maxima = work + MAXIMA_AT
    for number in range(chunks):
        odd |= cpu_chunks.chunk_maxima(
            cpu_chunks.chunk_at(row, work + TAIL_AT, chunks, number), maxima + number * MAXIMA_BYTES
        )
    numbers = float32_at(maxima)
    for place in range(chunks * LANES, (chunks * LANES + CHUNK - 1) // CHUNK * CHUNK):
        numbers[place] = -INFINITE
    return np.float32(np.nan) if odd else cpu_chunks.largest_of(maxima, chunks)


@cpu_chunks.inner
def first_at(row, chunks, work, low, high, skip):
    """Skip the first `skip` logits in [low, high), and return the id of the next one, which must exist."""
    for number in range(chunks):
        if cpu_chunks.reaches(work + MAXIMA_AT + number * MAXIMA_BYTES, low):
            at = cpu_chunks.chunk_at(row, work + TAIL_AT, chunks, number)
            for group in range(cpu_chunks.GROUPS):
                found = cpu_chunks.hits(at + group * 4 * cpu_chunks.GROUP, low, high)
                while found != 0:
                    if skip == 0:
                        return number * CHUNK + group * cpu_chunks.GROUP + cpu_chunks.first_bit(found)
                    skip -= 1
                    found &= found - 1
    return 0


@cpu_chunks.inner
def _copy_out(row, last, chunks, maxima, low, high, to) -> tuple[Any, Any, Any]:
    """Copy the logits in [low, high) to `to`, padded to whole chunks; return their number, least and largest.

    With `maxima` 0, all chunks are searched. `to` may be the row itself. At least one logit must be in the range.
    """
    end = to
    for number in range(chunks):
        if maxima == 0 or cpu_chunks.reaches(maxima + number * MAXIMA_BYTES, low):
            end = cpu_chunks.copy_hits(cpu_chunks.chunk_at(row, last, chunks, number), low, high, end)
    count, target = (end - to) >> 2, float32_at(to)
    filled = (count + CHUNK - 1) // CHUNK * CHUNK
    for place in range(count, filled):
        target[place] = -INFINITE
    return count, cpu_chunks.least_of(to, filled // LANES), cpu_chunks.largest_of(to, filled // LANES)


@cpu_chunks.inner
def _between(work, limit, mass) -> tuple[Any, Any, Any]:
    """Return the range [low, high) of the cut, and the mass from high up; `mass` is that of larger logits, unsummed."""
    edges, masses = float32_at(work + EDGES_AT), float64_at(work + MASSES_AT)
    low = cpu_chunks.EDGES - 1
    while low > 0 and mass + masses[low] < limit:
        low -= 1
    high = low + 1
    while high < cpu_chunks.EDGES and edges[high] <= edges[low]:  # rounding may make edges equal
        high += 1
    if high == cpu_chunks.EDGES:
        return edges[low], INFINITE, mass
    return edges[low], edges[high], mass + masses[high]


@cpu_chunks.inner
def _sum_masses(row, last, chunks, maxima, bound, largest, scale, work):
    masses = float64_at(work + MASSES_AT)
    for edge in range(cpu_chunks.EDGES):
        masses[edge] = 0.0
    for number in range(chunks):
        if maxima == 0 or cpu_chunks.reaches(maxima + number * MAXIMA_BYTES, bound):
            cpu_chunks.add_masses(
                cpu_chunks.chunk_at(row, last, chunks, number), largest, scale, work + EDGES_AT, work + MASSES_AT
            )


@cpu_chunks.inner
def _narrow(values, count, least, most, mass, limit, largest, rate, work) -> tuple[Any, Any]:
    """Find the cut among `values`; `mass` is the sum of weights of all larger logits.

    Returns the cut, and how many of the logits that equal it are kept (`ALL` for all).
    """
    scale, edges, rounds = np.float32(rate * LOG2_E), float32_at(work + EDGES_AT), 0
    while count > _FEW and least < most:
        low_key, keys = cpu_chunks.key_of(least), cpu_chunks.key_of(most) - cpu_chunks.key_of(least)
        for edge in range(cpu_chunks.EDGES):
            if rounds < _EVEN_ROUNDS:
                edges[edge] = np.float32(float(least) + (float(most) - float(least)) * edge / cpu_chunks.EDGES)
            else:
                edges[edge] = cpu_chunks.value_of(low_key + (keys * edge + cpu_chunks.EDGES - 1) // cpu_chunks.EDGES)
        chunks = (count + CHUNK - 1) // CHUNK
        end = values + (chunks - 1) * CHUNK_BYTES
        _sum_masses(values, end, chunks, np.int64(0), least, largest, scale, work)
        low, high, mass = _between(work, limit, mass)
        count, least, most = _copy_out(values, end, chunks, np.int64(0), low, high, values)
        rounds += 1
    if least == most:
        kept = (limit - mass) / math.exp((float(least) - float(largest)) * rate)
        return least, max(math.ceil(kept), 1) if kept <= count - 1 else ALL
    return _cut_of_few(float32_at(values), count, mass, limit, largest, rate)


@cpu_chunks.inner
def _cut_of_few(values, count, mass, limit, largest, rate) -> tuple[Any, Any]:
    """Do what `_narrow` does by sorting the values and adding their weights one after the other."""
    for place in range(1, count):
        value, to = values[place], place
        while to > 0 and values[to - 1] < value:
            values[to] = values[to - 1]
            to -= 1
        values[to] = value
    kept = 0
    while kept < count and (kept == 0 or mass < limit):
        mass += math.exp((float(values[kept]) - float(largest)) * rate)
        kept += 1
    cut, ties = values[kept - 1], 0
    while ties < kept and values[kept - 1 - ties] == cut:
        ties += 1
    return cut, ties if kept < count and values[kept] == cut else ALL


@cpu_chunks.inner
def kth_largest(row, chunks, work, k, largest) -> tuple[Any, Any]:
    """Return the k-th largest logit (the least if fewer are finite) and how many equal ones the top k has, or `ALL`."""
    last, maxima, values = work + TAIL_AT, work + MAXIMA_AT, work + _VALUES_AT + chunks * (MAXIMA_BYTES + 8)
    # The k-th largest of the chunks' maxima is a lower bound of the k-th largest logit.
    parts = (chunks * LANES + CHUNK - 1) // CHUNK
    end = maxima + (parts - 1) * CHUNK_BYTES
    bound = LOWEST
    count, least, most = _copy_out(maxima, end, parts, np.int64(0), LOWEST, INFINITE, values)
    if count >= k:
        bound, _ = _narrow(values, count, least, most, 0.0, float(k), largest, 0.0, work)
    count, least, most = _copy_out(row, last, chunks, maxima, bound, INFINITE, values)
    return _narrow(values, count, least, most, 0.0, float(k), largest, 0.0, work)


@cpu_chunks.inner
def nucleus(row, chunks, work, bound, top_p, largest, rate) -> tuple[Any, Any]:
    """Return the least logit at or above `bound` that top_p keeps, and how many equal ones it keeps, or `ALL`."""
    last, maxima, values = work + TAIL_AT, work + MAXIMA_AT, work + _VALUES_AT + chunks * (MAXIMA_BYTES + 8)
    # All tokens with less weight than (1 - top_p) / V together have a mass below 1 - top_p: the cut is above them.
    light = (math.log2(chunks * CHUNK / (1.0 - top_p)) + 1.0) / (rate * LOG2_E)
    floor = max(bound, np.float32(float(largest) - light))
    edges = float32_at(work + EDGES_AT)
    edges[0] = bound
    for edge in range(1, cpu_chunks.EDGES):
        edges[edge] = np.float32(float(floor) + (float(largest) - float(floor)) * (edge - 1) / (cpu_chunks.EDGES - 1))
    _sum_masses(row, last, chunks, maxima, bound, largest, np.float32(rate * LOG2_E), work)
    limit = top_p * float64_at(work + MASSES_AT)[0]
    low, high, mass = _between(work, limit, 0.0)
    count, least, most = _copy_out(row, last, chunks, maxima, low, high, values)
    return _narrow(values, count, least, most, mass, limit, largest, rate, work)


@cpu_chunks.inner
def min_p_bound(min_p, largest, temperature):
    """Return the smallest float32 that as a logit has a weight of at least `min_p`, by bisection over all floats."""
    low, high = cpu_chunks.key_of(LOWEST), cpu_chunks.key_of(largest)  # low: weight maybe too small; high: large enough
    while low < high:
        middle = (low + high) // 2
        if math.exp((float(cpu_chunks.value_of(middle)) - float(largest)) / temperature) >= min_p:
            high = middle
        else:
            low = middle + 1
    return cpu_chunks.value_of(high)
