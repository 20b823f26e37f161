# SPDX-License-Identifier: MIT
"""Split paged attention into units of work on the CPU, with their scratch memory (step 6 of a request's life).

The chunks of a sequence depend only on positions, so that a row's result is always the sum of the same parts. Which
sequences are split among threads depends on the whole step; both operations of `cpu.py` use these functions.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.attention import cpu_cache
from candle_vllm.core.kernels.attention.cpu_cache import ROW_TILE

_UNITS_PER_THREAD = 8  # a unit that is larger than 1/8 of a thread's share of the step is split by chunks


@njit(inline="always")
def chunk_start(chunk: int) -> int:
    """Return where a chunk begins: 4 have 64 positions, 6 have 128, others 256, so that short contexts can be split."""
    return 64 * chunk + 64 * max(chunk - 4, 0) + 128 * max(chunk - 10, 0)


chunk_of = njit(inline="always")(cpu_cache.chunk_of)


@njit(inline="always")
def first_seen(position: int, window: int) -> int:
    """Return the first position that a token attends to; `window` is 0 without a window, negative for chunks."""
    if window < 0:
        return position // -window * -window
    return max(0, position - window + 1) if window > 0 else 0


@njit(inline="always")
def total_cost(starts, contexts, sequences: int, window: int) -> int:
    """Return the number of query rows times keys, summed over all sequences."""
    total = 0
    for r in range(sequences):
        total += cost(starts[r + 1] - starts[r], contexts[r], window)
    return total


@njit(inline="always")
def cost(tokens: int, context: int, window: int) -> int:
    return tokens * (min(context, tokens + abs(window)) if window != 0 else context)


@njit(inline="always")
def count_row_tiles(rows: int) -> int:
    return (rows + ROW_TILE - 1) // ROW_TILE


@njit(inline="always")
def split_bytes(
    tokens: int, context: int, window: int, heads: int, kv_heads: int, total: int, threads: int, free: int, row: int
) -> int:
    """Return the bytes of partial results of a sequence that is split by chunks; 0 if it is not split."""
    chunks = chunk_of(context - 1) - chunk_of(first_seen(context - tokens, window)) + 1
    units = count_row_tiles(tokens * (heads // kv_heads)) * kv_heads
    size = tokens * heads * chunks * row
    large = cost(tokens, context, window) * threads * _UNITS_PER_THREAD > total * units
    return size if chunks > 1 and large and size <= free else 0
