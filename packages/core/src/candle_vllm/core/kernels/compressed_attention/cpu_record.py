# SPDX-License-Identifier: MIT
"""Record compression of tokens and attention to the entries, from the operations of `cpu.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from candle_vllm.core.kernels.attention.cpu_record import LOG2E
from candle_vllm.core.kernels.attention.rows import WindowedCache
from candle_vllm.core.kernels.compressed_attention import CompressedLayer, entry_share
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS

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
    pool, keep = rows.pool if isinstance(rows, WindowedCache) else None, recorder.keep
    groups = layer.entries[0][0] if layer.entries else None
    ratio, longest, widths = 0, limits.table_width * limits.block_size, [2 * each.width for each, _ in layer.entries]
    row = LayerArguments(
        address_of(arrays.positions), keep(layer.cos), keep(layer.sin), layer.cos.shape[1],
        address_of(arrays.query_start), address_of(arrays.context_lens),
        address_of(arrays.block_tables if pool is None else arrays.page_tables[pool]),
        address_of(arrays.slots if pool is None else arrays.page_slots[pool]),
        address_of(arrays.block_tables), limits.table_width, limits.block_shift, layer.heads, size, *q, *kv,
        keep(layer.norm), layer.eps, address_of(rows.keys), *out, layer.scale * LOG2E, layer.window,
        keep(layer.sinks * np.float32(LOG2E)),
    )  # fmt: skip
    if groups is not None:
        ratio = groups.ratio
        (first, first_stride), (more, more_stride), *_ = [*inputs, (0, 0)]
        row = row._replace(ratio=ratio, overlaps=groups.overlaps, inputs=address_of(rows.values), width=sum(widths))
        row = row._replace(first=first, first_stride=first_stride, more=more, more_stride=more_stride)
        row = row._replace(log=address_of(logs.keys), share=entry_share(size, ratio))
    most = longest // ratio if ratio else 0
    if index is not None:
        (at, stride), (weights, weight_stride) = index
        row = row._replace(index_q=at, index_stride=stride, weights=weights, weight_stride=weight_stride)
        row = row._replace(index_heads=layer.index_heads, index_size=layer.index_size, top=layer.top)
    recorder.add(operation("compressed_attention.cpu:write"), row)
    for number, (each, weights) in enumerate(layer.entries):
        bias, norm, eps, cos, sin = weights
        compressing = row._replace(bias=keep(bias), norm=keep(norm), eps=eps, cos=keep(cos), sin=keep(sin))
        compressing = compressing._replace(column=sum(widths[:number]), size=each.size, log=address_of(logs[number]))
        compressing = compressing._replace(share=entry_share(each.size, ratio))
        recorder.add(operation("compressed_attention.cpu:compress"), compressing, barrier=number + 1 == len(widths))
    if index is not None and most > layer.top:
        chosen = recorder.memory(layer.top, np.int32)
        scores = recorder.scratch(4 * most * max(FEW_TOKENS, limits.threads))
        row = row._replace(chosen=address_of(chosen))
        choosing = row._replace(log=address_of(logs.values), share=entry_share(layer.index_size, ratio))
        choosing = choosing._replace(scratch=scores, scratch_size=4 * most, step=layer.index_size)
        for chooses in (0, 1):
            recorder.add(operation("compressed_attention.cpu:make_choose", chooses, recorder.isa), choosing)
        most = layer.top
    most = -(-(min(layer.window, longest) + most) // 16) * 16
    row = row._replace(most=most, scratch=recorder.scratch(24 * most * limits.threads))
    recorder.add(operation("compressed_attention.cpu:make_attend", recorder.isa), row)


class LayerArguments(NamedTuple):
    """Arguments of the operations; strides are row strides in floats, rows are float32.

    Attributes:
        positions, query_start, context_lens: addresses of int64 [T], [R + 1] and [R].
        cos, sin, half: addresses of float32 [positions, R / 2], and R / 2.
        tables, slots, log_tables: addresses of int64 [R, table_stride], [T] and [R, table_stride]: pages of rows and
            inputs, a token's place there, and blocks of the logs.
        block_shift: log2(S).
        heads, size: H and D; for `compress` the elements of its entries.
        q, kv, out: addresses of queries, rows and results.
        norm, eps: address of the weight of the norm, and its epsilon.
        cache: address of the cache of rows.
        scale, window, sinks: factor of the scores, positions of the window, and address of float32 [H]; scale and sinks
            are multiplied by log2(e).
        ratio, overlaps: see `Groups`; a ratio of 0 means no entries.
        inputs, width: address of the cache of inputs, and its row width.
        first, more: addresses of inputs of entries and of index keys.
        log, share, step: address of a log, E, and for a choice the floats from an entry to the next in a block.
        column, bias: first column of the inputs that `compress` reads, and address of its bias.
        index_q, weights: addresses of queries and weights of the index.
        index_heads, index_size, top: Hi, Di, and the maximum number of entries of a token; 0 without an index.
        chosen: address of chosen entries, int32 [T, top]; 0 if tokens attend to all.
        kv_heads, turns: for `cpu_blocks.py` K, and the address of int64 [T], a token's row in `cos` and `sin` minus its
            position; 0 without M-RoPE.
        most: maximum number of rows and entries of a token, a multiple of 16.
        scratch, scratch_size: address of scratch memory, and for a choice the bytes of a token's scores.
    """

    positions: int
    cos: int
    sin: int
    half: int
    query_start: int
    context_lens: int
    tables: int
    slots: int
    log_tables: int
    table_stride: int
    block_shift: int
    heads: int
    size: int
    q: int
    q_stride: int
    kv: int
    kv_stride: int
    norm: int
    eps: float
    cache: int
    out: int
    out_stride: int
    scale: float
    window: int
    sinks: int
    ratio: int = 0
    overlaps: int = 0
    inputs: int = 0
    width: int = 0
    first: int = 0
    first_stride: int = 0
    more: int = 0
    more_stride: int = 0
    log: int = 0
    share: int = 0
    column: int = 0
    bias: int = 0
    index_q: int = 0
    index_stride: int = 0
    weights: int = 0
    weight_stride: int = 0
    index_heads: int = 0
    index_size: int = 0
    top: int = 0
    chosen: int = 0
    most: int = 0
    scratch: int = 0
    scratch_size: int = 0
    step: int = 0
    kv_heads: int = 0
    turns: int = 0
