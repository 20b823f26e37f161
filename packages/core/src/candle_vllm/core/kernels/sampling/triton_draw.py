# SPDX-License-Identifier: MIT
"""Sampling one token per row on a GPU (step 7 of a request's life): up to five launches, without sorting or waiting.

    survey   finds the largest logits of chunks and of groups (`triton_rows.py`)
    plan     finds the row's largest logit, and the greedy token; chooses edges: possible lower bounds of a list of
             candidates
    weigh    computes each chunk's mass (sum of weights), and the mass and number of its logits that reach each edge
    gather   copies the logits that reach the highest sufficient edge to a short list, in the order of ids
    finish   applies top_k and top_p to the list, or to the row itself if no edge gives a short list; picks the token

The parameters on the device decide which of these a row needs. The caller may leave out launches that no row needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.sampling.triton_rows import (
    BLOCK,
    BUFFER,
    CHUNK,
    GROUPS,
    KEY_OF_MINUS_INFINITY,
    NONE,
    gather,
    key_of,
    largest_of,
    mass_of,
    rows_of,
    search,
    survey_kernel,
    value_of,
)
from candle_vllm.core.kernels.triton_build import OPTIONS

_EDGES = tl.constexpr(4)
_PLAN = tl.constexpr(8)  # int32 elements of a row's plan: the key of min_p's bound, then the edges' keys
_LANES = tl.constexpr(128)
_WARPS = 8  # not measured yet


@triton.jit
def _scale(temperature):
    return tl.maximum((1.4426950408889634 / temperature).to(tl.float32), 1e-30)


@triton.jit
def _min_p_floor(min_p, largest, temperature):
    """Return the smallest key (`key_of`) whose float64 weight is at least `min_p`."""
    top, wide = key_of(largest).to(tl.int64), largest.to(tl.float64)
    lo, hi = top * 0 + KEY_OF_MINUS_INFINITY, top
    lane = tl.arange(0, _LANES)
    while lo < hi:
        step = (hi - lo + _LANES - 1) // _LANES
        keys = tl.minimum(lo + lane * step, hi)
        weights = tl.exp((value_of(keys.to(tl.int32)).to(tl.float64) - wide) / temperature)
        light = tl.sum((weights < min_p).to(tl.int64))
        hi = tl.minimum(lo + light * step, hi)
        lo = tl.where(light > 0, tl.minimum(lo + (light - 1) * step + 1, hi), lo)
    return hi.to(tl.int32)


@triton.jit
def _plan_edges(group_maxima, groups, filled, top_k, largest, plan):
    """Choose edges among the groups' maxima: at least r logits, rarely many more, reach the r-th largest maximum.

    filled: number of groups that have a logit.
    """
    hi = key_of(largest).to(tl.int64) + 1
    lo = hi * 0 + KEY_OF_MINUS_INFINITY
    for edge in tl.static_range(_EDGES):
        rank = top_k
        if top_k == 0:
            rank = hi * 0
            if edge == 0:
                rank += 32
            elif edge == 1:
                rank += groups // 8
            elif edge == 2:
                rank += groups // 2
            else:
                rank += groups - groups // 4
        key = NONE
        if (top_k == 0) | (edge == 0):
            key = KEY_OF_MINUS_INFINITY
            if (rank > 0) & (rank <= filled):
                key, _ = search(group_maxima, groups, rank, lo, hi, 0, largest, 1.0, False)
        tl.store(plan + 1 + edge, key)


@triton.jit
def plan_kernel(
    controls,  # [R, 5] fp64, see `Control`
    group_maxima,  # [R, C * GROUPS]
    maxima,  # [R, C]
    firsts,  # [R, C]
    largest_out,  # [R] fp32
    ids,  # [R] int64
    plans,  # [R, _PLAN] int32
    V,
    C,
    CB: tl.constexpr,
    RANDOM: tl.constexpr,
    SEARCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = largest_of(maxima + row * C, C, CB)
    tl.store(largest_out + row, largest)
    part = tl.arange(0, CB)
    tops = tl.load(maxima + row * C + part, mask=part < C, other=float("-inf"))
    first = tl.min(tl.where(tops == largest, tl.load(firsts + row * C + part, mask=part < C, other=NONE), NONE), axis=0)
    sound = tl.abs(largest) < float("inf")
    tl.store(ids + row, tl.where(sound, first, 0).to(tl.int64))
    if RANDOM:
        temperature = tl.load(controls + row * 5)
        if sound & (temperature > 0):
            min_p = tl.load(controls + row * 5 + 1)
            floor = KEY_OF_MINUS_INFINITY
            if min_p > 0:
                floor = _min_p_floor(min_p, largest, temperature)
            tl.store(plans + row * _PLAN, floor)
            if SEARCH:
                top_k = tl.load(controls + row * 5 + 2).to(tl.int64)
                top_p = tl.load(controls + row * 5 + 3)
                if (top_k > 0) | (top_p < 1):
                    groups = C * GROUPS
                    filled = (C - 1) * GROUPS + tl.minimum(V - (C - 1) * CHUNK, GROUPS)
                    at = plans + row * _PLAN
                    _plan_edges(group_maxima + row * groups, groups, filled, top_k, largest, at)


@triton.jit
def weigh_kernel(
    logits,  # [R, V]
    controls,
    largest_in,  # [R]
    plans,
    masses,  # [R, 1 + _EDGES, C] int64: of all logits that min_p keeps, then of the logits that reach each edge
    counts,  # [R, _EDGES, C] int32
    row_stride,
    V,
    C,
    SEARCH: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, largest = tl.load(controls + row * 5), tl.load(largest_in + row)
    if (temperature > 0) & (tl.abs(largest) < float("inf")):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * row_stride + at, mask=at < V, other=float("-inf"))
        key = key_of(x)
        weights = tl.where(key >= tl.load(plans + row * _PLAN), mass_of(x, largest, _scale(temperature)), 0)
        masses += row * (1 + _EDGES) * C + chunk
        tl.store(masses, tl.sum(weights, axis=0))
        if SEARCH:
            top_k, top_p = tl.load(controls + row * 5 + 2), tl.load(controls + row * 5 + 3)
            if (top_k > 0) | (top_p < 1):
                for edge in tl.static_range(_EDGES):
                    reaches = (key >= tl.load(plans + row * _PLAN + 1 + edge)) & (at < V)
                    tl.store(masses + (1 + edge) * C, tl.sum(tl.where(reaches, weights, 0), axis=0))
                    tl.store(counts + (row * _EDGES + edge) * C + chunk, tl.sum(reaches.to(tl.int32), axis=0))


@triton.jit
def _limit(top_p, whole):
    """Return the mass that top_p keeps: a token is removed if the more likely tokens have at least this mass."""
    exact = top_p * whole.to(tl.float64)
    limit = exact.to(tl.int64)
    limit += (limit.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(limit, 1), whole)


@triton.jit
def _choice(row, masses, counts, top_k, top_p, C, CB: tl.constexpr):
    """Return the highest edge (or _EDGES) that enough logits, at most BUFFER, reach; their number; the row's mass."""
    part = tl.arange(0, CB)
    whole = tl.sum(tl.load(masses + row * (1 + _EDGES) * C + part, mask=part < C, other=0), axis=0)
    edge = tl.arange(0, _EDGES)
    to, there = edge[:, None] * C + part[None, :], (part < C)[None, :]
    number = tl.sum(tl.load(counts + row * _EDGES * C + to, mask=there, other=0), axis=1)
    mass = tl.sum(tl.load(masses + (row * (1 + _EDGES) + 1) * C + to, mask=there, other=0), axis=1)
    enough = tl.where(top_k > 0, number >= top_k, mass >= _limit(top_p, whole))
    chosen = tl.min(tl.where(enough & (number <= BUFFER), edge, _EDGES), axis=0)
    return chosen, tl.sum(tl.where(edge == chosen, number, 0), axis=0), whole


