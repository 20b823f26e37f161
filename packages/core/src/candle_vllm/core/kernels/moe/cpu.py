# SPDX-License-Identifier: MIT
"""Mixture of experts as compiled CPU operations: routing, sorting of pairs, the experts' matrices, the weighted sum.

Terms (pair, place): see the package. In the order of places, the rows that an expert multiplies are contiguous in the
result, and the expert's matrices are read once for all of them.

`experts` divides the tiles of all chosen experts' matrices among the threads (a rank's rows among the rank's threads),
and calls the linear operation of each matrix's kind on a thread's tiles, with a copy of its arguments in which only
fields that all kinds have are changed. So matrices may be of different kinds, a row has the same bits as from the
linear layer, and only the weights of chosen experts are read.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import share
from candle_vllm.core.kernels.cpu_runtime.operation import NUMBERS, LinearArguments, StepNumber, slot
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    call_operation,
    fetch_add,
    float32_at,
    int64_at,
    rank_of,
    read,
    step_number,
    store_release,
)
from candle_vllm.core.kernels.cpu_runtime.tiles import add_rows, stack_bytes
from candle_vllm.core.kernels.moe.arguments import ENTRY, LEAST_SUM, CombineArguments, ExpertsArguments, RouteArguments

_ROWS_FROM, _WEIGHTS, _TILE_BYTES, _OUTPUTS, _OUT, _ROW_BYTES, _BIAS, _PICKED = (
    slot(LinearArguments, name)
    for name in ("rows_from", "weights", "tile_bytes", "outputs", "out", "row_bytes", "bias", "picked")
)

READING = 4
"""Cost of reading a tile of weights, in units of its product with one row; only used to divide the work."""


# ---- choosing --------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _number(value: float) -> float:
    """Return `value`, or negative infinity for NaN."""
    return value if value == value else -math.inf


@njit
def _best(values: Any, candidates: Any, count: int) -> int:
    """Return the index of the highest candidate (the lowest index among equals), and remove it from the candidates."""
    best = -1
    for place in range(count):
        if candidates[place] != 0 and (best < 0 or values[place] > values[best]):
            best = place
    candidates[best] = 0
    return best


@njit
def _score_of(logit: float, largest: float, total: float, scoring: int) -> float:
    """Return the score of a logit; `largest` and `total` are for softmax."""
    if scoring == 0:
        return math.exp(logit - largest) / total
    if scoring == 3:
        return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))
    return 1.0 / (1.0 + math.exp(-logit))


@njit
def _score(logits: Any, scores: Any, choice: Any, count: int, scoring: int, bias: int) -> None:
    """Compute a token's scores, and the values by which experts are chosen, in float64; store them in float32."""
    added = float32_at(bias)
    largest = -math.inf
    for x in range(count):
        largest = max(largest, _number(float(logits[x])))
    total = 0.0
    for x in range(count):
        if scoring == 0:
            total += math.exp(float(logits[x]) - largest)
    for x in range(count):
        value = float(logits[x])
        scores[x] = _score_of(value, largest, total, scoring)
        choice[x] = _number(logits[x]) if bias == 0 else _number(scores[x] + added[x])


@njit
def _share_of_near(choice: Any, candidates: Any, best: int, count: int, jitter: float) -> float:
    """Return the weight of sparsemixer: logit `best`'s share of a softmax over the logit and the near candidates."""
    top, total = float(choice[best]), 1.0
    for x in range(count):
        value = float(choice[x])
        if candidates[x] != 0 and top - value <= 2.0 * jitter * max(abs(value), top):
            total += math.exp(value - top)
    return 1.0 / total


@njit
def _keep_groups(choice: Any, candidates: Any, scratch: int, size: int, groups: int, top_groups: int, two: int) -> None:
    """Make the experts of the best groups the candidates. scratch: address of 2 * groups floats."""
    worth, remaining = float32_at(scratch), float32_at(scratch + 4 * groups)
    for group in range(groups):
        best, second = -math.inf, -math.inf
        for x in range(group * size, (group + 1) * size):
            value = float(choice[x])
            if value > best:
                best, second = value, best
            elif value > second:
                second = value
        worth[group] = best + second if two != 0 else best
        remaining[group] = 1
    for _ in range(top_groups):
        group = _best(worth, remaining, groups)
        for x in range(group * size, (group + 1) * size):
            candidates[x] = 1


@njit
def _sort(experts: int, tokens: int, top_k: int, count: int, starts: int, token_of: int, place_of: int) -> None:
    """Sort the pairs of experts int64 [T, k] by expert; see `RouteArguments`."""
    wanted, first, following = int64_at(experts), int64_at(starts), int64_at(starts + (count + 1) * 8)
    tokens_, places = int64_at(token_of), int64_at(place_of)
    for x in range(count + 1):
        first[x] = 0
    for pair in range(tokens * top_k):
        first[wanted[pair] + 1] += 1
    for x in range(count):
        following[x] = first[x]
        first[x + 1] += first[x]
    for pair in range(tokens * top_k):
        expert = wanted[pair]
        place = following[expert]
        following[expert] = place + 1
        tokens_[place] = pair // top_k
        places[pair] = place


