# SPDX-License-Identifier: MIT
"""Split paged attention on the CPU into units of work, within the scratch memory (step 6 of a request's life).

Terms: see `cpu_cache.py`. Chunks depend only on positions, so that a row's result is always merged from the same
partial results. Which sequences are split among threads depends on the whole step.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.attention import cpu_cache
from candle_vllm.core.kernels.attention.cpu_cache import ROW_TILE

_UNITS_PER_THREAD = 8  # a unit that is larger than 1/8 of a thread's share of the step is split by chunks


@njit(inline="always")
def chunk_start(chunk: int) -> int:
    """Return a chunk's first position: the first 4 chunks have 64 positions, the next 6 have 128, later ones 256."""
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
    """Return the cost of the step: new tokens times keys, summed over all sequences."""
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
    """Return the bytes of a sequence's partial results if its units have only some of the chunks; 0 if they have all.
    `free` is the bytes of scratch memory, `row` those of a row's partial result, and `total` is `total_cost`."""
    chunks = chunk_of(context - 1) - chunk_of(first_seen(context - tokens, window)) + 1
    units = count_row_tiles(tokens * (heads // kv_heads)) * kv_heads
    size = tokens * heads * chunks * row
    large = cost(tokens, context, window) * threads * _UNITS_PER_THREAD > total * units
    return size if chunks > 1 and large and size <= free else 0
