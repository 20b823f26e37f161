# SPDX-License-Identifier: MIT
"""Compression of tokens and attention to the entries on the CPU (step 6 of a request's life).

Caches are float32 [B, S, width]. Sums have a fixed order, so that a token's bits depend on its own sequence alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale_within
from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING, emit_exp2
from candle_vllm.core.kernels.compressed_attention.cpu_record import LayerArguments
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I64, Double, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.latent_attention.cpu import choose_largest
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS

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

    def larger(x: Any, y: Any) -> Any:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    def largest(line: Any, tops: list[Any]) -> list[Any]:
        return [larger(b.fmul(e.load(at(line), vector(F32)), factor), tops[0])]

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


@njit
def _turn(x: int, cos: Any, sin: Any, half: int, sign: float) -> None:
    """Rotate 2 * half floats at x in pairs, forwards or, with sign -1, backwards."""
    values = float32_at(x)
    for i in range(half):
        first, second, c, s = values[2 * i], values[2 * i + 1], cos[i], sin[i] * sign
        values[2 * i], values[2 * i + 1] = first * c - second * s, second * c + first * s


@njit
def copy_floats(target: int, source: int, count: int) -> None:
    to, values = float32_at(target), float32_at(source)
    for i in range(count):
        to[i] = values[i]


def write(row, thread, threads):
    """Rotate queries in place; normalise, rotate and write each token's row; write its inputs."""
    given = read(LayerArguments, row)
    rows, size, half, norm = step_number(row, _TOKENS), given.size, given.half, float32_at(given.norm)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        at = int64_at(given.positions)[t] * half * 4
        cos, sin = float32_at(given.cos + at), float32_at(given.sin + at)
        for h in range(given.heads):
            _turn(given.q + (t * given.q_stride + (h + 1) * size - 2 * half) * 4, cos, sin, half, 1.0)
        for h in range(given.index_heads):
            end = t * given.index_stride + (h + 1) * given.index_size
            _turn(given.index_q + (end - 2 * half) * 4, cos, sin, half, 1.0)
        slot = int64_at(given.slots)[t]
        source, target = given.kv + t * given.kv_stride * 4, given.cache + slot * size * 4
        values, to, scale = float32_at(source), float32_at(target), rms_scale_within(source, size, given.eps)
        for i in range(size):
            to[i] = values[i] * scale * norm[i]
        _turn(target + (size - 2 * half) * 4, cos, sin, half, 1.0)
        if given.ratio != 0:
            width = 2 * size * (1 + given.overlaps)
            inputs = given.inputs + slot * given.width * 4
            copy_floats(inputs, given.first + t * given.first_stride * 4, width)
            copy_floats(inputs + width * 4, given.more + t * given.more_stride * 4, given.width - width)


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


