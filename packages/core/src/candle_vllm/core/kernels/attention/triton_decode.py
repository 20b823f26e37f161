# SPDX-License-Identifier: MIT
"""Paged attention of one new token of each sequence on a GPU, split over the keys so that all multiprocessors work.

The keys of a sequence are divided into splits, by the length of its context alone. A work item is one split of one KV
head of one sequence. The programs of a launch, whose number depends only on the number of sequences, find the items on
the device (`triton_items`) and share them, so a captured launch serves any lengths. An item's partial result is the
state of the online softmax in fp32; a second kernel merges the partial results of a sequence in a fixed order, unless
there is only one. So a result depends on its own sequence alone, bit for bit.
Source: Dao et al., 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.rows import DeviceRows, ScoreOptions
from candle_vllm.core.kernels.attention.triton_items import count_items, counted_item, split_keys
from candle_vllm.core.kernels.attention.triton_tiles import (
    add_values,
    as_queries,
    attend_tile,
    key_unit,
    load_scales,
    load_tile,
    tile_slots,
    unpack_pairs,
    value_rest,
    value_unit,
    weigh_tile,
)
from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE, has_row_scales
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability, next_power_of_2, stages

_ROWS = 256  # maximum sequences of a launch
_CHUNK = 256  # minimum number of keys of a split, except a sequence's last
_MERGED = 8  # splits that the merging kernel reads together
PARTIALS = 512 << 20  # maximum bytes of a launch's partial results; fewer may not occupy all multiprocessors


# A step's tables may begin at any row: do not compile another version of the kernel for their alignment.
@triton.jit(
    do_not_specialize=["first", "rows", "table_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables", "decoding"],
)
def decode_kernel(
    q,  # [R, H, D]
    key_cache,  # [B, S, K, D], or with EXTRA the layout of `kv_write/scaled_rows`
    value_cache,
    out,  # [R, H, D]
    partial_values,  # [R, SPLITS, H, D] fp32
    partial_states,  # [R, SPLITS, H, 2] fp32: maximum, sum
    context_lens,  # [R]
    block_tables,  # [R, ...]
    decoding,  # [1] int32: only sequences first + r below it have work; None if all have
    key_scale,  # [1] fp32, read with FP8
    value_scale,  # [1] fp32
    sinks,  # [H] fp32, read with SINKS
    slopes,  # [H] fp32, or None
    relative,  # [R, H, EXTENT] fp32, relative logits, or None
    scale,
    cap,
    first,
    rows,
    q_stride,  # elements from a token to the next
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,  # H // K
    GP: tl.constexpr,  # rows of a tile, at least G
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two, at least 16, as products need
    S: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 without a window
    EXTENT: tl.constexpr,  # 0 without relative logits
    CAP: tl.constexpr,
    FP8: tl.constexpr,
    EXTRA: tl.constexpr,  # bytes of scales in a block
    SINKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    stored: tl.constexpr = key_cache.dtype.element_ty
    ends, total = count_items(context_lens, decoding, first, rows, WINDOW, BLOCK_N, SPLITS, CHUNK, ROWS)
    total = total * K

    lines = tl.arange(0, GP)
    dims = tl.arange(0, DP)
    valid = (lines < G)[:, None] & (dims[None, :] < D)
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

    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        head = item % K
        row, split = counted_item(ends, item // K)
        context = tl.load(context_lens + row).to(tl.int32)
        begin, keys, count = split_keys(context, WINDOW, BLOCK_N, SPLITS, CHUNK)
        begin = begin + split * keys
        end = tl.minimum(begin + keys, context)
        table = block_tables + row.to(tl.int64) * table_stride
        keys_at = key_cache + head * D
        values_at = value_cache + head * D
        place = (head * G + lines)[:, None] * D + dims[None, :]
        queries = tl.load(q + row.to(tl.int64) * q_stride + place, mask=valid, other=0.0)
        positions = tl.zeros([GP], tl.int32) + context - 1
        scoring = (factor, cap_in, cap, slopes, relative)
        if slopes is not None:
            bias = tl.load(slopes + head * G + lines, mask=lines < G, other=0.0) * (1.4426950408889634 / factor)
            scoring = (factor, cap_in, cap, bias, relative)
        if EXTENT:
            logits = relative + row.to(tl.int64) * (K * G * EXTENT)
            bias = (head * G + tl.minimum(lines, G - 1)) * EXTENT
            scoring = (factor, cap_in, cap, bias, logits)

        tops = tl.full([GP], float("-inf"), tl.float32)
        sums = tl.zeros([GP], tl.float32)
        if FP8 or EXTRA:
            # The product needs the values transposed, which the hardware does only with 16-bit elements. So two
            # neighbours are read as one element, and give two products, of the even and of the odd columns.
            pairs_at = value_cache.to(tl.pointer_type(tl.int16), bitcast=True) + head * (D // 2)
            even = tl.zeros([GP, DP // 2], tl.float32)
            odd = tl.zeros([GP, DP // 2], tl.float32)
            for at in range(begin, end, BLOCK_N):
                slots = tile_slots(table, at, end, S, BLOCK_N, True)
                k = as_queries(load_tile(keys_at, slots, at, end, K * D, D, DP, True, S, EXTRA), queries.dtype)
                pairs = load_tile(pairs_at, slots, at, end, K * D // 2, D // 2, DP // 2, True, S, EXTRA // 2)
                k_scales, v_scales = None, None
                if EXTRA:
                    k_scales = load_scales(key_cache, slots, at, end, head, K, D, S, key_unit(stored), True)
                    v_scales = load_scales(value_cache, slots, at, end, head, K, D, S, value_unit(stored), True)
                tops, sums, weights, keep = weigh_tile(
                    queries, tops, sums, k, k_scales, positions, at, scoring, CAP, WINDOW, EXTENT, True
                )
                low, high = unpack_pairs(pairs, stored, queries.dtype)
                even = add_values(weights, low, v_scales, even, keep)
                odd = add_values(weights, high, v_scales, odd, keep)
            values = tl.reshape(tl.join(even, odd), [GP, DP])
        else:
            values = tl.zeros([GP, DP], tl.float32)
            for at in range(begin, end, BLOCK_N):
                slots = tile_slots(table, at, end, S, BLOCK_N, True)
                k = load_tile(keys_at, slots, at, end, K * D, D, DP, True, S, 0)
                v = load_tile(values_at, slots, at, end, K * D, D, DP, True, S, 0)
                tops, sums, values = attend_tile(
                    queries, tops, sums, values, k, v, None, None, positions, at, scoring, CAP, WINDOW, EXTENT, True
                )
        values = values * out_factor
        if count == 1:
            if SINKS:
                sink = tl.load(sinks + head * G + lines, mask=lines < G, other=0.0) * 1.4426950408889634
                sums += tl.exp2(sink - tops * factor)
            values = values / sums[:, None]
            tl.store(out + row.to(tl.int64) * (K * G * D) + place, values.to(out.dtype.element_ty), mask=valid)
        else:
            partial = row.to(tl.int64) * SPLITS + split
            tl.store(partial_values + partial * (K * G * D) + place, values, mask=valid)
            state = partial_states + partial * (K * G * 2) + (head * G + lines) * 2
            # The merging kernel needs maxima in units of exponents of 2.
            tl.store(state, tops * factor, mask=lines < G)
            tl.store(state + 1, sums, mask=lines < G)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["decoding"])
def merge_kernel(
    partial_values,  # [R, SPLITS, H, D] fp32
    partial_states,  # [R, SPLITS, H, 2] fp32
    out,  # [R, H, D]
    context_lens,  # [R]
    decoding,  # as in `decode_kernel`
    sinks,  # [H] fp32, read with SINKS
    first,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Merge a sequence's splits; one program per sequence and head. Padding sequences without context get zeros.

    Sequences that do not decode write nothing, because their rows of `out` hold tokens of prompts.
    """
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    context = tl.load(context_lens + row).to(tl.int32)
    _, _, count = split_keys(context, WINDOW, BLOCK_N, SPLITS, CHUNK)
    if decoding is not None:
        count = tl.where(first + row < tl.load(decoding), count, 1)
    if count != 1:
        splits = tl.arange(0, SPLITS)
        states = partial_states + ((row * SPLITS + splits) * H + head) * 2
        tops = tl.load(states, mask=splits < count, other=float("-inf"))
        top = tl.where(count > 0, tl.max(tops), 0.0)
        sums = tl.load(states + 1, mask=splits < count, other=0.0)
        weights = tl.where(splits < count, tl.exp2(tops - top), 0.0)
        total = tl.sum(sums * weights)
        if SINKS:
            total += tl.exp2(tl.load(sinks + head) * 1.4426950408889634 - top)
        total = tl.where(count > 0, total, 1.0)
        dims = tl.arange(0, DP)
        values = tl.zeros([DP], tl.float32)
        for base in range(0, count, MERGED):
            some = base + tl.arange(0, MERGED)
            places = (row * SPLITS + some) * H + head
            exponents = tl.load(partial_states + places * 2, mask=some < count, other=float("-inf")) - top
            at = partial_values + places[:, None] * D + dims[None, :]
            part = tl.load(at, mask=(some < count)[:, None] & (dims < D)[None, :], other=0.0)
            values += tl.sum(part * tl.exp2(exponents)[:, None], 0)
        tl.store(out + (row * H + head) * D + dims, (values / total).to(out.dtype.element_ty), mask=dims < D)


