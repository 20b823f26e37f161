# SPDX-License-Identifier: MIT
"""Paged attention on the CPU: `attend` and, after a barrier, `merge` (step 6 of a request's life).

Terms: see `cpu_cache.py`. Caches are bfloat16 (`cpu_tiles`) or quantised (`cpu_quantised`). Queries [T, H, D] are
bfloat16, or int8 if keys are quantised, already multiplied by softmax scale * log2(e) (`kv_write.cpu`); the result is
float32 [T, H, D]. So scores are exponents of 2, and soft cap, sinks and slopes are multiplied by `LOG2E` too. A head's
sink is added to a row's sum of probabilities after all keys were processed.

A result does not depend on the rest of the step: each row has a partial result for each chunk, and these partial
results are merged in order of position by one formula. A unit is normally a row tile with all its chunks. If this would
leave threads idle, units have only some of the chunks: `attend` writes partial results to scratch memory for `merge`.

Quantised keys and values are prefetched one chunk ahead, because the hardware prefetcher does not predict the order of
the codes. For this a thread claims its next unit during the last chunk of its current unit.

Threads claim units by an atomic counter, so a slow thread processes fewer. Units with a sequence's last rows, which
attend to most keys, come first. `merge` resets the counter to 0. If the heads are divided among ranks of threads
(`cpu_runtime/numa.py`), each rank has its own counter.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from candle_vllm.core.kernels.attention.cpu_cache import (
    CHUNK,
    HEADER,
    PROBABILITY_STRIDE,
    ROW_TILE,
    ROWS,
    SCORE_STRIDE,
    SQUARE,
    STRIP,
    TILE_LIST,
    TILES,
    VALUE_TILES,
    CacheKind,
    key_bytes,
    partial_floats,
    scratch_per_thread,
    value_bytes,
)
from candle_vllm.core.kernels.attention.cpu_quantised import rotate_row
from candle_vllm.core.kernels.attention.cpu_record import AttendArguments
from candle_vllm.core.kernels.attention.cpu_split import (
    chunk_of,
    chunk_start,
    count_row_tiles,
    first_seen,
    split_bytes,
    total_cost,
)
from candle_vllm.core.kernels.attention.cpu_squares import (
    begin_squares,
    copy_partial,
    copy_seen,
    fits,
    score_squares,
    value_squares,
)
from candle_vllm.core.kernels.attention.cpu_tiles import (
    add_relative,
    add_sink,
    cap_scores,
    clear_partial,
    copy_query,
    fall_with_distance,
    finish_partial,
    in_floats,
    merge_partial,
    place_of,
    score_tiles,
    softmax_rows,
    value_tiles,
)
from candle_vllm.core.kernels.cpu_runtime.emit_squares import end_squares
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import fetch_add, int64_at, rank_of, read, step_number

_RUNS_PER_THREAD = 6  # desired units of one long sequence per thread; few, because long sequential reads are fastest


# ---- attend ----------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _list_tiles(
    tiles: int,
    keys: int,
    values: int,
    table,
    start: int,
    count: int,
    last: int,
    shift: int,
    head: int,
    step: int,
    key_size: int,
    value_size: int,
) -> None:
    """Write the addresses of `count` key tiles from position `start` on, and `VALUE_TILES` bytes later, of value tiles.

    `keys` and `values` are the layer's caches plus the gaps before the head (`head_gap`), `key_size` and `value_size`
    the bytes per slot. For tiles after position `last`, the address of the tile of `last` is written.
    """
    to = int64_at(tiles)
    strip = min(1 << shift, STRIP)
    for n in range(count):
        position = min(start + n * LANES, last)
        slot = (table[position >> shift] << shift) + (position & ((1 << shift) - 1))
        place = place_of(slot & -LANES, head, shift, step)
        to[n] = keys + key_size * (place & -strip) + 4 * (place & (strip - 1))
        to[VALUE_TILES // 8 + n] = values + value_size * place


@njit(inline="always")
def _gather_queries(
    q: int,
    to: int,
    positions: int,
    ahead: int,
    first: int,
    rows: int,
    group: int,
    token: int,
    position: int,
    stride: int,
    dim: int,
    wide: int,
) -> None:
    """Copy a row tile to contiguous memory, and write its rows' positions and the last positions that they attend to.

    `q` is the address of the step's first query of the KV head. Row first + i of the sequence is the query of token
    (first + i) // group with head (first + i) % group of the KV head's `group` query heads.
    """
    at = int64_at(positions)
    t, h = first // group, first % group
    for i in range(rows):
        at[i] = at[ROW_TILE + i] = position + t
        if ahead != 0:
            at[ROW_TILE + i] += int64_at(ahead)[token + t]
        copy_query(to + i * (4 if wide else 2) * dim, q + (token + t) * stride + h * 2 * dim, dim, wide)
        h += 1
        if h == group:
            h = 0
            t += 1


@njit(inline="always")
def _fall(scores: int, chunk, positions: int, row: int) -> None:
    """Change the scores of row `row` by the keys' distances, with ALiBi or relative logits."""
    start, _, count, _, slopes, group, first, relative = chunk
    if slopes != 0:
        slope = slopes + 4 * ((first + row) % group)
        fall_with_distance(scores + row * SCORE_STRIDE, count, slope, int64_at(positions)[row] - start)
    states, stride, profiles, number, size = relative
    distance = int64_at(positions)[row] - start
    if states != 0 and distance - LANES * count < size - 2 * LANES:  # otherwise all keys are beyond the profiles
        states += 4 * ((first + row) // group * stride + (first + row) % group * number)
        add_relative(scores + row * SCORE_STRIDE, count, states, profiles, number, size, distance)


@njit(inline="always")
def _attend_rows(memory, chunk, to, size, rows, stride, cap, dim, keys_as, values_as, isa) -> None:
    """Compute the partial results of up to 4 rows with a chunk; write them to `to`, `size` bytes apart.

    `memory` is six addresses: queries, positions, list of tiles, list of tiles to prefetch, scores and probabilities.
    `chunk` is its first position, its numbers of keys and of tiles, the window, the address of the slopes of the KV
    head's query heads (0 without ALiBi), the number of these heads, the index of the first row in the sequence, and the
    relative logits: address and row stride of the states of the sequence and the KV head (0 without them), address of
    the profiles, their number and size.
    """
    queries, positions, tiles, coming, scores, probabilities = memory
    start, keys, count, window = chunk[:4]
    for n in range(0, count, TILES):
        score_tiles(queries, tiles + 8 * n, coming + 8 * n, stride, scores + 4 * LANES * n, rows, dim, keys_as, isa)
    if cap > 0:
        for j in range(rows):
            cap_scores(scores + j * SCORE_STRIDE, count, cap)
    for j in range(rows):
        _fall(scores, chunk, positions, j)
    softmax_rows(scores, probabilities, count, positions, start, window, to, rows, dim, values_as, isa)
    values, asked = tiles + VALUE_TILES, coming + VALUE_TILES
    value_tiles(scores, probabilities, values, asked, keys, to, rows, dim, values_as, isa)


@njit(inline="always")
def _attend_square(memory, chunk, to, size, rows, stride, cap, dim, keys_as, values_as, isa) -> None:
    """Do what `_attend_rows` does, with AMX, for up to 16 bfloat16 rows; unused rows of a register are written too."""
    queries, positions, tiles, _, scores, probabilities = memory
    start, _, count, window = chunk[:4]
    for n in range(0, count, TILES):
        score_squares(queries, tiles + 8 * n, stride, scores + 4 * LANES * n, dim)
    for j in range(0, rows, ROWS):
        at, some = scores + j * SCORE_STRIDE, min(ROWS, rows - j)
        if cap > 0:
            for i in range(some):
                cap_scores(at + i * SCORE_STRIDE, count, cap)
        for i in range(some):
            _fall(scores, chunk, positions, j + i)
        weights = probabilities + j * PROBABILITY_STRIDE
        softmax_rows(at, weights, count, positions + 8 * j, start, window, to + j * size, some, dim, values_as, isa)
    value_squares(probabilities, tiles + VALUE_TILES, count, to, dim)


def make_attend(head_dim: int, isa: int, keys_as: int, values_as: int, relates: int) -> Callable[..., None]:
    """Return `attend` for one head size, one `CacheKind` of keys and of values, with or without relative logits."""
    keys_kind, values_kind = CacheKind(keys_as), CacheKind(values_as)
    key_size, value_size = key_bytes(keys_kind, head_dim), value_bytes(values_kind, head_dim)
    rotated = values_kind.is_quantised
    asks = keys_kind.is_quantised or rotated
    squares = bool(isa & Isa.AMX) and fits(head_dim) and not asks
    attend_block = _attend_square if squares else _attend_rows
    block = SQUARE if squares else ROWS
    row_bytes = 4 * partial_floats(head_dim)
    thread_bytes = scratch_per_thread(head_dim)
    query_bytes = 2 * head_dim
    wide = int(in_floats(isa) and not keys_kind.is_quantised)
    row_query = query_bytes << wide  # bytes of a query row in a tile

    def attend(row, thread, threads):
        given = read(AttendArguments, row)
        starts, contexts = int64_at(given.query_start), int64_at(given.context_lens)
        heads, kv_heads, window, scratch = given.heads, given.kv_heads, given.window, given.scratch
        group = heads // kv_heads
        stride = 4 * min(1 << given.block_shift, STRIP)
        tiles = scratch + HEADER + thread * thread_bytes
        coming = tiles + TILE_LIST
        positions = coming + TILE_LIST
        queries = positions + 16 * ROW_TILE
        states = queries + ROW_TILE * row_query
        parts = states + ROW_TILE * row_bytes
        scores = parts + SQUARE * row_bytes
        probabilities = scores + SQUARE * SCORE_STRIDE
        last_values = probabilities + SQUARE * PROBABILITY_STRIDE
        shape = last_values + 2 * LANES * head_dim
        at_position = int64_at(positions)

        partials = scratch + HEADER + threads * thread_bytes
        free = given.scratch_size - HEADER - threads * thread_bytes
        sequences = step_number(row, given.sequences)
        total = total_cost(starts, contexts, sequences, window)
        before = 0  # number of units of the sequences before this one
        counter, own, end = rank_of(given.ranks, thread, threads)
        first_head, own_heads = kv_heads * own // threads, kv_heads * (end - own) // threads
        if counter == 0:
            counter = scratch
        unit = fetch_add(counter, 1)
        for r in range(sequences):
            token, context = starts[r], contexts[r]
            tokens = starts[r + 1] - token
            table = given.block_tables + 8 * r * given.table_stride
            all_rows = tokens * group
            row_tiles = count_row_tiles(all_rows)
            first_chunk = chunk_of(first_seen(context - tokens, window))
            last_chunk = chunk_of(context - 1)
            size = split_bytes(tokens, context, window, heads, kv_heads, total, threads, free, row_bytes)
            units = row_tiles * kv_heads
            run, runs = last_chunk + 1, 1  # chunks of a unit, units of a row tile
            if size > 0:
                chunks = last_chunk - first_chunk + 1
                run = max(1, chunks * units // (threads * _RUNS_PER_THREAD))
                runs = (chunks + run - 1) // run
            units = row_tiles * own_heads * runs
            while unit < before + units:
                rest = units - 1 - (unit - before)
                turn = rest % runs
                rest //= runs
                head = first_head + rest % own_heads
                slopes = given.slopes + 4 * head * group if given.slopes != 0 else 0
                states_at = given.relative if relates else 0  # a constant 0 removes the code of relative logits
                if states_at != 0:
                    states_at += 4 * (token * given.relative_stride + head * group * given.profile_count)
                relative = states_at, given.relative_stride, given.profiles, given.profile_count, given.profile_size
                tile = rest // own_heads
                first = tile * ROW_TILE
                rows = min(ROW_TILE, all_rows - first)
                _gather_queries(
                    given.q + head * group * query_bytes,
                    queries,
                    positions,
                    given.ahead,
                    first,
                    rows,
                    group,
                    token,
                    context - tokens,
                    heads * query_bytes,
                    head_dim,
                    wide,
                )
                seen = first_seen(at_position[0], window)
                chunk = max(first_chunk + turn * run, chunk_of(seen))
                last_seen = at_position[ROW_TILE + rows - 1]
                top = min(first_chunk + turn * run + run - 1, chunk_of(last_seen))
                to = parts  # not used: in split units, each chunk sets it
                following = -1  # the next unit, if this thread has claimed it already
                if size == 0:
                    for i in range(rows):
                        clear_partial(states + i * row_bytes, head_dim)
                if squares:
                    if rows > 8:
                        begin_squares(shape, 16)
                    else:
                        begin_squares(shape, 8)
                for c in range(chunk, top + 1):
                    start = max(chunk_start(c), seen & ~(LANES - 1))
                    keys = min(chunk_start(c + 1), last_seen + 1) - start
                    count = (keys + LANES - 1) // LANES
                    # Prefetch the next chunk of this unit, or the first chunk of this thread's next unit if that unit
                    # has the same tokens.
                    next_head, next_chunk, asked = head, c + 1, asks and c < top
                    if asks and c == top:
                        following = fetch_add(counter, 1)
                        rest = units - 1 - (following - before)
                        asked = rest >= 0 and rest // runs // own_heads == tile
                        next_head = first_head + rest // runs % own_heads
                        next_chunk = max(first_chunk + rest % runs * run, chunk_of(seen))
                    for when in range(1 if asks and c > chunk else 0, 2 if asked else 1):
                        of, n = (head, c) if when == 0 else (next_head, next_chunk)
                        _list_tiles(
                            tiles if when == 0 else coming,
                            given.key_cache + of * given.head_gap * key_size,
                            given.value_cache + of * given.head_gap * value_size,
                            int64_at(table + 8 * of * given.head_tables),
                            max(chunk_start(n), seen & ~(LANES - 1)),
                            CHUNK // LANES if asks else (count + TILES - 1) // TILES * TILES,
                            min(chunk_start(n + 1) - 1, last_seen),
                            given.block_shift,
                            of,
                            given.stretch_step,
                            key_size,
                            value_size,
                        )
                    if size > 0:
                        to = partials + (((c - first_chunk) * kv_heads + head) * all_rows + first) * row_bytes
                    if squares and keys % LANES != 0:
                        copy_seen(last_values, int64_at(tiles)[VALUE_TILES // 8 + count - 1], keys % LANES, head_dim)
                        int64_at(tiles)[VALUE_TILES // 8 + count - 1] = last_values
                    for i in range(0, rows, block):
                        some = min(block, rows - i)
                        target = parts
                        if size > 0 and not squares:
                            target = to + i * row_bytes
                        ask = coming if asked and i == 0 else tiles
                        memory = queries + i * row_query, positions + 8 * i, tiles, ask, scores, probabilities
                        seen_keys = start, keys, count, window, slopes, group, first + i, relative
                        attend_block(
                            memory,
                            seen_keys,
                            target,
                            row_bytes,
                            some,
                            stride,
                            given.cap,
                            head_dim,
                            keys_as,
                            values_as,
                            isa,
                        )
                        if size == 0:
                            for j in range(some):
                                merge_partial(states + (i + j) * row_bytes, parts + j * row_bytes, head_dim)
                        elif squares:
                            for j in range(some):
                                copy_partial(to + (i + j) * row_bytes, parts + j * row_bytes, head_dim)
                    tiles, coming = coming, tiles
                if size == 0:
                    t, h = first // group, first % group
                    for i in range(rows):
                        result = given.out + ((token + t) * heads + head * group + h) * 4 * head_dim
                        if given.sinks != 0:
                            add_sink(states + i * row_bytes, given.sinks + 4 * (head * group + h), head_dim)
                        finish_partial(states + i * row_bytes, result, head_dim)
                        if rotated:
                            rotate_row(result, head_dim)
                        h += 1
                        if h == group:
                            h = 0
                            t += 1
                unit = following if following >= 0 else fetch_add(counter, 1)
            before += units
            partials += size
            free -= size
        if squares:
            end_squares()

    return attend


# ---- merge -----------------------------------------------------------------------------------------------------------


def make_merge(head_dim: int, rotated: int) -> Callable[..., None]:
    """Return `merge`, which merges partial results; with `rotated` it undoes the Hadamard rotation of values."""
    row_bytes = 4 * partial_floats(head_dim)
    thread_bytes = scratch_per_thread(head_dim)

    def merge(row, thread, threads):
        given = read(AttendArguments, row)
        starts, contexts = int64_at(given.query_start), int64_at(given.context_lens)
        heads, kv_heads, window, scratch = given.heads, given.kv_heads, given.window, given.scratch
        group = heads // kv_heads
        state = scratch + HEADER + thread * thread_bytes
        partials = scratch + HEADER + threads * thread_bytes
        free = given.scratch_size - HEADER - threads * thread_bytes
        sequences = step_number(row, given.sequences)
        total = total_cost(starts, contexts, sequences, window)
        turn = thread  # rows are assigned round-robin, so that each thread gets a share of every sequence
        for r in range(sequences):
            token, context = starts[r], contexts[r]
            tokens = starts[r + 1] - token
            first_chunk = chunk_of(first_seen(context - tokens, window))
            size = split_bytes(tokens, context, window, heads, kv_heads, total, threads, free, row_bytes)
            if size == 0:
                continue
            while turn < tokens * heads:
                t, h = turn // heads, turn % heads
                position = context - tokens + t
                step = tokens * heads * row_bytes
                line = ((h // group) * tokens + t) * group + h % group
                clear_partial(state, head_dim)
                first = chunk_of(first_seen(position, window))
                last = position
                if given.ahead != 0:
                    last += int64_at(given.ahead)[token + t]
                for c in range(first, chunk_of(last) + 1):
                    merge_partial(state, partials + (c - first_chunk) * step + line * row_bytes, head_dim)
                if given.sinks != 0:
                    add_sink(state, given.sinks + 4 * h, head_dim)
                result = given.out + ((token + t) * heads + h) * 4 * head_dim
                finish_partial(state, result, head_dim)
                if rotated:
                    rotate_row(result, head_dim)
                turn += threads
            turn -= tokens * heads
            partials += size
            free -= size
        if thread == 0:
            int64_at(scratch)[0] = 0
        counter, own, _ = rank_of(given.ranks, thread, threads)
        if thread == own and counter != 0:
            int64_at(counter)[0] = 0

    return merge
