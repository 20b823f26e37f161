# SPDX-License-Identifier: MIT
"""Compression of tokens and attention to the entries on the CPU (step 6 of a request's life).

Caches are float32 [B, S, width]. Sums have a fixed order, so that a token's bits depend on its own sequence alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale
from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING, emit_exp2
from candle_vllm.core.kernels.compressed_attention.cpu_record import (
    AttendArguments,
    ChooseArguments,
    CompressArguments,
    WriteArguments,
)
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I64, Double, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.latent_attention.cpu import choose_largest
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS
from candle_vllm.core.kernels.rotary.cpu import table_row, turn_halves, turn_pairs

_TOKENS, _SEQUENCES = StepNumber.TOKENS.value, StepNumber.SEQUENCES.value


@emitted
def products_of(e: Emitter, isa: Isa, queries: Int, rows: Int, out: Int, step: Int, lines: Int) -> None:
    """Write the products of four queries and four rows of 16 * `lines` floats to float32 [4, step].
    `queries` and `rows` have their addresses, int64 [4]."""
    b, side = e.b, 4 if isa.wide else 2  # as many sums as registers hold
    for first, other in itertools.product(range(0, 4, side), repeat=2):
        places = [e.load(queries, I64, 8 * (first + n)) for n in range(side)]
        places += [e.load(rows, I64, 8 * (other + n)) for n in range(side)]

        def line(index: Any, sums: list[Any], places: list[Any] = places) -> list[Any]:
            offset = b.mul(index, e.int64(4 * LANES))
            values = [e.load(b.add(place, offset), vector(F32)) for place in places]
            pairs = itertools.product(values[:side], values[side:])
            return [e.fma(query, row, total) for (query, row), total in zip(pairs, sums)]

        sums = iter(e.loop(lines, [e.zeros(F32)] * side**2, line))
        for h, n in itertools.product(range(first, first + side), range(other, other + side)):
            e.store(b.add(out, b.mul(e.int64(4 * h), step)), e.sum_lanes(next(sums)), 4 * n)


@emitted
def add_weighted(
    e: Emitter, isa: Isa, targets: Int, rows: Int, weights: Int, step: Int, terms: Int, lines: Int
) -> None:
    """Write the sums of `terms` > 0 rows of 16 * `lines` floats with four lists of weights, float32 [4, step].
    `rows` has the addresses of the rows, `targets` those of the sums, int64 [4]."""
    b = e.b

    def write(first: Any, count: int) -> None:
        offset = b.mul(first, e.int64(4 * LANES))

        def term(j: Any, sums: list[Any]) -> list[Any]:
            source = b.add(e.load(b.add(rows, b.mul(j, e.int64(8))), I64), offset)
            values = [e.load(source, vector(F32), 4 * LANES * line) for line in range(count)]
            at = [b.add(weights, b.mul(b.add(j, b.mul(e.int64(h), step)), e.int64(4))) for h in range(4)]
            pairs = itertools.product([e.splat(e.load(place, F32)) for place in at], values)
            return [e.fma(weight, value, total) for (weight, value), total in zip(pairs, sums)]

        sums = iter(e.loop(terms, [e.zeros(F32)] * (4 * count), term))
        for h, line in itertools.product(range(4), range(count)):
            e.store(b.add(e.load(targets, I64, 8 * h), offset), next(sums), 4 * LANES * line)

    if isa.wide:
        with e.each_or_skip(b.lshr(lines, e.int64(1))) as index:
            write(b.mul(index, e.int64(2)), 2)
        with e.each_or_skip(b.and_(lines, e.int64(1))):
            write(b.sub(lines, e.int64(1)), 1)
    else:
        with e.each_or_skip(lines) as index:
            write(index, 1)


@emitted
def _softmax(e: Emitter, scores: Int, lines: Int, scale: Double, sink: Float) -> None:
    """Replace 16 * `lines` scores, floats that are not yet multiplied by `scale`, by their softmax with a sink.
    Scores and sink are exponents of 2."""
    b, factor = e.b, e.splat(e.b.fptrunc(scale, F32))

    def at(line: Any) -> Any:
        return b.add(scores, b.mul(line, e.int64(4 * LANES)))

    def largest(line: Any, tops: list[Any]) -> list[Any]:
        return [emit_larger(e, b.fmul(e.load(at(line), vector(F32)), factor), tops[0])]

    (tops,) = e.loop(lines, [e.splat(sink)], largest)
    top = e.splat(e.call("llvm.vector.reduce.fmax.v16f32", F32, [tops]))

    def powers(line: Any, totals: list[Any]) -> list[Any]:
        power = emit_exp2(e, b.fsub(b.fmul(e.load(at(line), vector(F32)), factor), top))
        e.store(at(line), power)
        return [b.fadd(totals[0], power)]

    (totals,) = e.loop(lines, [e.zeros(F32)], powers)
    last = b.extract_element(emit_exp2(e, b.fsub(e.splat(sink), top)), e.int64(0))
    total = e.splat(b.fadd(e.sum_lanes(totals), last))
    with e.each(lines) as line:
        e.store(at(line), b.fdiv(e.load(at(line), vector(F32)), total))


@njit
def softmax(scores: int, count: int, scale: float, sink: float) -> None:
    """See `_softmax`; there is room for 16 * n scores."""
    values, lines = float32_at(scores), (count + LANES - 1) // LANES
    for extra in range(count, lines * LANES):
        values[extra] = NOTHING
    _softmax(scores, lines, scale, sink)


def write(row, thread, threads):
    """Copy the rows of tokens, or their rows of a table, to their slots."""
    given, rows = read(WriteArguments, row), step_number(row, _TOKENS)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        at = table_row(given.positions, given.turns, t) if given.positions != 0 else t
        source = float32_at(given.rows + at * given.stride * 4)
        to = float32_at(given.cache + int64_at(given.slots)[t] * given.width * 4)
        for i in range(given.count):
            to[i] = source[i]


@njit
def _pool(span: Any, count: int, ratio: int, size: int, overlaps: int, bias: int, out: Any, scratch: Any) -> None:
    """Write the weighted sums of `count` rows to out [D]; span has the addresses of kv, gates follow after W floats."""
    width = size * (1 + overlaps)
    for i in range(size):
        most = -math.inf
        for j in range(count):
            place = j % ratio
            column = i + size if overlaps != 0 and j >= count - ratio else i
            gate = float(float32_at(span[j])[width + column]) + float(float32_at(bias)[place * width + column])
            scratch[j] = gate
            most = max(most, gate)
        total, weighted = 0.0, 0.0
        for j in range(count):
            column = i + size if overlaps != 0 and j >= count - ratio else i
            weight = math.exp(float(scratch[j]) - most)
            total += weight
            weighted += weight * float(float32_at(span[j])[column])
        out[i] = weighted / total


@njit
def _mean(span: Any, count: int, size: int, out: Any) -> None:
    """Write the mean of `count` rows to out [D]."""
    for i in range(size):
        total = 0.0
        for j in range(count):
            total += float(float32_at(span[j])[i])
        out[i] = total / count


@njit
def sequence_of(query_start: int, sequences: int, t: int) -> int:
    r = 0
    while r + 1 < sequences and int64_at(query_start)[r + 1] <= t:
        r += 1
    return r


@njit
def _slot(table: int, shift: int, at: int) -> int:
    return (int64_at(table)[at >> shift] << shift) + (at & ((1 << shift) - 1))


@njit
def _entry(log: int, table: int, share: int, ratio: int, step: int, shift: int, number: int) -> int:
    """Return the address of an entry; `step` is the number of floats from an entry to the next in a block."""
    last = (number + 1) * ratio - 1
    block = int64_at(table)[last >> shift]
    return log + ((block << shift) * share + (last & ((1 << shift) - 1)) // ratio * step) * 4


def make_compress(GATED: int) -> Callable[..., None]:
    """Return the operation that writes the entries of the groups that end in this step; threads divide the groups.

    With gates an entry is rotated in pairs by the table, else in halves by the cosines and sines after its first row.
    """

    def compress(row, thread, threads):
        given = read(CompressArguments, row)
        ratio, size, shift, half = given.ratio, given.size, given.block_shift, given.half
        sequences, number, norm = step_number(row, _SEQUENCES), 0, float32_at(given.norm)
        memory = stack_bytes(12 * 2 * ratio)
        span, scratch = int64_at(memory), float32_at(memory + 16 * ratio)
        for t in range(step_number(row, _TOKENS)):
            position = int64_at(given.positions)[t]
            if (position + 1) % ratio != 0:
                continue
            number += 1
            if number % threads != thread:
                continue
            group, tables = position // ratio, sequence_of(given.query_start, sequences, t) * given.table_stride * 8
            before = ratio if given.overlaps != 0 and group > 0 else 0
            for j in range(before + ratio):
                slot = _slot(given.tables + tables, shift, group * ratio - before + j)
                span[j] = given.inputs + slot * given.width * 4
            table = given.log_tables + tables
            target = _entry(given.log, table, given.share, ratio, given.step, shift, group)
            out = float32_at(target)
            if GATED == 1:
                _pool(span, before + ratio, ratio, size, given.overlaps, given.bias, out, scratch)
            else:
                _mean(span, ratio, size, out)
            scale = rms_scale(1, target, size, given.eps)
            for i in range(size):
                out[i] = out[i] * scale * norm[i]
            if GATED == 1:
                at = group * ratio * half * 4
                turn_pairs(target + (size - 2 * half) * 4, given.cos + at, given.sin + at, half, 1.0)
            else:
                turn_halves(target, span[0] + size * 4, span[0] + (size + half) * 4, half)

    return compress


def make_choose(CHOOSES: int, ISA: int) -> Callable[..., None]:
    """Return the first (0) or second (1) operation of a choice, for tokens with more than `top` entries.

    In a step of few tokens the first computes scores, with the entries divided among threads, and the second chooses.
    In larger steps the second does both, with the tokens divided among threads.
    """

    def choose(row, thread, threads):
        given = read(ChooseArguments, row)
        tokens, heads, size, top = step_number(row, _TOKENS), given.heads, given.size, given.top
        few, quads, sequences = tokens <= FEW_TOKENS, (heads + 3) >> 2, step_number(row, _SEQUENCES)
        memory = stack_bytes(32 + 96 * quads)
        keys, queries, products = int64_at(memory), int64_at(memory + 32), float32_at(memory + 32 + 32 * quads)
        for t in range(tokens):
            ended = (int64_at(given.positions)[t] + 1) // given.ratio
            if ended <= top or (CHOOSES == 1 and t % threads != thread):
                continue
            sums = given.scratch + (t if few else thread) * given.scratch_size
            table = given.log_tables + sequence_of(given.query_start, sequences, t) * given.table_stride * 8
            weights = float32_at(given.weights + t * given.weight_stride * 4)
            for h in range(4 * quads):
                queries[h] = given.x + (t * given.stride + min(h, heads - 1) * size) * 4
            for n in range(0, ended if few == (CHOOSES == 0) else 0, 4):
                if few and (n >> 2) % threads != thread:
                    continue
                for i in range(4):
                    number = min(n + i, ended - 1)
                    keys[i] = _entry(given.log, table, given.share, given.ratio, given.step, given.block_shift, number)
                for quad in range(quads):
                    to = memory + 32 + 32 * quads + 64 * quad
                    products_of(ISA, memory + 32 + 32 * quad, memory, to, 4, size >> 4)
                for i in range(min(4, ended - n)):
                    score = 0.0
                    for h in range(heads):
                        score += max(float(products[4 * h + i]), 0.0) * float(weights[h])
                    float32_at(sums)[n + i] = score
            if CHOOSES == 1:
                choose_largest(sums, ended, top, given.chosen + 4 * t * top)

    return choose


@njit
def _list_entries(given: Any, t: int, sequence: int, keys: Any) -> int:
    """Write the addresses of the rows of a token's window and of its entries; return their number."""
    count, position, size, shift = 0, int64_at(given.positions)[t], given.size, given.block_shift
    table = given.tables + sequence * given.table_stride * 8
    for at in range(max(0, position - given.window + 1), position + 1):
        keys[count] = given.keys + _slot(table, shift, at) * size * 4
        count += 1
    table = given.log_tables + sequence * given.table_stride * 8
    ended = (position + 1) // given.ratio if given.ratio != 0 else 0
    chooses = given.chosen != 0 and ended > given.top
    for n in range(given.top if chooses else ended):
        number = int(int32_at(given.chosen + t * given.top * 4)[n]) if chooses else n
        keys[count] = _entry(given.log, table, given.share, given.ratio, given.step, shift, number)
        count += 1
    return count


