"""How paged attention is cut into work on the CPU, and the scratch memory that this takes (step 6 of a request's life).

The chunks of a sequence depend on positions alone, so that a row's result is always made of the same parts. Which
sequences are shared among threads depends on the whole step; both operations of `cpu.py` ask the same functions.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.attention.cpu_tiles import (
    CHUNK,
    PROBABILITY_STRIDE,
    ROWS,
    SCORE_STRIDE,
    partial_floats,
)
from candle_vllm.core.kernels.cpu_runtime.emit import LANES

ROW_TILE = 64  # query rows of a unit
_UNITS_PER_THREAD = 8  # a unit larger than this part of a thread's share of the step is split by chunks
_SPLIT_STREAMS = 16  # sequences whose partial results fit in scratch memory
_MOST_PARTIALS = 32 << 20  # bytes, where one sequence needs no more
HEADER = 64  # bytes before the threads' scratch memory: the counter, on a cache line of its own
TILE_LIST = 16 * (CHUNK // LANES)  # bytes of the addresses of a chunk's tiles, keys and values


@njit(inline="always")
def chunk_start(chunk: int) -> int:
    """Position where a chunk begins: 4 of 64, 6 of 128, then 256 each; short ones first, to share a short context."""
    return 64 * chunk + 64 * max(chunk - 4, 0) + 128 * max(chunk - 10, 0)


@njit(inline="always")
def chunk_of(position: int) -> int:
    """The chunk that a position belongs to."""
    if position < 256:
        return position >> 6
    if position < 1024:
        return 2 + (position >> 7)
    return 6 + (position >> 8)


@njit(inline="always")
def first_seen(position: int, window: int) -> int:
    """The first position that a token sees; window 0 is none."""
    return max(0, position - window + 1) if window > 0 else 0


@njit(inline="always")
def total_cost(starts, contexts, sequences: int, window: int) -> int:
    """Query rows times keys, of all sequences."""
    total = 0
    for r in range(sequences):
        total += cost(starts[r + 1] - starts[r], contexts[r], window)
    return total


@njit(inline="always")
def cost(tokens: int, context: int, window: int) -> int:
    return tokens * (min(context, tokens + window) if window > 0 else context)


@njit(inline="always")
def count_row_tiles(rows: int) -> int:
    return (rows + ROW_TILE - 1) // ROW_TILE


@njit(inline="always")
def split_bytes(
    tokens: int, context: int, window: int, heads: int, kv_heads: int, total: int, threads: int, free: int, row: int
) -> int:
    """Bytes of partial results if a sequence is split by chunks, 0 if it is not. Both operations ask this."""
    chunks = chunk_of(context - 1) - chunk_of(first_seen(context - tokens, window)) + 1
    units = count_row_tiles(tokens * (heads // kv_heads)) * kv_heads
    size = tokens * heads * chunks * row
    large = cost(tokens, context, window) * threads * _UNITS_PER_THREAD > total * units
    return size if chunks > 1 and large and size <= free else 0


def scratch_per_thread(head_dim: int) -> int:
    """Scratch memory of one thread: tile addresses, positions, queries, scores, probabilities, partials, states."""
    row = 4 * partial_floats(head_dim)
    rows = ROW_TILE * (8 + 2 * head_dim + row) + ROWS * (SCORE_STRIDE + PROBABILITY_STRIDE + row)
    return -(-(TILE_LIST + rows) // 128) * 128


def scratch_bytes(*, max_tokens: int, max_seqs: int, heads: int, head_dim: int, max_context: int, threads: int) -> int:
    """Size of the scratch memory that all layers share, in bytes; it begins zeroed, at a multiple of 64.

    Args:
        max_tokens, max_seqs, max_context: most tokens and sequences of a step, longest sequence.
        heads, head_dim: H and D.
        threads: of the team.
    """
    chunks = chunk_of.py_func(max_context) + 1
    stream = heads * chunks * 4 * partial_floats(head_dim)
    streams = max(1, min(max_tokens, max_seqs, _SPLIT_STREAMS))
    return HEADER + threads * scratch_per_thread(head_dim) + max(stream, min(streams * stream, _MOST_PARTIALS))
