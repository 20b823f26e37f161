# SPDX-License-Identifier: MIT
"""Sampling as compiled functions (step 7 of a request's life): one or two passes over a row, without sorting it.

Further passes read only chunks (`cpu_chunks.py`) that reach a bound. Rows are processed separately, without the GIL.
`draw_rows` is an operation that divides the rows among a team's threads; other functions use the caller's thread.

Weights are float32; sums are float32 within a chunk and float64 over chunks. So the sampled token differs from the
reference's only if a random number, a mass (top_p) or a weight (min_p) is extremely close to a boundary.
"""

from __future__ import annotations

import math

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float64_at, int64_at, read, step_number
from candle_vllm.core.kernels.sampling import cpu_chunks, cpu_select
from candle_vllm.core.kernels.sampling.contract import (
    CHUNK,
    MAXIMA_AT,
    MAXIMA_BYTES,
    SUMS_AT,
    TAIL_AT,
    WEIGHTS_AT,
    DrawArguments,
)

_LARGEST = float(np.finfo(np.float32).max)


@cpu_chunks.inner
def _weigh(row, chunks, number, work, cut, last_tie, largest, scale):
    """Write a chunk's weights: 0 below `cut`, and for logits equal to it with ids above `last_tie`. Return the sum."""
    at, weights = cpu_chunks.chunk_at(row, work + TAIL_AT, chunks, number), work + WEIGHTS_AT
    start = number * CHUNK
    total = cpu_chunks.weigh_chunk(at, largest, scale, cut if start <= last_tie else cpu_chunks.above(cut), weights)
    if start <= last_tie < start + CHUNK:
        logits, kept, total = float32_at(at), float32_at(weights), 0.0
        for place in range(CHUNK):
            if place > last_tie - start and logits[place] == cut:
                kept[place] = 0.0
            total += kept[place]
    return total


@cpu_chunks.inner
def _sum_chunks(row, chunks, work, cut, last_tie, largest, scale):
    """Write the sum of each chunk's weights; return the total."""
    sums, total = float64_at(work + SUMS_AT + chunks * MAXIMA_BYTES), 0.0
    for number in range(chunks):
        sums[number] = 0.0
        if cpu_chunks.reaches(work + MAXIMA_AT + number * MAXIMA_BYTES, cut):
            sums[number] = _weigh(row, chunks, number, work, cut, last_tie, largest, scale)
        total += sums[number]
    return total


@cpu_chunks.inner
def _pick(row, chunks, work, cut, last_tie, largest, scale, target):
    """Return the first id at which the cumulative weight exceeds `target`: find the chunk, then the id in the chunk."""
    sums = float64_at(work + SUMS_AT + chunks * MAXIMA_BYTES)
    before, chosen, start = 0.0, 0, 0.0
    for number in range(chunks):
        after = before + sums[number]
        if after > before:  # never choose a chunk of weight 0, even if rounding makes the target equal to the total
            chosen, start = number, before
            if after > target:
                break
        before = after
    _weigh(row, chunks, chosen, work, cut, last_tie, largest, scale)
    return chosen * CHUNK + _pick_inside(float32_at(work + WEIGHTS_AT), target - start, sums[chosen])


@cpu_chunks.inner
def _pick_inside(weights, target, mass):
    total, before, chosen = 0.0, 0.0, 0
    for place in range(CHUNK):
        total += weights[place]
    if total != mass:  # the chunk's sum was rounded in another way: scale the target
        target = target / mass * total
    target = max(target, 0.0)
    for place in range(CHUNK):
        after = before + weights[place]
        if after > before:
            chosen = place
            if after > target:
                break
        before = after
    return chosen


@cpu_chunks.inner
def _draw_row(row, vocabulary, controls, work, chosen, largest):
    """Sample one row with parameters float64 [5], see `Control`; write an int64 id and the largest logit, float32."""
    chunks = (vocabulary + CHUNK - 1) // CHUNK
    temperature, min_p, top_k, top_p = controls[0], controls[1], controls[2], controls[3]
    top = cpu_select.survey(row, vocabulary, work)
    chosen[0], largest[0] = -1, top
    if not -cpu_select.INFINITE < top < cpu_select.INFINITE:
        return
    if temperature == 0.0:
        chosen[0] = cpu_select.first_at(row, chunks, work, top, cpu_select.INFINITE, np.int64(0))
        return
    cut, last_tie, rate = cpu_select.LOWEST, cpu_select.ALL, 1.0 / temperature
    if top_k > 0.0:
        cut, _ = cpu_select.kth_largest(row, chunks, work, int(top_k), top)
    if min_p > 0.0:
        cut = max(cut, cpu_select.min_p_bound(min_p, top, temperature))
    if top_p < 1.0:
        cut, ties = cpu_select.nucleus(row, chunks, work, cut, top_p, top, rate)
        if ties != cpu_select.ALL:
            last_tie = cpu_select.first_at(row, chunks, work, cut, cpu_chunks.above(cut), ties - 1)
    scale = np.float32(rate * cpu_select.LOG2_E)
    target = controls[4] * _sum_chunks(row, chunks, work, cut, last_tie, top, scale)
    chosen[0] = _pick(row, chunks, work, cut, last_tie, top, scale, target)


