# SPDX-License-Identifier: MIT
"""Latent attention on the CPU: `attend` and, after a barrier, `merge` (step 6 of a request's life).

Terms: see `attention/cpu_cache.py`; chunks, units and merging are those of `attention/cpu.py`, so a token's result does
not depend on the rest of the step. A row tile is up to four groups of 16 heads (`cpu_tiles.py`), which read the same
latent rows. The result is written in the input layout of `cpu_heads.py`: for each head rows of L elements, bfloat16 or
float32. If an indexer chooses the positions that a token attends to, `choose` runs before. With pooled keys it scores
groups of G positions by their pooled keys (`cpu_pool.py`), and the positions after the last whole group follow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from candle_vllm.core.kernels.attention.cpu_cache import CHUNK, HEADER, ROW_TILE, partial_floats
from candle_vllm.core.kernels.attention.cpu_split import chunk_of, chunk_start, cost, split_bytes
from candle_vllm.core.kernels.attention.cpu_tiles import clear_partial, merge_partial, place_of
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import fetch_add, float32_at, int32_at, int64_at, read, step_number
from candle_vllm.core.kernels.latent_attention import layout
from candle_vllm.core.kernels.latent_attention.cpu_record import AttendArguments
from candle_vllm.core.kernels.latent_attention.cpu_tiles import (
    finish_latent,
    keys_at_once,
    latent_scores,
    latent_softmax,
    latent_values,
)

_SEQUENCES, _TOKENS = int(StepNumber.SEQUENCES), int(StepNumber.TOKENS)
_RUNS_PER_THREAD = 12  # desired units of one long sequence per thread: few, because long sequential reads are fastest
_keys_at_once = njit(inline="always")(keys_at_once)
_attended = njit(inline="always")(layout.attended)


@njit(inline="always")
def _total_cost(starts, contexts, sequences: int, top: int) -> int:
    """Return the cost of the step: new tokens times attended positions, summed over all sequences."""
    total = 0
    for r in range(sequences):
        total += cost(starts[r + 1] - starts[r], min(contexts[r], top), 0)
    return total


# ---- attend ----------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _list_tiles(tiles: int, cache: int, table, start: int, count: int, shift: int, step: int, width: int) -> None:
    """Write the addresses of `count` tiles of 16 latent rows, from position `start` on."""
    to = int64_at(tiles)
    for n in range(count):
        position = start + n * LANES
        slot = (table[position >> shift] << shift) + (position & ((1 << shift) - 1))
        to[n] = cache + 2 * width * place_of(slot, 0, shift, step)


@njit(inline="always")
def _copy_rows(tiles: int, to: int, chosen: int, cache: int, table, count: int, shift: int, step: int, width: int):
    """Copy the latent rows of the `count` positions at `chosen` to `to`; write the addresses of the copies' tiles."""
    for n in range(count):
        position, copy = int32_at(chosen)[n], int32_at(to + 2 * width * n)
        slot = (table[position >> shift] << shift) + (position & ((1 << shift) - 1))
        row = int32_at(cache + 2 * width * place_of(slot, 0, shift, step))
        for i in range(width // 2):
            copy[i] = row[i]
        int64_at(tiles)[n // LANES] = to + 2 * width * (n // LANES * LANES)


@njit(inline="always")
def _scores(q: int, tiles: int, scores: int, count: int, groups: int, width: int, isa: int) -> None:
    """Compute the scores of up to 4 groups with all tiles of a chunk."""
    at_once = _keys_at_once(groups)
    for n in range(count):
        tile = int64_at(tiles)[n]
        for turn in range(LANES // at_once):
            key = turn * at_once
            at, to = tile + 2 * width * key, scores + 4 * LANES * (n * LANES + key)
            if groups == 4:
                latent_scores(q, at, to, 4, width, isa)
            elif groups == 3:
                latent_scores(q, at, to, 3, width, isa)
            elif groups == 2:
                latent_scores(q, at, to, 2, width, isa)
            else:
                latent_scores(q, at, to, 1, width, isa)


@njit(inline="always")
def _write_states(state: int, partials: int, row_bytes: int, latent: int) -> None:
    """Write a group's maxima and sums to its 16 partial results."""
    numbers = float32_at(state)
    for row in range(LANES):
        to = float32_at(partials + row * row_bytes)
        to[latent] = numbers[row]
        to[latent + 1] = numbers[LANES + row]


def make_attend(rope: int, latent: int, form: int, isa: int) -> Callable[..., None]:
    """Return the operation for one shape; `form` is the type of the result, see `cpu_tiles.copy_numbers`."""
    width = rope + latent
    row_bytes = 4 * partial_floats(latent)
    thread_bytes = layout.scratch_per_thread(latent)
    group_bytes = 2 * LANES * width

    def latent_attend(row, thread, threads):
        given = read(AttendArguments, row)
        starts, contexts = int64_at(given.query_start), int64_at(given.context_lens)
        heads, parts, scratch, tile = given.heads, given.parts, given.scratch, given.tile
        lines = parts * LANES  # rows (heads) of a token
        tiles = scratch + HEADER + thread * thread_bytes
        state = tiles + layout.TILE_LIST
        states = state + layout.STATE_BYTES
        own = states + ROW_TILE * row_bytes
        scores = own + ROW_TILE * row_bytes
        probabilities = scores + layout.GROUPS * layout.SCORE_BYTES

        partials = scratch + HEADER + threads * thread_bytes
        free = given.scratch_size - HEADER - threads * thread_bytes
        sequences = step_number(row, _SEQUENCES)
        total = _total_cost(starts, contexts, sequences, given.top)
        before = 0  # units of earlier sequences
        unit = fetch_add(scratch, 1)
        for r in range(sequences):
            token, context = starts[r], contexts[r]
            tokens = starts[r + 1] - token
            table = int64_at(given.block_tables + 8 * r * given.table_stride)
            all_rows, attended = tokens * lines, min(context, given.top)
            last_chunk = chunk_of(attended - 1)
            size = split_bytes(tokens, attended, 0, lines, 1, total, threads, free, row_bytes)
            units = (all_rows + tile - 1) // tile
            run, runs = last_chunk + 1, 1  # chunks of a unit, units of a row tile
            if size > 0:
                run = max(1, (last_chunk + 1) * units // (threads * _RUNS_PER_THREAD))
                runs = (last_chunk + run) // run
                units *= runs
            while unit < before + units:
                rest = units - 1 - (unit - before)
                turn = rest % runs
                first = rest // runs * tile
                groups = min(tile, all_rows - first) // LANES
                at_group = first // LANES
                begin = context - tokens  # position of the sequence's first token in this step
                most = begin + (at_group + groups - 1) // parts
                # last attended key: a position, or an index in the chosen positions
                last = _attended(most + 1, given.top, given.pool) - 1
                queries = given.q + (token * parts + at_group) * group_bytes
                to = own
                if size == 0:
                    for i in range(groups * LANES):
                        clear_partial(states + i * row_bytes, latent)
                for c in range(turn * run, min(turn * run + run - 1, chunk_of(last)) + 1):
                    start = chunk_start(c)
                    keys = min(chunk_start(c + 1), last + 1) - start
                    count = (keys + LANES - 1) // LANES
                    step, shift = given.stretch_step, given.block_shift
                    if most > last:
                        chosen = given.chosen + 4 * ((token + at_group // parts) * given.top + start)
                        copies = scratch + given.scratch_size + thread * 2 * CHUNK * width
                        _copy_rows(tiles, copies, chosen, given.cache, table, keys, shift, step, width)
                    else:
                        _list_tiles(tiles, given.cache, table, start, count, shift, step, width)
                    if size > 0:
                        to = partials + (c * all_rows + first) * row_bytes
                    _scores(queries, tiles, scores, count, groups, width, isa)
                    for g in range(groups):
                        seen = max(0, min(keys, begin + (at_group + g) // parts + 1 - start))
                        at_probabilities = probabilities + g * layout.PROBABILITY_BYTES
                        latent_softmax(scores + g * layout.SCORE_BYTES, at_probabilities, seen, state)
                        _write_states(state, to + g * LANES * row_bytes, row_bytes, latent)
                    for block in range(0, latent, layout.BLOCK):  # a block of dimensions of all keys fits the L1 cache
                        for g in range(groups):
                            seen = max(0, min(keys, begin + (at_group + g) // parts + 1 - start))
                            for i in range(0, LANES, layout.OCTET):
                                latent_values(
                                    probabilities + g * layout.PROBABILITY_BYTES + 4 * i,
                                    tiles,
                                    seen,
                                    2 * (rope + block),
                                    to + (g * LANES + i) * row_bytes + 4 * block,
                                    width,
                                    latent,
                                    isa,
                                )
                    if size == 0:
                        for i in range(groups * LANES):
                            merge_partial(states + i * row_bytes, own + i * row_bytes, latent)
                if size == 0:
                    for i in range(groups * LANES):
                        t, h = (first + i) // lines, (first + i) % lines
                        if h < heads:
                            target = given.out + h * given.head_bytes + (token + t) * given.row_bytes
                            finish_latent(states + i * row_bytes, target, latent, form)
                unit = fetch_add(scratch, 1)
            before += units
            partials += size
            free -= size

    return latent_attend


# ---- merge -----------------------------------------------------------------------------------------------------------


def make_merge(latent: int, form: int) -> Callable[..., None]:
    """Return the operation that merges the partial results of `attend` in scratch memory."""
    row_bytes = 4 * partial_floats(latent)
    thread_bytes = layout.scratch_per_thread(latent)

    def latent_merge(row, thread, threads):
        given = read(AttendArguments, row)
        starts, contexts = int64_at(given.query_start), int64_at(given.context_lens)
        heads, lines, scratch = given.heads, given.parts * LANES, given.scratch
        state = scratch + HEADER + thread * thread_bytes
        partials = scratch + HEADER + threads * thread_bytes
        free = given.scratch_size - HEADER - threads * thread_bytes
        sequences = step_number(row, _SEQUENCES)
        total = _total_cost(starts, contexts, sequences, given.top)
        turn = thread  # rows are assigned round-robin, so that every thread has a share of each sequence
        for r in range(sequences):
            token, context = starts[r], contexts[r]
            tokens, attended = starts[r + 1] - token, min(context, given.top)
            size = split_bytes(tokens, attended, 0, lines, 1, total, threads, free, row_bytes)
            if size == 0:
                continue
            while turn < tokens * heads:
                t, h = turn // heads, turn % heads
                clear_partial(state, latent)
                seen = context - tokens + t + 1
                for c in range(chunk_of(_attended(seen, given.top, given.pool) - 1) + 1):
                    merge_partial(state, partials + ((c * tokens + t) * lines + h) * row_bytes, latent)
                target = given.out + h * given.head_bytes + (token + t) * given.row_bytes
                finish_latent(state, target, latent, form)
                turn += threads
            turn -= tokens * heads
            partials += size
            free -= size
        if thread == 0:
            int64_at(scratch)[0] = 0

    return latent_merge


# ---- choice ----------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _add_heads(scores: int, weights: int, keys: int, to: int, begins: bool) -> None:
    """Add the positive scores of 16 heads, times the heads' weights, to the keys' sums; set the sums if `begins`."""
    score, weight, out = float32_at(scores), float32_at(weights), float32_at(to)
    for key in range(keys):
        total = np.float32(0) if begins else out[key]
        for head in range(LANES):
            total += max(score[LANES * key + head], np.float32(0)) * weight[head]
        out[key] = total


@njit(inline="always")
def _copy_pooled(tiles: int, to: int, cache: int, table, start: int, count: int, pool: int, place, width: int) -> None:
    """Copy `count` pooled keys of D = `width` elements from group `start` on; write the addresses of their tiles.

    A group's key is in the row of its last position; `place` is the block shift and the stretch step.
    """
    shift, step = place
    for n in range(count):
        position, copy = (start + n + 1) * pool - 1, int32_at(to + 2 * width * n)
        slot = (table[position >> shift] << shift) + (position & ((1 << shift) - 1))
        row = int32_at(cache + 4 * width * place_of(slot, 0, shift, step))
        for i in range(width // 2):
            copy[i] = row[i]
        int64_at(tiles)[n // LANES] = to + 2 * width * (n // LANES * LANES)


@njit(inline="always")
def _spread(chosen: int, count: int, pool: int, seen: int) -> None:
    """Replace `count` ascending groups by their positions, followed by the positions after the last whole group."""
    positions = int32_at(chosen)
    for n in range(count - 1, -1, -1):
        first = positions[n] * pool
        for i in range(pool):
            positions[n * pool + i] = first + i
    for i in range(seen % pool):
        positions[count * pool + i] = seen // pool * pool + i


@njit(inline="always")
def _count(keys, start: int, end: int, least: int) -> np.int32:
    """Count the int32 keys that are at least `least`; a 64-bit count would halve the number of keys in a vector."""
    count, bound = np.int32(0), np.int32(least)
    for i in range(start, end):
        count = np.int32(count + np.int32(keys[i] >= bound))
    return count


@njit(inline="always")
def choose_largest(scores: int, count: int, top: int, to: int) -> None:
    """Write the positions of the `top` largest of `count` > `top` scores in ascending order; overwrite the scores.

    The `top`-th largest score is found bit by bit, from the highest bit in which scores differ, until exactly `top`
    scores reach the bound or no bit is left: a pass for each bit is vectorised, which is faster than a histogram.
    """
    keys, chosen = int32_at(scores), int32_at(to)
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(count):  # scores become integers in the same order
        key = np.int32(keys[i] ^ ((keys[i] >> 31) & 0x7FFFFFFF))
        keys[i] = key
        low, high = min(low, key), max(high, key)
    bits = 0
    while ((low ^ high) & 0xFFFFFFFF) >> bits:
        bits += 1
    least = -(1 << 31) if bits == 32 else low >> bits << bits  # a bound that at least `top` keys reach
    reached, above = count, 0  # keys that reach `least`; keys that reach the next higher bound, fewer than `top`
    while bits > 0 and reached > top:
        bits -= 1
        further = _count(keys, 0, count, least + (1 << bits))
        if further >= top:
            least, reached = least + (1 << bits), further
        else:
            above = further
    ties, start, n = top - above, 0, 0
    while n < top:
        end = min(start + LANES, count)
        if _count(keys, start, end, least) > 0:  # most groups have no such key
            for i in range(start, end):
                if keys[i] > least or (keys[i] == least and ties > 0):
                    ties -= keys[i] == least
                    chosen[n] = i
                    n += 1
        start = end


def make_choose(width: int, isa: int, chooses: int) -> Callable[..., None]:
    """Return the first (`chooses` is 0) or the second (1) operation of a choice.

    In a step of few tokens, the first computes scores, with the keys divided among threads, and the second chooses
    positions. In larger steps the second does both, with the tokens divided among threads.
    """

    def choose(row, thread, threads):
        given, tokens, r = read(AttendArguments, row), step_number(row, _TOKENS), 0
        starts, contexts = int64_at(given.query_start), int64_at(given.context_lens)
        tiles = given.scratch + HEADER + thread * layout.CHOICE_BYTES
        scores, few = tiles + layout.TILE_LIST, tokens <= layout.FEW_TOKENS
        for t in range(tokens):
            while starts[r + 1] <= t:
                r += 1
            seen, pool = contexts[r] - (starts[r + 1] - t) + 1, given.pool
            groups_seen, top = seen // pool, given.top // pool
            if groups_seen <= top or (chooses == 1 and t % threads != thread):
                continue
            sums = given.scratch + HEADER + threads * layout.CHOICE_BYTES + (t if few else thread) * given.head_bytes
            table = int64_at(given.block_tables + 8 * r * given.table_stride)
            for c in range(chunk_of(groups_seen - 1) + 1 if few == (chooses == 0) else 0):
                if few and (t + c) % threads != thread:
                    continue
                start, keys = chunk_start(c), min(chunk_start(c + 1), groups_seen) - chunk_start(c)
                count, shift, step = (keys + LANES - 1) // LANES, given.block_shift, given.stretch_step
                if pool > 1:
                    copies = given.scratch + given.scratch_size + thread * 2 * CHUNK * width
                    _copy_pooled(tiles, copies, given.cache, table, start, keys, pool, (shift, step), width)
                else:
                    _list_tiles(tiles, given.cache, table, start, count, shift, step, width)
                for first in range(0, given.parts, layout.GROUPS):
                    groups = min(layout.GROUPS, given.parts - first)
                    queries = given.q + 2 * LANES * width * (t * given.parts + first)
                    _scores(queries, tiles, scores, count, groups, width, isa)
                    for g in range(groups):
                        weights = given.out + t * given.row_bytes + 4 * LANES * (first + g)
                        _add_heads(scores + g * layout.SCORE_BYTES, weights, keys, sums + 4 * start, first + g == 0)
            if chooses == 1:
                choose_largest(sums, groups_seen, top, given.chosen + 4 * t * given.top)
                if pool > 1:
                    _spread(given.chosen + 4 * t * given.top, top, pool, seen)

    return choose
