# SPDX-License-Identifier: MIT
"""Work items of the kernels for one new token per sequence: the sequence of an item, and its split of the context.

A row is a sequence. In this module an item is one split (`triton.py`) of all KV heads. Every program of a launch counts
the splits of all sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):
    """Return the first position that a token attends to; a negative WINDOW means chunks of -WINDOW positions."""
    return tl.maximum(position, 0) // -WINDOW * -WINDOW if WINDOW < 0 else tl.maximum(position - WINDOW + 1, 0)


@triton.jit
def split_keys(context, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr):
    """Return the first key's position, the number of keys of a split, and the number of splits (0 without context)."""
    begin = context * 0
    if WINDOW:
        begin = first_seen(context - 1, WINDOW) // BLOCK_N * BLOCK_N
    keys = tl.maximum(tl.cdiv(context - begin, SPLITS), CHUNK)
    keys = tl.cdiv(keys, BLOCK_N) * BLOCK_N
    return begin, keys, tl.cdiv(context - begin, keys)


@triton.jit
def count_items(
    context_lens,  # [rows]
    decoding,  # [1] int32, or None: rows first + r from this number on have no items
    first,
    rows,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the end of each sequence's items [ROWS], and their number; for at most ROWS sequences."""
    if decoding is not None:
        rows = tl.minimum(rows, tl.load(decoding) - first)
    index = tl.arange(0, ROWS)
    contexts = tl.load(context_lens + index, mask=index < rows, other=0).to(tl.int32)
    _, _, counts = split_keys(contexts, WINDOW, BLOCK_N, SPLITS, CHUNK)
    return tl.cumsum(counts, 0), tl.sum(counts)


@triton.jit
def counted_item(ends, work):
    """Return row and split of an item, from the result of `count_items`."""
    done = ends <= work
    return tl.sum(done.to(tl.int32)), work - tl.max(tl.where(done, ends, 0))
