# SPDX-License-Identifier: MIT
"""Attention of encoders on the CPU: `lay_out` and, after a barrier, `attend_whole` (step 6 of a request's life).

If the model has rotary embeddings, `rotary/cpu.py` first rotates queries and keys in place.

The arithmetic is fp32. The lanes of a vector are 16 queries, so a softmax needs no operation across lanes, and both
products use the code of `plain_linear` for F32 weights:

    scores [keys, queries] = keys x queries        queries are a tile [D, 16], keys are panels [D, 8 keys]
    result [D, queries] = values x probabilities   probabilities are a tile [keys, 16], values panels [keys, 8 of D]

A **panel** is 8 keys with D elements, or 8 dimensions of all values. `lay_out` writes the panels of all texts; D and a
text's keys are padded with zeros to multiples of 8. A **unit** of work is two tiles, 32 queries, of one head and text,
with all keys in their window. Threads claim units by an atomic counter, which `lay_out` sets to 0; if several teams
divide the operation (`PartArguments`), each part has a fixed share of the units. Each element is a sum in a fixed order
over D or keys, so its bits do not depend on other texts or on the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING, emit_exp2
from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import fetch_add, float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.plain_linear.cpu_panel import emit_sums, fill_panel
from candle_vllm.core.kernels.plain_linear.layout import RUN, PlainKind
from candle_vllm.core.kernels.whole_attention.cpu_record import HEADER, LINE, PANEL, WholeArguments

_SEQUENCES = int(StepNumber.SEQUENCES)
assert PANEL % RUN == 0


# ---- lay_out ---------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _text_panels(start: int, text: int, heads: int, dim: int) -> int:
    """Return the byte offset of a text's panels, which leaves room for the panels of all earlier texts."""
    return 4 * PANEL * ((start >> 3) + text) * heads * ((dim + 7) & -8)


@njit
def _lay_panel(
    k: int, row_bytes: int, tokens: int, dim: int, v: int, keys: int, values: int, panel_bytes: int, addresses: int
) -> None:
    """Copy keys and values of up to 8 tokens of a head to panels.

    k and v are addresses of the first token; tokens are `row_bytes` apart. `keys` is the address of the panel of keys,
    `values` that of the first token's row in the first panel of values; panels of values are `panel_bytes` apart.
    `addresses` is scratch memory for int64 [8].
    """
    filled = (dim + 7) & -8
    if tokens >= PANEL and dim & 15 == 0:  # copy vectors, which is faster
        for token in range(PANEL):
            int64_at(addresses)[token] = k + token * row_bytes
            for panel in range(dim >> 3):
                to, value = float32_at(values + 32 * token + panel * panel_bytes), float32_at(v + token * row_bytes)
                for d in range(8):
                    to[d] = value[8 * panel + d]
        fill_panel(8, keys, addresses, dim >> 4)
        return
    to_keys = float32_at(keys)
    for token in range(8):
        to_values = float32_at(values + 32 * token)
        if token >= tokens:
            for d in range(filled):
                to_keys[8 * d + token] = 0.0
            for panel in range(filled >> 3):
                to_values = float32_at(values + 32 * token + panel * panel_bytes)
                for d in range(8):
                    to_values[d] = 0.0
            continue
        key, value = float32_at(k + token * row_bytes), float32_at(v + token * row_bytes)
        for d in range(dim):
            to_keys[8 * d + token] = key[d]
        for d in range(dim, filled):
            to_keys[8 * d + token] = 0.0
        for panel in range(filled >> 3):
            to_values = float32_at(values + 32 * token + panel * panel_bytes)
            if 8 * panel + 8 <= dim:
                for d in range(8):
                    to_values[d] = value[8 * panel + d]
            else:
                for d in range(8):
                    to_values[d] = value[8 * panel + d] if 8 * panel + d < dim else 0.0


