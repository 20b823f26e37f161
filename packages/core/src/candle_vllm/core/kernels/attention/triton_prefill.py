# SPDX-License-Identifier: MIT
"""Paged attention of several new tokens of a sequence on a GPU: prompts, chunks of prompts, draft tokens.

A program computes one KV head and a tile of queries: BLOCK_M rows, which are some neighbouring tokens of one sequence
times the query heads of this KV head. It reads the tiles of keys from position 0, or from the start of the window, to
its last token. Only tiles that are not fully visible to every row are masked. The number of programs depends only on
the numbers of tokens and sequences; programs beyond the last tile of queries end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.rows import DeviceRows, ScoreOptions
from candle_vllm.core.kernels.attention.triton_items import first_seen
from candle_vllm.core.kernels.attention.triton_tiles import (
    as_queries,
    attend_tile,
    key_unit,
    load_scales,
    load_tile,
    tile_slots,
    value_rest,
    value_unit,
)
from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE, has_row_scales
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability, next_power_of_2, stages

_ROWS = 256  # sequences that a program compares at a time to find the sequence of its tile


@triton.jit
def behind_decodes(query_start, context_lens, block_tables, table_stride, rows, decoding):
    """Return a step's tables and number of sequences, from sequence decoding[0] on if `decoding` is not None."""
    if decoding is not None:
        decodes = tl.load(decoding)
        query_start += decodes
        context_lens += decodes
        block_tables += decodes.to(tl.int64) * table_stride
        rows -= decodes
    return query_start, context_lens, block_tables, rows


@triton.jit
def find_tile(query_start, rows, tile, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr):
    """Return the sequence of a tile of queries, and the index of the tile in the sequence.

    Sequence r begins at tile (query_start[r] - query_start[0]) // BLOCK_Q + r, so there are enough tiles for each.
    """
    origin = tl.load(query_start).to(tl.int32)
    row = -1
    begin = 0
    for base in range(0, rows, ROWS):
        index = base + tl.arange(0, ROWS)
        starts = tl.load(query_start + index, mask=index < rows, other=0).to(tl.int32)
        starts = (starts - origin) // BLOCK_Q + index
        before = (starts <= tile) & (index < rows)
        row += tl.sum(before.to(tl.int32))
        begin = tl.maximum(begin, tl.max(tl.where(before, starts, 0)))
    return row, tile - begin


@triton.jit
def attend_keys(
    queries,
    tops,
    sums,
    values,
    key_cache,
    value_cache,
    table,  # block table of the row
    at,  # position of the tile's first key
    end,  # position after the last key
    head,
    positions,
    scoring,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    EXTRA: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    EXTENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENDS: tl.constexpr,  # some keys of the tile may be beyond the end
    MASKED: tl.constexpr,  # some rows may not attend to some keys of the tile
):
    """Update the softmax state of M rows with a tile of a sequence's keys and values; see `attend_tile`."""
    stored: tl.constexpr = key_cache.dtype.element_ty
    slots = tile_slots(table, at, end, S, BLOCK_N, ENDS)
    k = load_tile(key_cache + head * D, slots, at, end, K * D, D, DP, ENDS, S, EXTRA)
    v = load_tile(value_cache + head * D, slots, at, end, K * D, D, DP, ENDS, S, EXTRA)
    k_scales, v_scales = None, None
    if EXTRA:
        k_scales = load_scales(key_cache, slots, at, end, head, K, D, S, key_unit(stored), ENDS)
        v_scales = load_scales(value_cache, slots, at, end, head, K, D, S, value_unit(stored), ENDS)
    k = as_queries(k, queries.dtype)
    v = as_queries(v, queries.dtype)
    return attend_tile(
        queries, tops, sums, values, k, v, k_scales, v_scales, positions, at, scoring, CAP, WINDOW, EXTENT, MASKED
    )


