# SPDX-License-Identifier: MIT
"""Latent attention of one new token of each sequence on a GPU, split over the context.

Work is divided as in `attention/triton_decode.py`, of which this module uses the merging kernel: a work item is one
split of one sequence with some of the heads, which read the same latent rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.rows import DeviceRows
from candle_vllm.core.kernels.attention.triton_decode import merge_kernel, multiprocessors, partial_results
from candle_vllm.core.kernels.attention.triton_items import count_items, counted_item, split_keys
from candle_vllm.core.kernels.attention.triton_tiles import load_tile, tile_slots
from candle_vllm.core.kernels.latent_attention.triton_tiles import attend_latent_tile, load_queries
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2, stages

_ROWS = 256  # maximum sequences of a launch
_CHUNK = 256  # minimum number of keys of a split
_MERGED = 8  # splits that the merging kernel reads together


# A step's tables may begin at any row: do not compile another version of the kernel for their alignment.
@triton.jit(
    do_not_specialize=["first", "rows", "table_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables", "decoding"],
)
def latent_decode_kernel(
    q_rope,  # [R, H, ROPE]
    q_latent,  # [R, H, L]
    cache,  # [B, S, ROPE + L]
    out,  # [R, H, L]
    partial_values,  # [R, SPLITS, H, L] fp32
    partial_states,  # [R, SPLITS, H, 2] fp32: maximum, sum
    context_lens,  # [R]
    block_tables,  # [R, ...]
    decoding,  # [1] int32: only sequences first + r below it have work; None if all have
    scale,
    first,
    rows,
    rope_token,  # strides of the queries
    rope_head,
    latent_token,
    latent_head,
    table_stride,
    H: tl.constexpr,
    HEADS: tl.constexpr,  # heads of an item
    ROPE: tl.constexpr,
    RP: tl.constexpr,  # ROPE rounded up to a power of two
    L: tl.constexpr,
    LP: tl.constexpr,
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    parts: tl.constexpr = (H + HEADS - 1) // HEADS
    ends, total = count_items(context_lens, decoding, first, rows, 0, BLOCK_N, SPLITS, CHUNK, ROWS)
    total = total * parts
    factor = scale * 1.4426950408889634
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        heads = (item % parts) * HEADS + tl.arange(0, HEADS)
        valid = heads < H
        row, split = counted_item(ends, item // parts)
        context = tl.load(context_lens + row).to(tl.int32)
        begin, keys, count = split_keys(context, 0, BLOCK_N, SPLITS, CHUNK)
        begin += split * keys
        end = tl.minimum(begin + keys, context)
        table = block_tables + row.to(tl.int64) * table_stride
        rotated = load_queries(q_rope + row.to(tl.int64) * rope_token, heads.to(tl.int64) * rope_head, valid, ROPE, RP)
        others = load_queries(
            q_latent + row.to(tl.int64) * latent_token, heads.to(tl.int64) * latent_head, valid, L, LP
        )
        positions = tl.zeros([HEADS], tl.int32) + context - 1

        tops = tl.full([HEADS], float("-inf"), tl.float32)
        sums = tl.zeros([HEADS], tl.float32)
        values = tl.zeros([HEADS, LP], tl.float32)
        for at in range(begin, end, BLOCK_N):
            slots = tile_slots(table, at, end, S, BLOCK_N, True)
            rope = load_tile(cache, slots, at, end, ROPE + L, ROPE, RP, True, S, 0)
            latent = load_tile(cache + ROPE, slots, at, end, ROPE + L, L, LP, True, S, 0)
            tops, sums, values = attend_latent_tile(
                rotated, others, tops, sums, values, rope, latent, positions, at, factor, True
            )
        dims = tl.arange(0, LP)
        inside = valid[:, None] & (dims[None, :] < L)
        place = heads[:, None] * L + dims[None, :]
        if count == 1:
            values = values / sums[:, None]
            tl.store(out + row.to(tl.int64) * (H * L) + place, values.to(out.dtype.element_ty), mask=inside)
        else:
            partial = row.to(tl.int64) * SPLITS + split
            tl.store(partial_values + partial * (H * L) + place, values, mask=inside)
            state = partial_states + partial * (H * 2) + heads * 2
            # The merging kernel needs maxima in units of exponents of 2.
            tl.store(state, tops * factor, mask=valid)
            tl.store(state + 1, sums, mask=valid)


@dataclass(frozen=True)
class Splits:
    """Heads of a work item, keys of a tile, maximum splits of a sequence, and launch parameters."""

    heads: int
    keys: int
    splits: int
    num_warps: int
    num_stages: int
    programs: int  # per multiprocessor


def splits(heads: int, bytes_per_number: int) -> Splits:
    """Return the division for a model's shape, which never depends on the batch.

    An item has as many heads as the registers have room for sums of 512 elements, because every item reads the cache
    again. With many heads, a long sequence has 128 items: one for each multiprocessor. Not measured yet.
    """
    some = max(16, next_power_of_2(heads))
    of_item = 16 if bytes_per_number == 4 else min(some, 32)
    most = min(max(128 * of_item // some, 16), 64)
    if bytes_per_number == 4:
        return Splits(of_item, 16, most, 8, 2, 1)
    return Splits(of_item, 32, most, 4, 2, 2) if of_item == 16 else Splits(of_item, 32, most, 8, 2, 1)


def decode(
    q_rope: torch.Tensor,
    q_latent: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
    rows: DeviceRows,
    *,
    scale: float,
) -> None:
    """Write the first `rows.decodes` rows of `out`, with `rows.decoding` the first decoding[0] rows. The caller checks
    arguments."""
    count, (heads, latent) = rows.decodes, q_latent.shape[1:]
    contexts, decoding = rows.context_lens[:count], rows.decoding
    shape = splits(heads, cache.element_size())
    constants = _constants(shape, heads, q_rope.shape[2], latent, cache.shape[1])
    merging = _merge_constants(constants)
    most, values, states = partial_results(count, merging, _ROWS, out.device)
    parts = cdiv(heads, shape.heads)
    for start in range(0, count, most):
        some = min(most, count - start)
        programs = min(some * parts * shape.splits, shape.programs * multiprocessors(out.device))
        latent_decode_kernel[(programs,)](
            q_rope[start:],
            q_latent[start:],
            cache,
            out[start:],
            values,
            states,
            contexts[start:],
            rows.block_tables[start:],
            decoding,
            scale,
            start,
            some,
            *q_rope.stride()[:2],
            *q_latent.stride()[:2],
            rows.block_tables.stride(0),
            **constants,
            num_warps=shape.num_warps,
            num_stages=stages(shape.num_stages),
            **OPTIONS,
        )
        merge_kernel[(some * heads,)](
            values, states, out[start:], contexts[start:], decoding, None, start, **merging, num_warps=2, **OPTIONS
        )


def _constants(shape: Splits, heads: int, rope: int, latent: int, block_size: int) -> dict[str, Any]:
    return {
        "H": heads,
        "HEADS": shape.heads,
        "ROPE": rope,
        "RP": next_power_of_2(max(16, rope)),
        "L": latent,
        "LP": next_power_of_2(latent),
        "S": block_size,
        "BLOCK_N": shape.keys,
        "SPLITS": shape.splits,
        "CHUNK": _CHUNK,
        "ROWS": _ROWS,
    }


def _merge_constants(constants: dict[str, Any]) -> dict[str, Any]:
    shared = {name: constants[name] for name in ("H", "BLOCK_N", "SPLITS", "CHUNK")}
    return {**shared, "D": constants["L"], "DP": constants["LP"], "WINDOW": 0, "SINKS": False, "MERGED": _MERGED}
