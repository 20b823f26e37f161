# SPDX-License-Identifier: MIT
"""Attention with plain keys and values to groups of positions that an index chooses (QSA of Qwen4), on the CPU.

The index caches a row [key | cos | sin] for each position, [B, S, Di + R]: its key before norm and rotation, and the
cosines and sines by which the position is rotated. A group of `ratio` neighbouring positions, a power of two that
divides S, has a pooled key: the mean of its keys, normalised (RMSNorm with a weight [Di]), the first R elements rotated
in halves by the group's first position. It replaces the key of the group's last position. `make_choose` of `cpu.py`
chooses groups by it, with weights of 1. A token attends to its chosen groups, and to all positions after the last whole
group. In `LayerArguments` kv are keys, first values and more index keys; cache, inputs and log are their caches.

`models/block_index.py` records these operations, and computes the same op by op. Caches are float32, sums have a fixed
order, so that a token's bits depend on its own sequence alone. Source: transformers' `Qwen4ExpTextQSAIndexer`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale_within
from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING
from candle_vllm.core.kernels.compressed_attention.cpu import (
    add_weighted,
    copy_floats,
    products_of,
    sequence_of,
    softmax,
)
from candle_vllm.core.kernels.compressed_attention.cpu_record import LayerArguments
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes

_TOKENS, _SEQUENCES = StepNumber.TOKENS.value, StepNumber.SEQUENCES.value


@njit
def _turn(x: int, cos: int, sin: int, half: int) -> None:
    """Rotate elements i and i + half of 2 * half floats."""
    values, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        first, second = values[i], values[i + half]
        values[i], values[i + half] = first * c[i] - second * s[i], second * c[i] + first * s[i]


def write(row, thread, threads):
    """Rotate queries in place; write rotated keys, values and index rows."""
    given = read(LayerArguments, row)
    rows, size, half, kv_heads = step_number(row, _TOKENS), given.size, given.half, given.kv_heads
    width = given.index_size + 2 * half
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        place, slot = int64_at(given.positions)[t], int64_at(given.slots)[t]
        if given.turns != 0:
            place += int64_at(given.turns)[t]
        cos, sin = given.cos + 4 * half * place, given.sin + 4 * half * place
        for h in range(given.heads):
            _turn(given.q + (t * given.q_stride + h * size) * 4, cos, sin, half)
        for h in range(given.index_heads):
            _turn(given.index_q + (t * given.index_stride + h * given.index_size) * 4, cos, sin, half)
        keys, values = given.cache + slot * kv_heads * size * 4, given.inputs + slot * kv_heads * size * 4
        copy_floats(keys, given.kv + t * given.kv_stride * 4, kv_heads * size)
        copy_floats(values, given.first + t * given.first_stride * 4, kv_heads * size)
        for h in range(kv_heads):
            _turn(keys + h * size * 4, cos, sin, half)
        index = given.log + slot * width * 4
        copy_floats(index, given.more + t * given.more_stride * 4, given.index_size)
        copy_floats(index + given.index_size * 4, cos, half)
        copy_floats(index + (given.index_size + half) * 4, sin, half)


def pool_keys(row, thread, threads):
    """Write the pooled keys of the groups that end in this step."""
    given = read(LayerArguments, row)
    rows, size, half, pool = step_number(row, _TOKENS), given.index_size, given.half, given.ratio
    width, norm = size + 2 * half, float32_at(given.norm)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        slot = int64_at(given.slots)[t]
        if (slot + 1) % pool != 0:
            continue
        first, last = given.log + (slot - pool + 1) * width * 4, given.log + slot * width * 4
        source, out = float32_at(first), float32_at(last)
        for i in range(size):
            total = 0.0
            for j in range(pool):
                total += float(source[j * width + i])
            out[i] = total / pool
        scale = rms_scale_within(last, size, given.eps)
        for i in range(size):
            out[i] = out[i] * scale * norm[i]
        _turn(last, first + size * 4, first + (size + half) * 4, half)


@njit
def _list(addresses: int, cache: int, step: int, table: int, shift: int, at: int) -> None:
    """Write the address of a position's row, `step` bytes from one slot to the next."""
    slot = (int64_at(table)[at >> shift] << shift) + (at & ((1 << shift) - 1))
    int64_at(addresses)[0] = cache + slot * step


def make_attend(ISA: int) -> Callable[..., None]:
    """Return attention of the query heads that share a key head, four at a time, for one token at a time."""

    def attend(row, thread, threads):
        given = read(LayerArguments, row)
        kv_heads, size, shift, pool, most = given.kv_heads, given.size, given.block_shift, given.ratio, given.most
        group, step, top = given.heads // kv_heads, 4 * kv_heads * size, given.top
        total, sequences = step_number(row, _TOKENS) * kv_heads, step_number(row, _SEQUENCES)
        keys = given.scratch + thread * 32 * most
        values, scores, places = keys + 8 * most, keys + 16 * most, stack_bytes(64)
        queries, targets = int64_at(places), int64_at(places + 32)
        for unit in range(total * thread // threads, total * (thread + 1) // threads):
            t = unit // kv_heads
            head = unit - t * kv_heads
            seen = int64_at(given.positions)[t] + 1
            table = given.log_tables + sequence_of(given.query_start, sequences, t) * given.table_stride * 8
            chooses = given.chosen != 0 and seen // pool > top
            count = top * pool + seen % pool if chooses else seen
            for n in range((count + 3) & ~3):
                at = min(n, count - 1)
                if chooses and at < top * pool:
                    at = int(int32_at(given.chosen + 4 * t * top)[at // pool]) * pool + at % pool
                elif chooses:
                    at += seen - count
                _list(keys + 8 * n, given.cache + 4 * head * size, step, table, shift, at)
                _list(values + 8 * n, given.inputs + 4 * head * size, step, table, shift, at)
            for first in range(head * group, (head + 1) * group, 4):
                for n in range(4):
                    h = min(first + n, (head + 1) * group - 1)
                    queries[n] = given.q + (t * given.q_stride + h * size) * 4
                    targets[n] = given.out + (t * given.out_stride + h * size) * 4
                for quad in range((count + 3) >> 2):
                    products_of(ISA, places, keys + 32 * quad, scores + 16 * quad, most, size >> 4)
                for n in range(4):
                    softmax(scores + 4 * n * most, count, given.scale, np.float32(NOTHING))
                add_weighted(ISA, places + 32, values, scores, most, count, size >> 4)

    return attend