def compress(row, thread, threads):
    """Write the entries of the groups that end in this step; threads divide the groups."""
    given = read(LayerArguments, row)
    ratio, size, shift, half = given.ratio, given.size, given.block_shift, given.half
    mask, number = (1 << shift) - 1, 0
    memory = stack_bytes(12 * 2 * ratio)
    span, scratch = int64_at(memory), float32_at(memory + 16 * ratio)
    norm = float32_at(given.norm)
    for r in range(step_number(row, _SEQUENCES)):
        context = int64_at(given.context_lens)[r]
        start = context - int64_at(given.query_start)[r + 1] + int64_at(given.query_start)[r]
        table, log_table = given.tables + r * given.table_stride * 8, given.log_tables + r * given.table_stride * 8
        for group in range(start // ratio, context // ratio):
            number += 1
            if number % threads != thread:
                continue
            before = ratio if given.overlaps != 0 and group > 0 else 0
            for j in range(before + ratio):
                at = group * ratio - before + j
                slot = (int64_at(table)[at >> shift] << shift) + (at & mask)
                span[j] = given.inputs + (slot * given.width + given.column) * 4
            last = (group + 1) * ratio - 1
            block = int64_at(log_table)[last >> shift]
            target = given.log + ((block << shift) * given.share + (last & mask) // ratio * size) * 4
            out = float32_at(target)
            _pool(span, before + ratio, ratio, size, given.overlaps, given.bias, out, scratch)
            scale = rms_scale_within(target, size, given.eps)
            for i in range(size):
                out[i] = out[i] * scale * norm[i]
            turned = group * ratio * half * 4
            cos, sin = float32_at(given.cos + turned), float32_at(given.sin + turned)
            _turn(target + (size - 2 * half) * 4, cos, sin, half, 1.0)


@njit
def sequence_of(query_start: int, sequences: int, t: int) -> int:
    r = 0
    while r + 1 < sequences and int64_at(query_start)[r + 1] <= t:
        r += 1
    return r


@njit
def _entry(log: int, table: int, share: int, ratio: int, step: int, shift: int, number: int) -> int:
    """Return the address of an entry; `step` is the number of floats from an entry to the next in a block."""
    last = (number + 1) * ratio - 1
    block = int64_at(table)[last >> shift]
    return log + ((block << shift) * share + (last & ((1 << shift) - 1)) // ratio * step) * 4


def make_choose(CHOOSES: int, ISA: int) -> Callable[..., None]:
    """Return the first (0) or second (1) operation of a choice, for tokens with more than `top` entries.

    In a step of few tokens the first computes scores, with the entries divided among threads, and the second chooses.
    In larger steps the second does both, with the tokens divided among threads.
    """

    def choose(row, thread, threads):
        given = read(LayerArguments, row)
        tokens, heads, size, top = step_number(row, _TOKENS), given.index_heads, given.index_size, given.top
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
                queries[h] = given.index_q + (t * given.index_stride + min(h, heads - 1) * size) * 4
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


def make_attend(ISA: int) -> Callable[..., None]:
    """Return attention of four heads of one token at a time, and the rotation back of their results."""

    def attend(row, thread, threads):
        given = read(LayerArguments, row)
        heads, size, half, shift = given.heads, given.size, given.half, given.block_shift
        mask, sequences, most, quads = (1 << shift) - 1, step_number(row, _SEQUENCES), given.most, (heads + 3) >> 2
        total = step_number(row, _TOKENS) * quads
        memory = given.scratch + thread * 24 * most
        addresses, places = int64_at(memory), stack_bytes(64)
        queries, targets = int64_at(places), int64_at(places + 32)
        listed, count = -1, 0
        for unit in range(total * thread // threads, total * (thread + 1) // threads):
            t = unit // quads
            first = 4 * (unit - t * quads)
            position = int64_at(given.positions)[t]
            if t != listed:
                listed, count = t, 0
                r = sequence_of(given.query_start, sequences, t)
                at = r * given.table_stride * 8
                table, log_table = given.tables + at, given.log_tables + at
                for at in range(max(0, position - given.window + 1), position + 1):
                    slot = (int64_at(table)[at >> shift] << shift) + (at & mask)
                    addresses[count] = given.cache + slot * size * 4
                    count += 1
                ended = (position + 1) // given.ratio if given.ratio != 0 else 0
                chooses = given.chosen != 0 and ended > given.top
                for n in range(given.top if chooses else ended):
                    number = int(int32_at(given.chosen + t * given.top * 4)[n]) if chooses else n
                    addresses[count] = _entry(given.log, log_table, given.share, given.ratio, size, shift, number)
                    count += 1
                for extra in range(count, (count + 3) & ~3):
                    addresses[extra] = addresses[count - 1]
            for n in range(4):
                h = min(first + n, heads - 1)
                queries[n] = given.q + (t * given.q_stride + h * size) * 4
                targets[n] = given.out + (t * given.out_stride + h * size) * 4
            scores = memory + 8 * most
            for quad in range((count + 3) >> 2):
                products_of(ISA, places, memory + 32 * quad, scores + 16 * quad, most, size >> 4)
            for n in range(4):
                sink = float32_at(given.sinks)[min(first + n, heads - 1)]
                softmax(scores + 4 * n * most, count, given.scale, sink)
            add_weighted(ISA, places + 32, memory, scores, most, count, size >> 4)
            at = position * half * 4
            cos, sin = float32_at(given.cos + at), float32_at(given.sin + at)
            for n in range(min(4, heads - first)):
                _turn(targets[n] + (size - 2 * half) * 4, cos, sin, half, -1.0)

    return attend