def route(row, thread, threads):
    """Choose experts and sort the pairs."""
    given = read(RouteArguments, row)
    tokens = step_number(row, StepNumber.TOKENS.value)
    count, top_k, groups, bias, scale = given.num_experts, given.top_k, given.groups, given.bias, float(given.scale)
    memory = stack_bytes(3 * 4 * count + 8 * groups)
    scores, choice, candidates = float32_at(memory), float32_at(memory + 4 * count), float32_at(memory + 8 * count)
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        _score(float32_at(given.logits + t * given.stride * 4), scores, choice, count, given.scoring, bias)
        for x in range(count):
            candidates[x] = 1 if groups == 1 else 0
        if groups > 1:
            _keep_groups(choice, candidates, memory + 12 * count, count // groups, groups, given.top_groups, bias)
        chosen, found = int64_at(given.experts + t * top_k * 8), float32_at(given.weights + t * top_k * 4)
        total = 0.0
        for j in range(top_k):
            if given.chosen != 0:
                expert = int64_at(given.chosen)[int64_at(given.token_ids)[t] * top_k + j]
            else:
                expert = _best(choice, candidates, count)
            chosen[j] = expert
            if given.scoring == 2:
                scores[expert] = _share_of_near(choice, candidates, expert, count, float(given.jitter))
            total += float(scores[expert])
        factor = scale / (total + LEAST_SUM) if given.renormalise != 0 else scale
        for j in range(top_k):
            own = float(float32_at(given.expert_scale)[chosen[j]]) if given.expert_scale != 0 else 1.0
            found[j] = float(scores[chosen[j]]) * factor * own
    if fetch_add(given.finished, 1) == threads - 1:  # the last thread sorts, which saves a barrier
        store_release(given.finished, 0)
        _sort(given.experts, tokens, top_k, count, given.starts, given.token_of, given.place_of)
        int64_at(int64_at(row)[NUMBERS])[StepNumber.PAIRS.value] = tokens * top_k


# ---- the experts' matrices -------------------------------------------------------------------------------------------


def experts(row, thread, threads):
    """Multiply a thread's share of the tiles of the experts' matrices."""
    given = read(ExpertsArguments, row)
    starts, table, count, matrices = int64_at(given.starts), given.table, given.num_experts, given.matrices
    ranked = given.ranks != 0  # each rank multiplies its own rows of every matrix
    _, rank, end = rank_of(given.ranks, thread, threads)
    total = 0
    for x in range(count):
        rows = starts[x + 1] - starts[x]
        if rows > 0:
            for m in range(matrices):
                entry = int64_at(table + (x * matrices + m) * ENTRY * 8)
                tiles = (entry[_OUTPUTS] + 15) >> 4
                if ranked:
                    tiles = tiles * end // threads - tiles * rank // threads
                total += tiles * (rows + READING)
    low, high = total * (thread - rank) // (end - rank), total * (thread - rank + 1) // (end - rank)
    memory = stack_bytes(ENTRY * 8 + 64)
    own, numbers = int64_at(memory), int64_at(memory + ENTRY * 8)
    at = 0
    for x in range(count):
        start = starts[x]
        rows = starts[x + 1] - start
        if rows == 0:
            continue
        for m in range(matrices):
            entry = int64_at(table + (x * matrices + m) * ENTRY * 8)
            cost, tiles, before = rows + READING, (entry[_OUTPUTS] + 15) >> 4, 0
            if ranked:
                before = tiles * rank // threads
                tiles = tiles * end // threads - before
            # A tile belongs to the thread in whose share of the cost the tile begins.
            first = min((max(low - at, 0) + cost - 1) // cost, tiles)
            last = min((max(high - at, 0) + cost - 1) // cost, tiles)
            at += tiles * cost
            if first >= last:
                continue
            first, last = first + before, last + before
            for index in range(ENTRY):
                own[index] = entry[index]
            numbers[0] = rows
            own[NUMBERS] = memory + ENTRY * 8
            own[_ROWS_FROM] = 0
            own[_WEIGHTS] += first * own[_TILE_BYTES]
            own[_OUTPUTS] = min(own[_OUTPUTS] - first * 16, (last - first) * 16)
            own[_OUT] += start * own[_ROW_BYTES] + first * 64
            if own[_BIAS] != 0:
                own[_BIAS] += first * 64
            own[_PICKED] = given.picked + start * 8
            call_operation(own[0], memory, 0, 1)


# ---- the weighted sum ------------------------------------------------------------------------------------------------


def combine(row, thread, threads):
    """Write, or add, each token's weighted sum of results."""
    given = read(CombineArguments, row)
    tokens = step_number(row, StepNumber.TOKENS.value)
    onto, columns, top_k = given.onto, given.columns, given.top_k
    vectors = columns >> 4
    first_row, row_count, first, count = share(tokens, vectors + 1, thread, threads)
    memory = stack_bytes(16 * (top_k + 1) + 64)
    at_factors = memory + 8 * (top_k + 1)
    addresses, factors = int64_at(memory), float32_at(at_factors)
    has_tail = first + count == vectors + 1  # the last share includes the columns that fill no vector
    for t in range(first_row, first_row + row_count):
        chosen, found = int64_at(given.places + t * top_k * 8), float32_at(given.weights + t * top_k * 4)
        for j in range(top_k):
            addresses[j] = given.results + chosen[j] * given.result_stride * 4
            factors[j] = found[j]
        terms = top_k
        if given.shared != 0:
            addresses[terms] = given.shared + t * given.shared_stride * 4
            factors[terms] = 1.0
            if given.gate != 0:
                factors[terms] = 1.0 / (1.0 + math.exp(-float(float32_at(given.gate + t * given.gate_stride * 4)[0])))
            terms += 1
        at = given.out + t * given.out_stride * 4
        add_rows(at, memory, at_factors, terms, first, count - has_tail, onto)
        if has_tail:
            target = float32_at(at)
            for column in range(vectors << 4, columns):
                total = factors[0] * float32_at(addresses[0])[column]
                for j in range(1, terms):
                    total += factors[j] * float32_at(addresses[j])[column]
                target[column] = target[column] + total if onto != 0 else total