def lay_out(row, thread, threads):
    given = read(WholeArguments, row)
    starts, heads, dim = int64_at(given.query_start), given.kv_heads, given.head_dim
    sequences = step_number(row, _SEQUENCES)
    if thread == 0:
        int64_at(given.scratch)[0] = 0
    total = 0
    for r in range(sequences):
        total += (starts[r + 1] - starts[r] + 7) >> 3
    first, last = total * heads * thread // threads, total * heads * (thread + 1) // threads
    before = 0  # panels of keys of earlier texts
    filled = (dim + 7) & -8
    addresses = stack_bytes(64)
    for r in range(sequences):
        start = starts[r]
        length = starts[r + 1] - start
        panels = (length + 7) >> 3
        base = _text_panels(start, r, heads, dim)
        for item in range(max(first - before, 0), min(last - before, panels * heads)):
            panel = item // heads
            head = item - panel * heads
            own = base + 32 * filled * panels * head
            k = given.qkv + 4 * ((start + 8 * panel) * given.stride + (given.heads + head) * dim)
            _lay_panel(
                k,
                4 * given.stride,
                length - 8 * panel,
                dim,
                k + 4 * heads * dim,
                given.keys + own + 32 * filled * panel,
                given.values + own + 256 * panel,
                256 * panels,
                addresses,
            )
        before += panels * heads


# ---- attend ----------------------------------------------------------------------------------------------------------


@emitted
def _scores(
    e: Emitter,
    tiles: int,
    isa: Isa,
    biased: int,
    queries: Int,
    step: Int,
    panel: Int,
    out: Int,
    out_step: Int,
    runs: Int,
    bias: Int,
) -> None:
    """Multiply a panel of keys by tiles of queries, `step` bytes apart: scores [8, 16], `out_step` bytes apart.

    If `biased`, add a bias by distance; `bias` is the address of the bias of the first query and the first key.
    """
    b = e.b
    bases = [b.add(queries, b.mul(step, e.int64(tile))) for tile in range(tiles)]

    def write(tile: int, row: int, total: Any) -> None:
        if biased:
            total = b.fadd(total, e.load(bias, vector(F32), LINE * tile - 4 * row))
        e.store(b.add(out, b.mul(out_step, e.int64(tile))), total, LINE * row)

    emit_sums(e, PlainKind.F32, isa, bases, PANEL, panel, runs, write)


@emitted
def _softmax(e: Emitter, tiles: int, scores: Int, step: Int, keys: Int, sums: Int) -> None:
    """Replace `keys` rows of each tile of scores by 2^(score - maximum), pad with rows of zeros, and store the sums."""
    b = e.b
    bases = [b.add(scores, b.mul(step, e.int64(tile))) for tile in range(tiles)]

    def places(key: Any) -> list[Any]:
        offset = b.mul(key, e.int64(LINE))
        return [b.add(base, offset) for base in bases]

    def largest(key: Any, tops: list[Any]) -> list[Any]:
        found = [e.load(at, vector(F32)) for at in places(key)]
        return [emit_larger(e, x, top) for x, top in zip(found, tops)]

    tops = e.loop(keys, [e.constant(F32, NOTHING)] * tiles, largest)

    def exponentials(key: Any, totals: list[Any]) -> list[Any]:
        made = []
        for at, top, total in zip(places(key), tops, totals):
            power = emit_exp2(e, b.fsub(e.load(at, vector(F32)), top))
            e.store(at, power)
            made.append(b.fadd(total, power))
        return made

    for tile, total in enumerate(e.loop(keys, [e.zeros(F32)] * tiles, exponentials)):
        e.store(sums, total, LINE * tile)
    with e.each_or_skip(b.and_(b.neg(keys), e.int64(PANEL - 1))) as key:
        for at in places(b.add(keys, key)):
            e.store(at, e.zeros(F32))


@emitted
def _values(
    e: Emitter,
    tiles: int,
    isa: Isa,
    probabilities: Int,
    step: Int,
    panel: Int,
    sums: Int,
    out: Int,
    out_step: Int,
    runs: Int,
) -> None:
    """Multiply a panel of values by each tile of probabilities, and divide by their sums: results [8, 16]."""
    b = e.b
    bases = [b.add(probabilities, b.mul(step, e.int64(tile))) for tile in range(tiles)]

    def write(tile: int, row: int, total: Any) -> None:
        share = b.fdiv(total, e.load(sums, vector(F32), LINE * tile))
        e.store(b.add(out, b.mul(out_step, e.int64(tile))), share, LINE * row)

    emit_sums(e, PlainKind.F32, isa, bases, PANEL, panel, runs, write)