@triton.jit
def gather_kernel(
    logits,
    controls,
    largest_in,
    plans,
    masses,
    counts,
    values,  # [R, BUFFER] fp32: the candidates' logits
    names,  # [R, BUFFER] int32: ids of the candidates
    row_stride,
    V,
    C,
    CB: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, largest = tl.load(controls + row * 5), tl.load(largest_in + row)
    top_k, top_p = tl.load(controls + row * 5 + 2), tl.load(controls + row * 5 + 3)
    if (temperature > 0) & (tl.abs(largest) < float("inf")) & ((top_k > 0) | (top_p < 1)):
        chosen, _, _ = _choice(row, masses, counts, top_k, top_p, C, CB)
        if chosen < _EDGES:
            edge = tl.load(plans + row * _PLAN + 1 + chosen)
            numbers = counts + (row * _EDGES + chosen) * C
            source, to = logits + row * row_stride, row * BUFFER
            gather(source, chunk, V, edge, numbers, C, CB, values + to, names + to)


@triton.jit
def _mass(source, count, cut, largest, scale):
    """Return the mass of all logits that reach the key `cut`."""
    total = tl.zeros([], tl.int64)
    for start in tl.range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < count, other=float("-inf"))
        total += tl.sum(tl.where(key_of(x) >= cut, mass_of(x, largest, scale), 0), axis=0)
    return total


