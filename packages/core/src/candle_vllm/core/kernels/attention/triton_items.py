# SPDX-License-Identifier: MIT
"""Work items of the kernels for one new token per sequence: the sequence of an item, and its split of the context.

A row is a sequence. In this module an item is one split (`triton.py`) of all KV heads. Either every program of a launch
counts the splits of all sequences, or, with `ITEM_LIST`, a kernel lists them once per step for the calls of all layers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS

ITEM_LIST = 0  # 1: work items are listed once per step, not counted by each program; not measured on a GPU yet

LISTED = 32  # sequences that the listing kernel processes at a time


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


# A step's tables may begin at any row: do not compile another version of the kernel for their alignment.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["context_lens", "decoding"])
def list_items_kernel(
    items,  # [1 + rows * SPLITS] int32
    context_lens,  # [rows]
    decoding,  # [1] int32, or None: rows from this number on have no items
    rows,
    WINDOW: tl.constexpr,  # 0 without a window
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the number of work items of a step, then row * SPLITS + split of each, in order. One program."""
    if decoding is not None:
        rows = tl.minimum(rows, tl.load(decoding))
    splits = tl.arange(0, SPLITS)
    total = 0
    for base in range(0, rows, ROWS):
        index = base + tl.arange(0, ROWS)
        contexts = tl.load(context_lens + index, mask=index < rows, other=0).to(tl.int32)
        _, _, counts = split_keys(contexts, WINDOW, BLOCK_N, SPLITS, CHUNK)
        places = total + tl.cumsum(counts, 0) - counts
        numbers = index[:, None] * SPLITS + splits[None, :]
        tl.store(items + 1 + places[:, None] + splits[None, :], numbers, mask=splits[None, :] < counts[:, None])
        total += tl.sum(counts)
    tl.store(items, total)


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


@triton.jit
def listed_item(items, work, SPLITS: tl.constexpr):
    """Return row and split of an item, from the list of `list_items_kernel`."""
    number = tl.load(items + 1 + work)
    return number // SPLITS, number % SPLITS


def list_items(
    lists: dict[tuple[int, ...], torch.Tensor],
    context_lens: torch.Tensor,
    decoding: torch.Tensor | None,
    constants: dict[str, Any],
) -> torch.Tensor:
    """Return the step's list of work items, computed at the first call; `constants` are those of the merging kernel."""
    cut = {name: constants[name] for name in ("WINDOW", "BLOCK_N", "SPLITS", "CHUNK")}
    rows = len(context_lens)
    key = (rows, *cut.values())
    if key not in lists:
        lists[key] = torch.empty(1 + rows * cut["SPLITS"], dtype=torch.int32, device=context_lens.device)
        list_items_kernel[(1,)](lists[key], context_lens, decoding, rows, **cut, ROWS=LISTED, num_warps=4, **OPTIONS)
    return lists[key]