# A step's tables may begin at any row: do not compile another version of the kernel for their alignment.
@triton.jit(
    do_not_specialize=["rows", "table_stride"],
    do_not_specialize_on_alignment=["query_start", "context_lens", "block_tables", "decoding"],
)
def prefill_kernel(
    q,  # [T, H, D]
    key_cache,  # [B, S, K, D], or with EXTRA the layout of `kv_write/scaled_rows`
    value_cache,
    out,  # [T, H, D]
    query_start,  # [rows + 1]
    context_lens,  # [rows]
    block_tables,  # [rows, ...]
    decoding,  # [1] int32: number of leading sequences that this kernel skips; None for 0
    key_scale,  # [1] fp32, read with FP8
    value_scale,  # [1] fp32
    sinks,  # [H] fp32, read with SINKS
    slopes,  # [H] fp32, or None
    relative,  # [T, H, EXTENT] fp32, relative logits, or None
    scale,
    cap,
    rows,
    q_stride,  # elements from a token to the next
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,  # H // K
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two, at least 16, as products need
    S: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 without a window
    EXTENT: tl.constexpr,  # 0 without relative logits
    CAP: tl.constexpr,
    FP8: tl.constexpr,
    EXTRA: tl.constexpr,  # bytes of scales in a block
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    stored: tl.constexpr = key_cache.dtype.element_ty
    head = tl.program_id(0) % K
    # From the last tile to the first: the last tiles of a prompt take the longest, so they should start first.
    tile = tl.num_programs(0) // K - 1 - tl.program_id(0) // K
    query_start, context_lens, block_tables, rows = behind_decodes(
        query_start, context_lens, block_tables, table_stride, rows, decoding
    )
    row, tile = find_tile(query_start, rows, tile, BLOCK_Q, ROWS)
    start = tl.load(query_start + row).to(tl.int32)
    count = tl.load(query_start + row + 1).to(tl.int32) - start
    if decoding is not None:
        count = tl.where(rows > 0, count, 0)  # without prompts, `count` is that of the last decode
    if tile * BLOCK_Q < count:
        context = tl.load(context_lens + row).to(tl.int32)
        lines = tl.arange(0, BLOCK_M)
        tokens = tile * BLOCK_Q + lines // G
        dims = tl.arange(0, DP)
        valid = ((lines < BLOCK_Q * G) & (tokens < count))[:, None] & (dims[None, :] < D)
        heads = head * G + lines % G
        token_index = (start + tokens).to(tl.int64)
        queries = tl.load(
            q + token_index[:, None] * q_stride + heads[:, None] * D + dims[None, :], mask=valid, other=0.0
        )

        first = context - count + tile * BLOCK_Q
        last = context - count + tl.minimum(tile * BLOCK_Q + BLOCK_Q, count) - 1
        positions = context - count + tokens
        begin = 0
        unmasked = 0
        whole = (first + 1) // BLOCK_N * BLOCK_N  # without a window, every row attends to the keys before this one
        if WINDOW:
            begin = first_seen(first, WINDOW) // BLOCK_N * BLOCK_N
            unmasked = tl.minimum(tl.cdiv(first_seen(last, WINDOW), BLOCK_N) * BLOCK_N, whole)

        factor = scale
        out_factor = 1.0
        if FP8:
            factor = scale * tl.load(key_scale)
            out_factor = tl.load(value_scale)
        if EXTRA:
            out_factor = value_rest(stored)
        cap_in = 0.0
        if CAP:
            cap_in = factor / cap
            factor = 1.0
        factor = factor * 1.4426950408889634
        table = block_tables + row.to(tl.int64) * table_stride
        scoring = (factor, cap_in, cap, slopes, relative)
        if slopes is not None:
            bias = tl.load(slopes + heads, mask=lines < BLOCK_Q * G, other=0.0) * (1.4426950408889634 / factor)
            scoring = (factor, cap_in, cap, bias, relative)
        if EXTENT:
            logits = relative + (start + tile * BLOCK_Q).to(tl.int64) * (K * G * EXTENT)
            there = (lines < BLOCK_Q * G) & (tokens < count)
            bias = tl.where(there, lines // G * (K * G) + heads, 0) * EXTENT
            scoring = (factor, cap_in, cap, bias, logits)

        tops = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        values = tl.zeros([BLOCK_M, DP], tl.float32)
        if WINDOW:
            for at in range(begin, unmasked, BLOCK_N):
                tops, sums, values = attend_keys(
                    queries, tops, sums, values, key_cache, value_cache, table, at, last + 1, head, positions,
                    scoring, K, D, DP, S, EXTRA, CAP, WINDOW, EXTENT, BLOCK_N, False, True
                )  # fmt: skip
        for at in range(unmasked, whole, BLOCK_N):
            tops, sums, values = attend_keys(
                queries, tops, sums, values, key_cache, value_cache, table, at, last + 1, head, positions, scoring,
                K, D, DP, S, EXTRA, CAP, WINDOW, EXTENT, BLOCK_N, False, False
            )  # fmt: skip
        for at in range(whole, last + 1, BLOCK_N):
            tops, sums, values = attend_keys(
                queries, tops, sums, values, key_cache, value_cache, table, at, last + 1, head, positions, scoring,
                K, D, DP, S, EXTRA, CAP, WINDOW, EXTENT, BLOCK_N, True, True
            )  # fmt: skip
        if SINKS:
            sink = tl.load(sinks + heads, mask=lines < BLOCK_Q * G, other=0.0) * 1.4426950408889634
            sums = tl.where(sums > 0.0, sums + tl.exp2(sink - tops * factor), 1.0)
        sums = tl.where(sums > 0.0, sums, 1.0)  # rows beyond the last token may have seen no keys
        values = values * (out_factor / sums)[:, None]
        at_out = out + token_index[:, None] * (K * G * D) + heads[:, None] * D + dims[None, :]
        tl.store(at_out, values.to(out.dtype.element_ty), mask=valid)


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile of queries, keys of a tile of keys, and launch parameters."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles(padded_dim: int, bytes_per_number: int, group: int, capability: int, *, relative: bool = False) -> Tiles:
    """Choose by the shape of a head, the GPU and whether there are relative logits alone, never by the batch.

    Not measured yet: the largest tiles that do not spill registers and, except on Hopper and data-centre Blackwell, fit
    in 99 KiB of shared memory. Of five pipeline stages, two or three load tiles; the others read the block table.
    """
    if bytes_per_number == 4 or capability < TENSOR_CORES:
        warps = 4 if (padded_dim > 128 or relative) and bytes_per_number != 4 else 8
        return Tiles(max(16, next_power_of_2(group)), 16, warps, 2)
    if relative and padded_dim <= 256:  # the addresses of logits need registers
        return Tiles(max(64, next_power_of_2(group)), 32, 8, 4)
    if padded_dim <= 64:
        return Tiles(128, 64, 8, 5)
    if padded_dim > 256:
        return Tiles(max(32, next_power_of_2(group)), 16, 8, 3)
    large = capability // 10 in (9, 10)
    if padded_dim <= 128:
        return Tiles(128, 64, 8, 5) if large else Tiles(128, 32, 8, 5)
    return Tiles(128, 32, 8, 3) if large else Tiles(64, 32, 8, 4)


def prefill(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    rows: DeviceRows,
    first: int,
    relative: torch.Tensor | None,
    scores: ScoreOptions,
) -> None:
    """Write the rows of `out` from sequence `first` on, with `rows.decoding` from sequence decoding[0] on.

    `relative` are the relative logits [T, H, X] fp32. The caller checks arguments.
    """
    contexts, tables = rows.context_lens[first:], rows.block_tables[first:]
    softcap, cache_scales, sinks = (scores.get(each) for each in ("softcap", "cache_scales", "sinks"))
    block_size, kv_heads, dim = *key_cache.shape[1:3], q.shape[2]
    rows_scaled = has_row_scales(key_cache, dim)
    group = q.shape[1] // kv_heads
    sizes = next_power_of_2(dim), q.element_size(), group, capability(q.device)
    shape = tiles(*sizes, relative=relative is not None)
    assert group <= shape.rows
    count = (len(q) - first) // (shape.rows // group) + len(contexts)
    flags = (scores.get("window") or 0, softcap is not None, cache_scales is not None, sinks is not None)
    prefill_kernel[(count * kv_heads,)](
        q,
        key_cache,
        value_cache,
        out,
        rows.query_start[first:],
        contexts,
        tables,
        rows.decoding,
        *(cache_scales or (None, None)),
        sinks,
        scores.get("slopes"),
        relative,
        scores["scale"],
        softcap or 0.0,
        len(contexts),
        q.stride(0),
        tables.stride(0),
        **_constants(shape, kv_heads, group, dim, block_size, *flags, rows_scaled),
        EXTENT=0 if relative is None else relative.shape[2],
        num_warps=shape.num_warps,
        num_stages=stages(shape.num_stages),
        **OPTIONS,
    )


def _constants(
    shape: Tiles,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    window: int,
    cap: bool,
    fp8: bool,
    sinks: bool,
    rows: bool,
) -> dict[str, Any]:
    return {
        "K": kv_heads,
        "G": group,
        "D": dim,
        "DP": max(16, next_power_of_2(dim)),
        "S": block_size,
        "WINDOW": window,
        "CAP": cap,
        "FP8": fp8,
        "EXTRA": SCALE * block_size * kv_heads * rows,
        "SINKS": sinks,
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.keys,
        "ROWS": _ROWS,
    }
