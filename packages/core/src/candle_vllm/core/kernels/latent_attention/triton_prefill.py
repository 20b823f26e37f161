# SPDX-License-Identifier: MIT
"""Latent attention of several new tokens of a sequence on a GPU: prompts, and their chunks.

A program computes a tile of queries: all heads of some neighbouring tokens of one sequence, or, if a token has more
heads than a tile has rows, some heads of one token. It reads the tiles of the context from position 0 to the last of
these tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.attention.rows import DeviceRows
from candle_vllm.core.kernels.attention.triton_prefill import behind_decodes, find_tile
from candle_vllm.core.kernels.attention.triton_tiles import load_tile, tile_slots
from candle_vllm.core.kernels.latent_attention.triton_tiles import attend_latent_tile, load_queries
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2, stages

_ROWS = 256  # sequences that a program compares at a time to find the sequence of its tile


# A step's tables may begin at any row: do not compile another version of the kernel for their alignment.
@triton.jit(
    do_not_specialize=["rows", "table_stride"],
    do_not_specialize_on_alignment=["query_start", "context_lens", "block_tables", "decoding"],
)
def latent_prefill_kernel(
    q_rope,  # [T, H, ROPE]
    q_latent,  # [T, H, L]
    cache,  # [B, S, ROPE + L]
    out,  # [T, H, L]
    query_start,  # [rows + 1]
    context_lens,  # [rows]
    block_tables,  # [rows, ...]
    decoding,  # [1] int32: number of leading sequences that this kernel skips; None for 0
    scale,
    rows,
    rope_token,  # strides of the queries
    rope_head,
    latent_token,
    latent_head,
    table_stride,
    H: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a tile
    ROPE: tl.constexpr,
    RP: tl.constexpr,  # ROPE rounded up to a power of two
    L: tl.constexpr,
    LP: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    parts: tl.constexpr = (H + HEADS - 1) // HEADS
    part = tl.program_id(0) % parts
    # From the last tile to the first: the last tiles of a prompt take the longest, so they should start first.
    tile = tl.num_programs(0) // parts - 1 - tl.program_id(0) // parts
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
        tokens = tile * BLOCK_Q + lines // HEADS
        heads = part * HEADS + lines % HEADS
        valid = (lines < BLOCK_Q * HEADS) & (tokens < count) & (heads < H)
        token_index = (start + tokens).to(tl.int64)
        rotated = load_queries(q_rope, token_index * rope_token + heads.to(tl.int64) * rope_head, valid, ROPE, RP)
        others = load_queries(q_latent, token_index * latent_token + heads.to(tl.int64) * latent_head, valid, L, LP)
        first = context - count + tile * BLOCK_Q
        last = context - count + tl.minimum(tile * BLOCK_Q + BLOCK_Q, count) - 1
        positions = context - count + tokens
        whole = (first + 1) // BLOCK_N * BLOCK_N  # every row sees the keys before this one
        factor = scale * 1.4426950408889634
        table = block_tables + row.to(tl.int64) * table_stride

        tops = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        values = tl.zeros([BLOCK_M, LP], tl.float32)
        for at in range(0, whole, BLOCK_N):
            slots = tile_slots(table, at, last + 1, S, BLOCK_N, False)
            rope = load_tile(cache, slots, at, last + 1, ROPE + L, ROPE, RP, False, S, 0)
            latent = load_tile(cache + ROPE, slots, at, last + 1, ROPE + L, L, LP, False, S, 0)
            tops, sums, values = attend_latent_tile(
                rotated, others, tops, sums, values, rope, latent, positions, at, factor, False
            )
        for at in range(whole, last + 1, BLOCK_N):
            slots = tile_slots(table, at, last + 1, S, BLOCK_N, True)
            rope = load_tile(cache, slots, at, last + 1, ROPE + L, ROPE, RP, True, S, 0)
            latent = load_tile(cache + ROPE, slots, at, last + 1, ROPE + L, L, LP, True, S, 0)
            tops, sums, values = attend_latent_tile(
                rotated, others, tops, sums, values, rope, latent, positions, at, factor, True
            )
        values = values / sums[:, None]
        dims = tl.arange(0, LP)
        at_out = out + token_index[:, None] * (H * L) + heads[:, None] * L + dims[None, :]
        tl.store(at_out, values.to(out.dtype.element_ty), mask=valid[:, None] & (dims[None, :] < L))


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, and launch parameters."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles(bytes_per_number: int) -> Tiles:
    """Return tiles for an element size, whatever the batch: as many rows as registers hold. Not measured yet."""
    return Tiles(16, 16, 8, 2) if bytes_per_number == 4 else Tiles(64, 16, 8, 3)


def prefill(
    q_rope: torch.Tensor,
    q_latent: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
    rows: DeviceRows,
    first: int,
    *,
    scale: float,
) -> None:
    """Write the rows of `out` from sequence `first` on, with `rows.decoding` from sequence decoding[0] on. The caller
    checks arguments."""
    contexts, tables = rows.context_lens[first:], rows.block_tables[first:]
    heads, latent = q_latent.shape[1:]
    shape = tiles(cache.element_size())
    constants = _constants(shape, heads, q_rope.shape[2], latent, cache.shape[1])
    count = (len(q_latent) - first) // (shape.rows // constants["HEADS"]) + len(contexts)
    latent_prefill_kernel[(count * cdiv(heads, constants["HEADS"]),)](
        q_rope,
        q_latent,
        cache,
        out,
        rows.query_start[first:],
        contexts,
        tables,
        rows.decoding,
        scale,
        len(contexts),
        *q_rope.stride()[:2],
        *q_latent.stride()[:2],
        tables.stride(0),
        **constants,
        num_warps=shape.num_warps,
        num_stages=stages(shape.num_stages),
        **OPTIONS,
    )


def _constants(shape: Tiles, heads: int, rope: int, latent: int, block_size: int) -> dict[str, Any]:
    return {
        "H": heads,
        "HEADS": min(heads, shape.rows),
        "ROPE": rope,
        "RP": next_power_of_2(max(16, rope)),
        "L": latent,
        "LP": next_power_of_2(latent),
        "S": block_size,
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.keys,
        "ROWS": _ROWS,
    }