@triton.jit
def _pick(source, begin, end, cut, ties, largest, scale, before, target):
    """Return the first index at which the cumulative mass of kept logits, starting with `before`, exceeds `target`.

    Logits above the key `cut` are kept, and the first `ties` logits that equal it.
    """
    place, seen = NONE, tl.zeros([], tl.int32)
    for start in tl.range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < end, other=float("-inf"))
        key = key_of(x)
        equal = (key == cut) & (at < end)
        earlier = seen + tl.cumsum(equal.to(tl.int32), axis=0) - equal.to(tl.int32)
        weights = tl.where((key > cut) | (equal & (earlier < ties)), mass_of(x, largest, scale), 0)
        cumulated = before + tl.cumsum(weights, axis=0)
        place = tl.minimum(place, tl.min(tl.where(cumulated > target, at, NONE), axis=0))
        before += tl.sum(weights, axis=0)
        seen += tl.sum(equal.to(tl.int32), axis=0)
    return place


@triton.jit
def _target(uniform, total):
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _pick_of_row(source, masses, floor, uniform, largest, scale, V, C, CB: tl.constexpr):
    """Pick the token of a row without top_k and top_p: first the chunk by the chunks' masses, then the token."""
    part = tl.arange(0, CB)
    mass = tl.load(masses + part, mask=part < C, other=0)
    target = _target(uniform, tl.sum(mass, axis=0))
    chunk = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0)
    before = tl.sum(tl.where(part < chunk, mass, 0), axis=0)
    begin = chunk * CHUNK
    return _pick(source, begin, tl.minimum(begin + CHUNK, V), floor, V, largest, scale, before, target)


@triton.jit
def _pick_of_list(source, count, lo, floor, top_k, top_p, uniform, whole, largest, scale):
    """Pick the token's index among `source`: all logits of a row, or all logits that reach the key `lo`."""
    hi = key_of(largest) + 1
    cut = floor
    if top_k > 0:
        kth, _ = search(source, count, top_k, lo, hi, floor, largest, scale, False)
        cut = tl.maximum(cut, kth)
        whole = _mass(source, count, cut, largest, scale)
    ties = count
    if top_p < 1:
        lo = tl.maximum(lo, cut)
        last, above = search(source, count, _limit(top_p, whole), lo, hi, cut, largest, scale, True)
        weight = mass_of(value_of(last), largest, scale)
        kept = (_limit(top_p, whole) - above + weight - 1) // weight
        cut, whole, ties = last, above + kept * weight, kept.to(tl.int32)
    return _pick(source, 0, count, cut, ties, largest, scale, whole * 0, _target(uniform, whole))


