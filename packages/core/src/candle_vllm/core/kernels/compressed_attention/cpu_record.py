# SPDX-License-Identifier: MIT
"""Record compression of tokens and attention to the entries, from the operations of `cpu.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from candle_vllm.core.kernels.attention.rows import WindowedCache
from candle_vllm.core.kernels.compressed_attention import CompressedLayer, EntryParts, Groups, entry_share
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation

if TYPE_CHECKING:
    from candle_vllm.core.kernels.attention.rows import PagedCache
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder

Place = tuple[int, int]
"""Address and row stride, in floats, of float32 rows."""


def record_compressed(
    recorder: Recorder,
    q: Place,
    kv: Place,
    inputs: list[Place],
    index: tuple[Place, Place] | None,
    layer: CompressedLayer,
    caches: tuple[PagedCache, PagedCache],
    out: Place,
) -> None:
    """Record attention of a layer.

    Args:
        q, kv: normalised queries [T, H * D], which are rotated in place, and rows [T, D] before the norm.
        inputs: inputs of the entries, then of the index keys, [T, 2 W] each; empty for a layer without entries.
        index: queries [T, Hi * Di], which are rotated in place, and weights [T, Hi] of the index.
        layer: sizes and weights.
        caches: cache of rows and inputs, and the logs of entries and keys, float32 [1, B, S, width] each.
        out: the result [T, H * D].
    """
    arrays, limits, (rows, logs), size = recorder.arrays, recorder.limits, caches, layer.size
    pool = rows.pool if isinstance(rows, WindowedCache) else None
    tables = address_of(arrays.block_tables if pool is None else arrays.page_tables[pool])
    slots = address_of(arrays.slots if pool is None else arrays.page_slots[pool])
    cos, sin, half = recorder.keep(layer.cos), recorder.keep(layer.sin), layer.cos.shape[1]
    turns = {"half": half, "positions": address_of(arrays.positions), "cos": cos, "sin": sin}
    for (at, stride), heads, width in (
        (q, layer.heads, size),
        *([] if index is None else [(index[0], layer.index_heads, layer.index_size)]),
    ):
        recorder.add(
            operation("compressed_attention.cpu:turn"), TurnArguments(at, stride, heads, width, **turns), barrier=False
        )
    widths = [2 * groups.width for groups, _ in layer.entries]
    given = [*zip(inputs, widths, strict=True), *[((0, 0), 0)] * 2][:2]
    row = WriteArguments(
        *kv, size, recorder.keep(layer.norm), layer.eps, address_of(rows.keys), slots,
        address_of(rows.values) if widths else 0,
        *given[0][0], given[0][1], *given[1][0], given[1][1], **turns,
    )  # fmt: skip
    recorder.add(operation("compressed_attention.cpu:write"), row)
    lookup = {
        "query_start": address_of(arrays.query_start),
        "log_tables": address_of(arrays.block_tables),
        "table_stride": limits.table_width,
        "block_shift": limits.block_shift,
    }
    for number, (groups, parts) in enumerate(layer.entries):
        at = address_of(rows.values), sum(widths), sum(widths[:number])
        log = address_of(logs[number])
        row = _compressing(recorder, groups, parts, at, log, tables, half, lookup)
        recorder.add(operation("compressed_attention.cpu:compress"), row, barrier=number + 1 == len(widths))
    longest = limits.table_width * limits.block_size
    groups = layer.entries[0][0] if layer.entries else None
    ratio, chosen, most = (groups.ratio if groups else 0), None, longest // groups.ratio if groups else 0
    if index is not None and most > layer.top:
        assert groups is not None
        chosen, most = recorder.memory(layer.top, np.int32), layer.top
        row = ChooseArguments(
            *index[0], layer.index_heads, layer.index_size, *index[1], turns["positions"], ratio, layer.top,
            address_of(logs.values), entry_share(layer.index_size, ratio), address_of(chosen), **lookup,
        )  # fmt: skip
        recorder.add(operation("compressed_attention.cpu:choose"), row)
    most = -(-(min(layer.window, longest) + most) // 4) * 4
    scratch_size = -(-12 * most // 64) * 64
    row = AttendArguments(
        *q, *out, layer.heads, size, layer.scale, layer.window, recorder.keep(layer.sinks), address_of(rows.keys),
        tables,
        address_of(logs.keys) if groups else 0, entry_share(size, ratio) if groups else 0, ratio,
        0 if chosen is None else address_of(chosen), layer.top, most,
        recorder.scratch(limits.threads * scratch_size), scratch_size, **turns, **lookup,
    )  # fmt: skip
    recorder.add(operation("compressed_attention.cpu:attend"), row)


def _compressing(
    recorder: Recorder,
    groups: Groups,
    parts: EntryParts,
    inputs: tuple[int, int, int],
    log: int,
    tables: int,
    half: int,
    lookup: dict[str, Any],
) -> CompressArguments:
    weights = [recorder.keep(each) for each in (parts.bias, parts.norm, parts.cos, parts.sin)]
    return CompressArguments(
        *inputs, groups.size, groups.ratio, groups.overlaps, *weights[:2], parts.eps, *weights[2:], half,
        address_of(recorder.arrays.context_lens), tables, log, entry_share(groups.size, groups.ratio), **lookup,
    )  # fmt: skip


class TurnArguments(NamedTuple):
    """Arguments of `turn`.

    Attributes:
        x, stride: address of heads, float32, and row stride in floats.
        heads, size: number and elements of adjacent heads.
        half: R / 2.
        positions: address of int64 [T].
        cos, sin: addresses of float32 [positions, R / 2].
    """

    x: int
    stride: int
    heads: int
    size: int
    half: int
    positions: int
    cos: int
    sin: int


class WriteArguments(NamedTuple):
    """Arguments of `write`; see also `TurnArguments`.

    Attributes:
        kv, stride: address of rows before the norm, and row stride in floats.
        size, norm, eps: D, address of the norm's weight, and its epsilon.
        cache, slots: address of the cache of rows, and of int64 [T]; slot = page * S + offset.
        inputs: address of the cache of inputs; 0 without entries.
        first, first_stride, width: address, row stride and elements of inputs of entries.
        more, more_stride, more_width: the same of index keys, which follow in the cache.
    """

    kv: int
    stride: int
    size: int
    norm: int
    eps: float
    cache: int
    slots: int
    inputs: int
    first: int
    first_stride: int
    width: int
    more: int
    more_stride: int
    more_width: int
    half: int
    positions: int
    cos: int
    sin: int


class CompressArguments(NamedTuple):
    """Arguments of `compress`.

    Attributes:
        inputs, width, column: address of the cache of inputs, its row width, and the first column that is read.
        size, ratio, overlaps: see `Groups`.
        bias, norm, eps, cos, sin, half: addresses and numbers of `EntryParts`, and R / 2.
        context_lens, query_start: addresses of int64 [R] and [R + 1].
        tables, log_tables, table_stride, block_shift: addresses of int64 [R, table_stride] for inputs and for the log,
            and log2(S).
        log, share: address of the log, and E.
    """

    inputs: int
    width: int
    column: int
    size: int
    ratio: int
    overlaps: int
    bias: int
    norm: int
    eps: float
    cos: int
    sin: int
    half: int
    context_lens: int
    tables: int
    log: int
    share: int
    query_start: int
    log_tables: int
    table_stride: int
    block_shift: int


class ChooseArguments(NamedTuple):
    """Arguments of `choose`; see also `CompressArguments`.

    Attributes:
        q, stride, heads, size: address and row stride of queries, Hi and Di.
        weights, weight_stride: address and row stride of the heads' weights.
        positions: address of int64 [T].
        top, chosen: maximum number of entries, and address of the result, int32 [T, top].
    """

    q: int
    stride: int
    heads: int
    size: int
    weights: int
    weight_stride: int
    positions: int
    ratio: int
    top: int
    log: int
    share: int
    chosen: int
    query_start: int
    log_tables: int
    table_stride: int
    block_shift: int


class AttendArguments(NamedTuple):
    """Arguments of `attend`; see also `CompressArguments` and `TurnArguments`.

    Attributes:
        q, stride: address and row stride of rotated queries.
        out, out_stride: address and row stride of the result.
        heads, size, scale, window: H, D, factor of the scores, and positions of the window.
        sinks: address of float32 [H].
        cache: address of the cache of rows.
        ratio: tokens of a group; 0 without entries.
        chosen, top: address of chosen entries, int32 [T, top], or 0; tokens with up to `top` entries read all.
        most: maximum number of rows and entries of a token, a multiple of 4.
        scratch, scratch_size: address of scratch memory of the threads, and bytes of each.
    """

    q: int
    stride: int
    out: int
    out_stride: int
    heads: int
    size: int
    scale: float
    window: int
    sinks: int
    cache: int
    tables: int
    log: int
    share: int
    ratio: int
    chosen: int
    top: int
    most: int
    scratch: int
    scratch_size: int
    half: int
    positions: int
    cos: int
    sin: int
    query_start: int
    log_tables: int
    table_stride: int
    block_shift: int
