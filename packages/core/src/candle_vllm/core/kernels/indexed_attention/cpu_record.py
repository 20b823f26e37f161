# SPDX-License-Identifier: MIT
"""Record attention to chosen blocks, from the operations of `cpu.py` and the choice of `compressed_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from candle_vllm.core.kernels.compressed_attention.cpu_record import LayerArguments
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value
from candle_vllm.core.kernels.indexed_attention import IndexedLayer
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS

if TYPE_CHECKING:
    from candle_vllm.core.kernels.attention.rows import PagedCache
    from candle_vllm.core.kernels.recorded import Recorded


def record_attention(
    q: Any, k: Any, v: Any, index_q: Any, key: Any, layer: IndexedLayer, caches: tuple[PagedCache, PagedCache]
) -> Recorded:
    """Record attention of a layer; return its result [T, H * D].

    Args:
        q, k, v: normalised queries and keys, and values, [T, heads, D]; q is rotated in place.
        index_q, key: normalised queries [T, Hi, Di] of the index, rotated in place, and its keys [T, Di].
        layer: sizes and weights.
        caches: float32 [1, B, S, K * D] of keys and values, and [1, B, S, Di + R] of index rows.
    """
    recorder, (own, index) = q.recorder, caches
    arrays, limits, out = recorder.arrays, recorder.limits, recorder.buffer(q.width)
    longest, width, size = limits.table_width * limits.block_size, index.keys.shape[-1], key.width
    most = -(-min(longest, layer.top + 1) // 4) * 4
    places = [number for each in (q, k, v, index_q, key) for number in (each.address, each.buffer.stride)]
    row = IndexedArguments(
        *places, q.width // q.head_dim, k.width // q.head_dim, q.head_dim, index_q.width // size, size,
        address_of(arrays.positions), 0 if arrays.turns is None else address_of(arrays.turns), address_of(arrays.slots),
        address_of(arrays.query_start), address_of(arrays.block_tables), limits.table_width, limits.block_shift,
        recorder.keep(layer.cos), recorder.keep(layer.sin), layer.cos.shape[1], recorder.keep(layer.norm), layer.eps,
        *map(address_of, (own.keys, own.values, index.keys)), layer.pool, layer.top, layer.scale, most,
        address_of(out.array), out.stride,
    )  # fmt: skip
    recorder.add(operation("indexed_attention.cpu:write"), row)
    groups, top = longest // layer.pool, layer.top // layer.pool
    if groups > top:
        recorder.add(operation("indexed_attention.cpu:pool_keys"), row)
        chosen = recorder.memory(top, np.int32)
        row = row._replace(chosen=address_of(chosen))
        for chooses in (0, 1):
            recorder.add(operation("compressed_attention.cpu:make_choose", chooses), _choice(recorder, row, groups))
    row = row._replace(scratch=recorder.scratch(20 * most * limits.threads))
    recorder.add(operation("indexed_attention.cpu:attend"), row)
    return buffer_value(recorder, out)


def _choice(recorder: Any, row: IndexedArguments, groups: int) -> LayerArguments:
    """Return the arguments of the choice: entries are the rows of the groups' last positions, and all weights are 1."""
    width, unused = row.index_size + 2 * row.half, dict.fromkeys(LayerArguments._fields, 0)
    threads = max(FEW_TOKENS, recorder.limits.threads)
    given = {
        "positions": row.positions,
        "query_start": row.query_start,
        "log_tables": row.tables,
        "table_stride": row.table_stride,
        "block_shift": row.block_shift,
        "ratio": row.pool,
        "log": row.index + 4 * (row.pool - 1) * width,
        "share": width,
        "step": row.pool * width,
        "index_q": row.index_q,
        "index_stride": row.index_q_stride,
        "weights": recorder.keep(np.ones(row.index_heads, np.float32)),
        "index_heads": row.index_heads,
        "index_size": row.index_size,
        "top": row.top // row.pool,
        "chosen": row.chosen,
        "scratch": recorder.scratch(4 * groups * threads),
        "scratch_size": 4 * groups,
    }
    return LayerArguments(**unused | given)


class IndexedArguments(NamedTuple):
    """Arguments of the operations; strides are row strides in floats, rows are float32.

    Attributes:
        q, k, v, index_q, key: addresses of the rows of `record_attention`.
        heads, kv_heads, size, index_heads, index_size: H, K, D, Hi and Di.
        positions, turns, slots: addresses of int64 [T]; `turns` has a token's row in `cos` and `sin` minus its
            position, and is 0 without M-RoPE.
        query_start, tables, table_stride: address of int64 [R + 1], and of the block tables int64 [R, table_stride].
        block_shift: log2(S).
        cos, sin, half: addresses of float32 [positions, R / 2], and R / 2.
        norm, eps: address of the weight of the norm of pooled keys, and its epsilon.
        keys, values, index: addresses of the caches.
        pool, top, scale: see `IndexedLayer`.
        most: maximum number of positions that a token attends to, a multiple of 4.
        out, out_stride: address and row stride of the result.
        chosen: address of chosen groups, int32 [T, top // pool]; 0 if tokens attend to all positions.
        scratch: address of scratch memory, 20 * most bytes for each thread.
    """

    q: int
    q_stride: int
    k: int
    k_stride: int
    v: int
    v_stride: int
    index_q: int
    index_q_stride: int
    key: int
    key_stride: int
    heads: int
    kv_heads: int
    size: int
    index_heads: int
    index_size: int
    positions: int
    turns: int
    slots: int
    query_start: int
    tables: int
    table_stride: int
    block_shift: int
    cos: int
    sin: int
    half: int
    norm: int
    eps: float
    keys: int
    values: int
    index: int
    pool: int
    top: int
    scale: float
    most: int
    out: int
    out_stride: int
    chosen: int = 0
    scratch: int = 0