@triton.jit
def finish_kernel(
    logits,
    controls,
    largest_in,
    plans,
    masses,
    counts,
    values,
    names,
    ids,  # [R] int64
    row_stride,
    V,
    C,
    CB: tl.constexpr,
    SEARCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, largest = tl.load(controls + row * 5), tl.load(largest_in + row)
    if (temperature > 0) & (tl.abs(largest) < float("inf")):
        top_k, top_p = tl.load(controls + row * 5 + 2).to(tl.int64), tl.load(controls + row * 5 + 3)
        uniform, scale = tl.load(controls + row * 5 + 4), _scale(temperature)
        floor = tl.load(plans + row * _PLAN)
        source = logits + row * row_stride
        all_masses = masses + row * (1 + _EDGES) * C
        if SEARCH:
            if (top_k > 0) | (top_p < 1):
                chosen, count, whole = _choice(row, masses, counts, top_k, top_p, C, CB)
                lo = KEY_OF_MINUS_INFINITY
                if chosen < _EDGES:
                    source = values + row * BUFFER
                    lo = tl.load(plans + row * _PLAN + 1 + chosen)
                else:
                    count = V
                token = _pick_of_list(source, count, lo, floor, top_k, top_p, uniform, whole, largest, scale)
                if chosen < _EDGES:
                    token = tl.load(names + row * BUFFER + token)
            else:
                token = _pick_of_row(source, all_masses, floor, uniform, largest, scale, V, C, CB)
        else:
            token = _pick_of_row(source, all_masses, floor, uniform, largest, scale, V, C, CB)
        tl.store(ids + row, token.to(tl.int64))


def draw(
    logits: torch.Tensor, controls: torch.Tensor, *, random: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `draw_tensors` in the package."""
    rows = rows_of(logits)
    number, device = len(logits), logits.device
    assert controls.shape == (number, 5)
    assert controls.dtype == torch.float64
    assert controls.is_contiguous()
    assert controls.device == device
    ids = torch.empty(number, dtype=torch.int64, device=device)
    largest = torch.empty(number, dtype=torch.float32, device=device)
    if not number:
        return ids, largest
    plans = torch.empty(number, _PLAN.value, dtype=torch.int32, device=device)
    stride, vocabulary, chunks, block = logits.stride(0), logits.shape[1], rows.chunks, rows.block
    found = (rows.group_maxima, rows.maxima, rows.firsts)
    launch: dict[str, Any] = {"num_warps": _WARPS, **OPTIONS}
    survey_kernel[rows.grid](logits, *found, stride, vocabulary, chunks, **launch)
    constants = {"CB": block, "RANDOM": random, "SEARCH": search}
    plan_kernel[(number,)](controls, *found, largest, ids, plans, vocabulary, chunks, **constants, **launch)
    if not random:
        return ids, largest
    masses = torch.empty(number, 1 + _EDGES.value, chunks, dtype=torch.int64, device=device)
    counts = values = names = None
    if search:
        counts = torch.empty(number, _EDGES.value, chunks, dtype=torch.int32, device=device)
        values = torch.empty(number, BUFFER.value, dtype=torch.float32, device=device)
        names = torch.empty(number, BUFFER.value, dtype=torch.int32, device=device)
    state = (logits, controls, largest, plans, masses, counts)
    weigh_kernel[rows.grid](*state, stride, vocabulary, chunks, SEARCH=search, **launch)
    if search:
        gather_kernel[rows.grid](*state, values, names, stride, vocabulary, chunks, CB=block, **launch)
    finish_kernel[(number,)](*state, values, names, ids, stride, vocabulary, chunks, CB=block, SEARCH=search, **launch)
    return ids, largest