@dataclass(frozen=True)
class Splits:
    """Keys of a tile, maximum splits of a sequence, and launch parameters."""

    keys: int
    splits: int
    num_warps: int
    num_stages: int
    programs: int  # per multiprocessor


def splits(padded_dim: int, bytes_per_number: int, kv_heads: int, capability: int) -> Splits:
    """Choose by the model's shape and the GPU alone, never by the batch.

    Not measured yet: from 4 KV heads on, a long sequence has at least 256 items; there are two programs per
    multiprocessor. Of five pipeline stages only two load tiles, because reading the block table takes the others.
    """
    most = min(max(next_power_of_2(256 // kv_heads), 16), 64)
    if capability < TENSOR_CORES and padded_dim <= 64:
        return Splits(16, most, 4, 3, 2)
    if bytes_per_number == 4 or capability < TENSOR_CORES:
        return Splits(16, most, 8, 3, 2)  # with 4 warps some compilers put a few bytes on the stack
    keys = min(max(16, 16384 // (padded_dim * bytes_per_number)), 128)
    return Splits(keys, most, 4, 5, 2)


def decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    rows: DeviceRows,
    relative: torch.Tensor | None,
    scores: ScoreOptions,
) -> None:
    """Write the first `rows.decodes` rows of `out`, with `rows.decoding` the first decoding[0] rows.

    `relative` are the relative logits [T, H, X] fp32. The caller checks arguments.
    """
    count, (heads, dim) = rows.decodes, q.shape[1:]
    contexts, decoding = rows.context_lens[:count], rows.decoding
    softcap, cache_scales, sinks = (scores.get(each) for each in ("softcap", "cache_scales", "sinks"))
    block_size, kv_heads = key_cache.shape[1:3]
    rows_scaled = has_row_scales(key_cache, dim)
    size = _size(dim, q.element_size(), key_cache.element_size(), rows_scaled)
    shape = splits(next_power_of_2(dim), size, kv_heads, capability(q.device))
    flags = (scores.get("window") or 0, softcap is not None, sinks is not None)
    constants = _constants(shape, kv_heads, heads // kv_heads, dim, block_size, *flags)
    constants["EXTENT"] = 0 if relative is None else relative.shape[2]
    merging = _merge_constants(constants)
    most, values, states = partial_results(count, merging, _ROWS, q.device)
    for start in range(0, count, most):
        some = min(most, count - start)
        programs = min(some * kv_heads * shape.splits, shape.programs * multiprocessors(q.device))
        decode_kernel[(programs,)](
            q[start:],
            key_cache,
            value_cache,
            out[start:],
            values,
            states,
            contexts[start:],
            rows.block_tables[start:],
            decoding,
            *(cache_scales or (None, None)),
            sinks,
            scores.get("slopes"),
            None if relative is None else relative[start:],
            scores["scale"],
            softcap or 0.0,
            start,
            some,
            q.stride(0),
            rows.block_tables.stride(0),
            **constants,
            FP8=cache_scales is not None,
            EXTRA=SCALE * block_size * kv_heads * rows_scaled,
            num_warps=shape.num_warps,
            num_stages=stages(shape.num_stages),
            **OPTIONS,
        )
        merge_kernel[(some * heads,)](
            values, states, out[start:], contexts[start:], decoding, sinks, start, **merging, num_warps=2, **OPTIONS
        )


def partial_results(
    count: int, merging: dict[str, Any], most: int, device: torch.device
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the maximum number of sequences of a launch, at most `most`, and memory for its partial values and states.

    `count` is the number of sequences of the step, and `merging` are the constants of the merging kernel.
    """
    splits, heads, dim = (merging[name] for name in ("SPLITS", "H", "D"))
    most = min(most, PARTIALS // (4 * splits * heads * dim) or 1)
    shape = (min(count, most), splits, heads)
    values, states = (torch.empty(*shape, size, dtype=torch.float32, device=device) for size in (dim, 2))
    return most, values, states


def _size(dim: int, query_bytes: int, cache_bytes: int, rows_scaled: bool) -> int:
    """Return the bytes of an element for `splits`.

    A cache of 8 bits has tiles of more keys, with two exceptions: fp32 queries, whose tiles are computed in fp32; and
    row scales with heads of at most 128 elements, for which some compilers run out of registers.
    """
    return 4 if query_bytes == 4 else 2 if rows_scaled and dim <= 128 else cache_bytes


def multiprocessors(device: torch.device) -> int:
    """Return the number of the GPU's multiprocessors; 2 under the interpreter, so that a program has several items."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _constants(
    shape: Splits, kv_heads: int, group: int, dim: int, block_size: int, window: int, cap: bool, sinks: bool
) -> dict[str, Any]:
    return {
        "K": kv_heads,
        "G": group,
        "GP": max(16, next_power_of_2(group)),
        "D": dim,
        "DP": max(16, next_power_of_2(dim)),
        "S": block_size,
        "WINDOW": window,
        "CAP": cap,
        "SINKS": sinks,
        "BLOCK_N": shape.keys,
        "SPLITS": shape.splits,
        "CHUNK": _CHUNK,
        "ROWS": _ROWS,
    }


def _merge_constants(constants: dict[str, Any]) -> dict[str, Any]:
    shared = {name: constants[name] for name in ("D", "DP", "WINDOW", "BLOCK_N", "SPLITS", "CHUNK", "SINKS")}
    return {**shared, "H": constants["K"] * constants["G"], "MERGED": _MERGED}
