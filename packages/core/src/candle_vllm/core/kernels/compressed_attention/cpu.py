# SPDX-License-Identifier: MIT
"""Compression of tokens and attention to the entries on the CPU (step 6 of a request's life).

Caches are float32 [B, S, width]. Sums have a fixed order, so that a token's bits depend on its own sequence alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale_within
from candle_vllm.core.kernels.compressed_attention.cpu_record import LayerArguments
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I64, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import add_rows, stack_bytes
from candle_vllm.core.kernels.latent_attention.cpu import choose_largest
from candle_vllm.core.kernels.latent_attention.layout import FEW_TOKENS

_TOKENS, _SEQUENCES = StepNumber.TOKENS.value, StepNumber.SEQUENCES.value


@emitted
def dot_4(e: Emitter, x: Int, addresses: Int, out: Int, lines: Int) -> None:
    """Write the products of 16 * `lines` floats at x with four rows, whose addresses are int64 [4], to float32 [4]."""
    b = e.b
    rows = [e.load(addresses, I64, 8 * n) for n in range(4)]

    def body(index: Any, sums: list[Any]) -> list[Any]:
        offset = b.mul(index, e.int64(4 * LANES))
        own = e.load(b.add(x, offset), vector(F32))
        return [e.fma(own, e.load(b.add(row, offset), vector(F32)), total) for row, total in zip(rows, sums)]

    for n, total in enumerate(e.loop(lines, [e.zeros(F32)] * 4, body)):
        e.store(out, e.sum_lanes(total), 4 * n)


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


def make_choose(CHOOSES: int) -> Callable[..., None]:
    """Return the first (0) or second (1) operation of a choice, for tokens with more than `top` entries.

    In a step of few tokens the first computes scores, with the entries divided among threads, and the second chooses.
    In larger steps the second does both, with the tokens divided among threads.
    """

    def choose(row, thread, threads):
        given = read(LayerArguments, row)
        tokens, heads, size, top = step_number(row, _TOKENS), given.index_heads, given.index_size, given.top
        few, quads, sequences = tokens <= FEW_TOKENS, (heads + 3) >> 2, step_number(row, _SEQUENCES)
        memory = stack_bytes(48 * quads)
        addresses, products = int64_at(memory), float32_at(memory + 32 * quads)
        for t in range(tokens):
            ended = (int64_at(given.positions)[t] + 1) // given.ratio
            if ended <= top or (CHOOSES == 1 and t % threads != thread):
                continue
            sums = given.scratch + (t if few else thread) * given.scratch_size
            table = given.log_tables + sequence_of(given.query_start, sequences, t) * given.table_stride * 8
            weights = float32_at(given.weights + t * given.weight_stride * 4)
            for h in range(4 * quads):
                addresses[h] = given.index_q + (t * given.index_stride + min(h, heads - 1) * size) * 4
            for n in range(ended if few == (CHOOSES == 0) else 0):
                if few and n % threads != thread:
                    continue
                key = _entry(given.log, table, given.share, given.ratio, given.step, given.block_shift, n)
                for quad in range(quads):
                    dot_4(key, memory + 32 * quad, memory + 32 * quads + 16 * quad, size >> 4)
                score = 0.0
                for h in range(heads):
                    score += max(float(products[h]), 0.0) * float(weights[h])
                float32_at(sums)[n] = score
            if CHOOSES == 1:
                choose_largest(sums, ended, top, given.chosen + 4 * t * top)

    return choose


def attend(row, thread, threads):
    """Attention of one head of one token at a time, and the rotation back of its result."""
    given = read(LayerArguments, row)
    heads, size, half, shift = given.heads, given.size, given.half, given.block_shift
    total, mask, sequences = step_number(row, _TOKENS) * heads, (1 << shift) - 1, step_number(row, _SEQUENCES)
    memory = given.scratch + thread * 12 * given.most
    addresses, weights = int64_at(memory), float32_at(memory + 8 * given.most)
    listed, count = -1, 0
    for unit in range(total * thread // threads, total * (thread + 1) // threads):
        t = unit // heads
        h = unit - t * heads
        position = int64_at(given.positions)[t]
        if t != listed:
            listed, count = t, 0
            r = sequence_of(given.query_start, sequences, t)
            table, log_table = given.tables + r * given.table_stride * 8, given.log_tables + r * given.table_stride * 8
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
        q = given.q + (t * given.q_stride + h * size) * 4
        for quad in range((count + 3) >> 2):
            dot_4(q, memory + 32 * quad, memory + 8 * given.most + 16 * quad, size >> 4)
        sink = float(float32_at(given.sinks)[h])
        most = sink
        for j in range(count):
            most = max(most, float(weights[j]) * given.scale)
        sums = math.exp(sink - most)
        for j in range(count):
            weight = math.exp(float(weights[j]) * given.scale - most)
            weights[j] = weight
            sums += weight
        for j in range(count):
            weights[j] = float(weights[j]) / sums
        out = given.out + (t * given.out_stride + h * size) * 4
        add_rows(out, memory, memory + 8 * given.most, count, 0, size >> 4, 0)
        at = position * half * 4
        _turn(out + (size - 2 * half) * 4, float32_at(given.cos + at), float32_at(given.sin + at), half, -1.0)