@njit
def _list_chosen(given: Any, t: int, sequence: int, head: int, keys: Any, values: Any) -> int:
    """Write the addresses of the keys and values of a token's chosen groups, and of the positions after the last group;
    return their number."""
    seen, pool, top = int64_at(given.positions)[t] + 1, given.ratio, given.top
    table, step = given.tables + sequence * given.table_stride * 8, 4 * given.kv_heads * given.size
    chooses = given.chosen != 0 and seen // pool > top
    count = top * pool + seen % pool if chooses else seen
    for n in range(count):
        at = n
        if chooses and n < top * pool:
            at = int(int32_at(given.chosen + 4 * t * top)[n // pool]) * pool + n % pool
        elif chooses:
            at += seen - count
        place = _slot(table, given.block_shift, at) * step + 4 * head * given.size
        keys[n], values[n] = given.keys + place, given.values + place
    return count


def make_attend(CHUNKS: int, ISA: int) -> Callable[..., None]:
    """Return attention of four heads of one token at a time: to a window and entries, with the rotation back of their
    results (0), or to chosen positions (1)."""

    def attend(row, thread, threads):
        given = read(AttendArguments, row)
        kv_heads, size, most, sequences = given.kv_heads, given.size, given.most, step_number(row, _SEQUENCES)
        heads = given.heads // kv_heads  # that share a key
        quads = (heads + 3) >> 2
        total = step_number(row, _TOKENS) * kv_heads * quads
        keys = given.scratch + thread * (24 + 8 * CHUNKS) * most
        values, places = keys + 8 * most * CHUNKS, stack_bytes(64)
        scores, queries, targets = values + 8 * most, int64_at(places), int64_at(places + 32)
        listed, count = -1, 0
        for unit in range(total * thread // threads, total * (thread + 1) // threads):
            lists = unit // quads
            t, first = lists // kv_heads, 4 * (unit - lists * quads)
            head = lists - t * kv_heads
            if lists != listed:
                listed, sequence = lists, sequence_of(given.query_start, sequences, t)
                if CHUNKS == 1:
                    count = _list_chosen(given, t, sequence, head, int64_at(keys), int64_at(values))
                else:
                    count = _list_entries(given, t, sequence, int64_at(keys))
                for extra in range(count, (count + 3) & ~3):
                    int64_at(keys)[extra] = int64_at(keys)[count - 1]
            for n in range(4):
                h = head * heads + min(first + n, heads - 1)
                queries[n] = given.x + (t * given.stride + h * size) * 4
                targets[n] = given.out + (t * given.out_stride + h * size) * 4
            for quad in range((count + 3) >> 2):
                products_of(ISA, places, keys + 32 * quad, scores + 16 * quad, most, size >> 4)
            for n in range(4):
                h = head * heads + min(first + n, heads - 1)
                sink = float32_at(given.sinks)[h] if given.sinks != 0 else np.float32(NOTHING)
                softmax(scores + 4 * n * most, count, given.scale, sink)
            add_weighted(ISA, places + 32, values, scores, most, count, size >> 4)
            if CHUNKS == 0:
                half, at = given.half, int64_at(given.positions)[t] * given.half * 4
                for n in range(min(4, heads - first)):
                    turn_pairs(targets[n] + (size - 2 * half) * 4, given.cos + at, given.sin + at, half, -1.0)

    return attend