@njit(inline="always")
def _take_queries(q: int, row_bytes: int, first: int, length: int, lanes: int, dim: int, scale: float, to: int) -> None:
    """Copy queries from `first` on, times `scale`, to tiles [D, 16]; if fewer are left, the last query is repeated."""
    filled = (dim + 7) & -8
    for lane in range(lanes):
        query = float32_at(q + min(first + lane, length - 1) * row_bytes)
        tile = float32_at(to + (lane >> 4) * 64 * filled + 4 * (lane & 15))
        for d in range(dim):
            tile[16 * d] = query[d] * scale
        for d in range(dim, filled):
            tile[16 * d] = 0.0


def make_attend_whole(ISA: int, BIASED: int) -> Callable[..., None]:
    def attend_whole(row, thread, threads):
        given = read(WholeArguments, row)
        starts, heads, dim = int64_at(given.query_start), given.heads, given.head_dim
        kv_heads, window = given.kv_heads, given.window
        filled = (dim + 7) & -8
        queries = given.scratch + HEADER + thread % given.threads * given.thread_bytes
        tile_bytes = 64 * filled
        results = queries + 2 * tile_bytes
        sums = results + 2 * tile_bytes
        scores = sums + 128
        total = 0  # number of units
        for r in range(step_number(row, _SEQUENCES)):
            total += ((starts[r + 1] - starts[r] + 31) >> 5) * heads
        in_parts = threads > given.threads
        before = 0  # units of earlier texts
        if in_parts:
            unit, total = total * thread // threads, total * (thread + 1) // threads
        else:
            unit = fetch_add(given.scratch, 1)
        for r in range(step_number(row, _SEQUENCES)):
            start = starts[r]
            length = starts[r + 1] - start
            panels = (length + 7) >> 3
            score_bytes = 512 * panels
            parts = (length + 31) >> 5
            base = _text_panels(start, r, kv_heads, dim)
            while unit < min(before + parts * heads, total):
                head = (unit - before) // parts
                first = 32 * (unit - before - head * parts)
                count = min(32, length - first)
                own = base + 32 * filled * panels * (head * kv_heads // heads)
                low = max(first - window, 0) >> 3  # first of the `seen` panels with a key in the window of a query
                seen = ((min(first + count + window, length) + 7) >> 3) - low
                shown = min(length - 8 * low, 8 * seen)
                keys, values = given.keys + own + 32 * filled * low, given.values + own + 256 * low
                bias = given.bias + head * given.bias_bytes + 4 * (first - 8 * low)
                q = given.qkv + 4 * start * given.stride + 4 * head * dim
                lanes = 32 if count > 16 else 16
                _take_queries(q, 4 * given.stride, first, length, lanes, dim, given.scale, queries)
                for panel in range(seen):
                    at, to, near = keys + panel * 32 * filled, scores + 512 * panel, bias - 32 * panel
                    if lanes == 32:
                        _scores(2, ISA, BIASED, queries, tile_bytes, at, to, score_bytes, filled >> 2, near)
                    else:
                        _scores(1, ISA, BIASED, queries, tile_bytes, at, to, score_bytes, filled >> 2, near)
                if lanes == 32:
                    _softmax(2, scores, score_bytes, shown, sums)
                else:
                    _softmax(1, scores, score_bytes, shown, sums)
                for panel in range(filled >> 3):
                    at, to = values + 256 * panels * panel, results + 512 * panel
                    if lanes == 32:
                        _values(2, ISA, scores, score_bytes, at, sums, to, tile_bytes, seen * 2)
                    else:
                        _values(1, ISA, scores, score_bytes, at, sums, to, tile_bytes, seen * 2)
                for lane in range(count):
                    out = float32_at(given.out + 4 * ((start + first + lane) * given.out_stride + head * dim))
                    result = float32_at(results + (lane >> 4) * tile_bytes + 4 * (lane & 15))
                    for d in range(dim):
                        out[d] = result[16 * d]
                unit = unit + 1 if in_parts else fetch_add(given.scratch, 1)
            before += parts * heads

    return attend_whole