def draw_rows(row, thread, threads):
    """Operation: sample a thread's share of the rows; see `DrawArguments`."""
    given = read(DrawArguments, row)
    rows, work = step_number(row, StepNumber.LOGIT_ROWS), given.work + thread * given.work_bytes
    for number in range(rows * thread // threads, rows * (thread + 1) // threads):
        _draw_row(
            given.logits + number * given.row_bytes,
            given.vocabulary,
            float64_at(given.controls + 40 * number),
            work,
            int64_at(given.chosen + 8 * number),
            float32_at(given.largest + 4 * number),
        )
        if given.positions != 0:
            int64_at(given.positions)[number] += 1
            int64_at(given.slots)[number] += 1
            int64_at(given.context_lens)[number] += 1


@cpu_chunks.inner
def _rank(row, chunks, work, token, chosen):
    """Return a token's rank, see `Standing.ranks`."""
    rank, group = 1, token // cpu_chunks.GROUP
    for number in range(chunks):
        if not cpu_chunks.reaches(work + MAXIMA_AT + number * MAXIMA_BYTES, chosen):
            continue
        at = cpu_chunks.chunk_at(row, work + TAIL_AT, chunks, number)
        for part in range(CHUNK // cpu_chunks.GROUP):
            place = number * (CHUNK // cpu_chunks.GROUP) + part
            rank += cpu_chunks.count_bits(
                cpu_chunks.hits(at + part * 4 * cpu_chunks.GROUP, cpu_chunks.above(chosen), cpu_select.INFINITE)
            )
            if place <= group:
                equal = cpu_chunks.hits(at + part * 4 * cpu_chunks.GROUP, chosen, cpu_chunks.above(chosen))
                rank += cpu_chunks.count_bits(
                    equal if place < group else equal & ((1 << (token % cpu_chunks.GROUP)) - 1)
                )
    return rank


@cpu_chunks.inner
def _top_ids(row, vocabulary, work, top, largest, to):
    """Write the ids of the `top` largest logits in descending order, lower ids first among equals; return the count."""
    chunks = (vocabulary + CHUNK - 1) // CHUNK
    cut, ties = cpu_select.kth_largest(row, chunks, work, top, largest)
    logits, count = float32_at(row), 0
    for number in range(chunks):
        if not cpu_chunks.reaches(work + MAXIMA_AT + number * MAXIMA_BYTES, cut):
            continue
        for token in range(number * CHUNK, min((number + 1) * CHUNK, vocabulary)):
            value = logits[token]
            if value > cut or (value == cut and ties > 0):
                ties -= value == cut
                place = count
                while place > 0 and logits[to[place - 1]] < value:
                    to[place] = to[place - 1]
                    place -= 1
                to[place] = token
                count += 1
    return count


def stand(logits, row_bytes, rows, vocabulary, tokens, counts, work, logs, places, named, most):
    """See `stand` in `kernels/sampling`. Reads int64 [R] tokens and counts (`tops`); writes [R] logs (`offsets`) and
    places (`ranks`), and [R, most] named (`top_ids`)."""
    token_ids, tops = int64_at(tokens), int64_at(counts)
    offsets, ranks = float64_at(logs), int64_at(places)
    chunks = (vocabulary + CHUNK - 1) // CHUNK
    for number in range(rows):
        row, mass = logits + number * row_bytes, 0.0
        largest = cpu_select.survey(row, vocabulary, work)
        for part in range(chunks):
            at = cpu_chunks.chunk_at(row, work + TAIL_AT, chunks, part)
            mass += cpu_chunks.weigh_chunk(
                at, largest, np.float32(cpu_select.LOG2_E), cpu_select.LOWEST, work + WEIGHTS_AT
            )
        offsets[number] = float(largest) + math.log(mass)
        ranks[number] = _rank(row, chunks, work, token_ids[number], float32_at(row)[token_ids[number]])
        top_ids = int64_at(named + 8 * most * number)
        for place in range(most):
            top_ids[place] = -1
        if tops[number] > 0:
            _top_ids(row, vocabulary, work, min(tops[number], vocabulary), largest, top_ids)


def adjust(
    logits,
    size,
    masked,
    limited,
    kept,
    kept_count,
    hidden,
    hidden_count,
    biased,
    bias_at,
    biases,
    seen,
    seen_at,
    seens,
    penalties_at,
):
    """Apply an `Adjustment`, whose arrays are passed by address and size."""
    row, allowed, forbidden = float32_at(logits), int64_at(kept), int64_at(hidden)
    bias_ids, bias, seen_ids, counts = int64_at(biased), float32_at(bias_at), int64_at(seen), float32_at(seen_at)
    penalties = float64_at(penalties_at)
    odd = 0  # masked logits that are NaN or +inf, which show that the model is broken
    if masked and limited:
        start = 0
        for place in range(kept_count + 1):
            end = allowed[place] if place < kept_count else size
            for token in range(start, end):
                odd += 0 if row[token] < cpu_select.INFINITE else 1
                row[token] = -cpu_select.INFINITE
            start = end + 1
    if masked:
        for place in range(hidden_count):
            token = forbidden[place]
            odd += 0 if row[token] < cpu_select.INFINITE else 1
            row[token] = -cpu_select.INFINITE
    if odd:
        row[0] = np.nan
    for place in range(biases):
        row[bias_ids[place]] += bias[place]
    repetition, frequency, presence = penalties[0], penalties[1], penalties[2]
    for place in range(seens):
        logit, count = float(row[seen_ids[place]]), float(counts[place])
        if not logit < math.inf:
            continue
        logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * count + (presence if count > 0 else 0.0)
        row[seen_ids[place]] = min(logit, _LARGEST)
