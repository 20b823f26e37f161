# SPDX-License-Identifier: MIT
"""llama.cpp's chain on a GPU (step 7 of a request's life): one launch, a program for each row with a chain.

Seven values (floor, shift, far, cut, tie, roof, stays) describe which tokens are left, and the row is written once, at
the end. A token with logit x, and the key of x (`triton_rows.py`), is left if:

    key >= floor                            of top_n_sigma, top_k and mirostat 1
    |shift - x| as a key <= far             of typical_p
    key > cut, or key = cut and id <= tie   of top_p, min_p, mirostat 2 and a dynamic temperature below 1e-5
    key < roof, or id = stays               of XTC

Masses are integers, as in `triton_rows.py`; other sums (entropies, a standard deviation) are float64, in the order of
one program. So a row's result does not depend on the other rows, bit for bit. `chain.py` defines the rules.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.sampling.contract import LIKELIEST, Link
from candle_vllm.core.kernels.sampling.triton_draw import _limit, _min_p_floor
from candle_vllm.core.kernels.sampling.triton_rows import (
    KEY_OF_MINUS_INFINITY,
    MOST_LOGITS,
    NONE,
    WAYS,
    key_of,
    mass_of,
    value_of,
)
from candle_vllm.core.kernels.triton_build import OPTIONS

_PART = tl.constexpr(512)  # logits that a program loads at a time; not measured yet
_LIKELIEST = tl.constexpr(LIKELIEST)
_ROOM = tl.constexpr(128)  # scratch space for the likeliest logits
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_COUNT, _MASS, _NEARNESS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # KIND: what `_search` sums
_WARPS = 4  # not measured yet
_TOP_N_SIGMA, _TOP_K = tl.constexpr(Link.TOP_N_SIGMA.value), tl.constexpr(Link.TOP_K.value)
_TYPICAL_P, _TOP_P = tl.constexpr(Link.TYPICAL_P.value), tl.constexpr(Link.TOP_P.value)
_MIN_P, _XTC = tl.constexpr(Link.MIN_P.value), tl.constexpr(Link.XTC.value)
_TEMPERATURE, _LOW = tl.constexpr(Link.TEMPERATURE.value), tl.constexpr(Link.LOW.value)
_HIGH, _EXPONENT = tl.constexpr(Link.HIGH.value), tl.constexpr(Link.EXPONENT.value)
_MIROSTAT, _MU = tl.constexpr(Link.MIROSTAT.value), tl.constexpr(Link.MU.value)
_LINKS = tl.constexpr(len(Link))


@triton.jit
def _look(source, start, V, floor, shift, far, cut, tie, roof, stays):
    """Load a part of a row: ids, logits, keys, keys of the distances, and a mask of the tokens that are left."""
    at = start + tl.arange(0, _PART)
    x = tl.load(source + at, mask=at < V, other=float("-inf"))
    key = key_of(x)
    distance = key_of(tl.abs(shift - x.to(tl.float64)).to(tl.float32))
    left = (at < V) & (key >= floor) & (distance <= far)
    left = left & ((key > cut) | ((key == cut) & (at <= tie))) & ((key < roof) | (at == stays))
    return at, x, key, distance, left


@triton.jit
def _search(source, V, limit, lo, hi, largest, floor, shift, far, cut, tie, roof, stays, KIND: tl.constexpr):
    """Do what `triton_rows.search` does for the tokens that are left: find the largest key at which the sum reaches
    `limit`. Return the key and the sum above it."""
    lo, hi, above = lo.to(tl.int64), hi.to(tl.int64), limit.to(tl.int64) * 0
    way = tl.arange(0, WAYS)
    first = True
    while first | (hi - lo > 1):
        step = tl.maximum((hi - lo + WAYS - 1) // WAYS, 1)
        edges = tl.minimum(lo + (way + 1) * step, hi).to(tl.int32)
        sums = tl.zeros([WAYS], tl.int64)
        for start in tl.range(0, V, _PART):
            _at, x, key, distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
            weights = left.to(tl.int64)
            if KIND != _COUNT:
                weights = tl.where(left, mass_of(x, largest, _LOG2_E), 0)
            if KIND == _NEARNESS:
                key = -distance
            sums += tl.sum(tl.where(key[:, None] >= edges[None, :], weights[:, None], 0), axis=0)
        reached = tl.sum((sums >= limit).to(tl.int64))
        above = tl.sum(tl.where(way == reached, sums, 0))
        hi = tl.minimum(lo + (reached + 1) * step, hi)
        lo = lo + reached * step
        first = False
    return lo.to(tl.int32), above


@triton.jit
def _measure(source, V, largest, rate, floor, shift, far, cut, tie, roof, stays):
    """Return for the tokens that are left: their number, the largest logit, the integer mass, and with
    w = exp((x - largest) * rate) the sums of w and of w * ln w."""
    count, top, whole = tl.zeros([], tl.int32), tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.int64)
    mass, weighted = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    for start in tl.range(0, V, _PART):
        _at, x, _key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
        difference = tl.where(left, (x.to(tl.float64) - largest.to(tl.float64)) * rate, 0.0)
        weights = tl.where(left, tl.exp(difference), 0.0)
        count += tl.sum(left.to(tl.int32), axis=0)
        top = tl.maximum(top, tl.max(tl.where(left, x, float("-inf")), axis=0))
        whole += tl.sum(tl.where(left, mass_of(x, largest, _LOG2_E), 0), axis=0)
        mass += tl.sum(weights, axis=0)
        weighted += tl.sum(weights * difference, axis=0)
    return count, top, whole, mass, weighted


@triton.jit
def _id_of(source, V, wanted, number, floor, shift, far, cut, tie, roof, stays):
    """Return the id of the `number`th token (from 1 on) with the key `wanted`, among the tokens that are left."""
    found, seen = tl.zeros([], tl.int32) + V, tl.zeros([], tl.int64)
    for start in tl.range(0, V, _PART):
        at, _x, key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
        equal = (left & (key == wanted)).to(tl.int64)
        place = seen + tl.cumsum(equal, axis=0)
        found = tl.minimum(found, tl.min(tl.where((equal > 0) & (place == number), at, V), axis=0))
        seen += tl.sum(equal, axis=0)
    return found


@triton.jit
def _least_key(value):
    """Return the key of the smallest float32 that is at least a float64."""
    near = value.to(tl.float32)
    return key_of(near) + (near.to(tl.float64) < value).to(tl.int32)


@triton.jit
def _estimated_k(source, room, V, count, mu, rate, floor, shift, far, cut, tie, roof, stays, largest):
    """Return mirostat 1's k, see `chain._estimated_k`; `room` is scratch memory for the likeliest logits."""
    wanted = tl.minimum(count, _LIKELIEST)
    lo, hi = tl.zeros([], tl.int32) + KEY_OF_MINUS_INFINITY, key_of(largest) + 1
    last, _above = _search(source, V, wanted, lo, hi, largest, floor, shift, far, cut, tie, roof, stays, _COUNT)
    slot = tl.arange(0, _ROOM)
    tl.store(room + slot, tl.zeros([_ROOM], tl.float32) + value_of(last))
    tl.debug_barrier()
    seen = tl.zeros([], tl.int32)
    for start in tl.range(0, V, _PART):
        _at, x, key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
        hit = (left & (key > last)).to(tl.int32)
        tl.store(room + seen + tl.cumsum(hit, axis=0) - 1, x, mask=hit > 0)
        seen += tl.sum(hit, axis=0)
    tl.debug_barrier()
    likeliest = tl.load(room + slot)
    mine, other = likeliest[:, None], likeliest[None, :]
    before = (other > mine) | ((other == mine) & (slot[None, :] < slot[:, None]))
    rank = tl.sum((before & (slot < wanted)[None, :]).to(tl.int32), axis=1)
    # The sum of t_i * (x_i - x_(i+1)) equals that of x_i * (t_i - t_(i-1)), where t before the first is 0.
    step = tl.where(rank < wanted - 1, tl.log((rank + 2).to(tl.float64) / (rank + 1).to(tl.float64)), 0.0)
    earlier = tl.where(rank > 0, tl.log((rank + 1).to(tl.float64) / tl.maximum(rank, 1).to(tl.float64)), 0.0)
    there = slot < wanted
    wide = (likeliest.to(tl.float64) - largest.to(tl.float64)) * rate
    products = tl.sum(tl.where(there, wide * (step - earlier), 0.0), axis=0)
    squares = tl.sum(tl.where(there, step * step, 0.0), axis=0)
    exponent = products / tl.maximum(squares, 1e-300)
    logs = tl.log(V.to(tl.float64))
    excess = exponent - 1.0
    flat = tl.abs(excess) < 1e-9
    rest = tl.where(flat, logs, (1.0 - tl.exp(-excess * logs)) / tl.where(flat, 1.0, excess))
    logarithm = (mu * _LN_2 - tl.log(rest)) / tl.where(exponent > 0, exponent, 1.0)
    alike = tl.where(mu * _LN_2 > tl.log(V.to(tl.float64) - 1.0), logs, 0.0)
    logarithm = tl.where(exponent > 1e-12, logarithm, alike)
    k = tl.where(logarithm >= logs, V.to(tl.float64), tl.exp(tl.minimum(logarithm, logs)))
    return tl.where(count < 2, 1, tl.maximum(k.to(tl.int32), 1))


@triton.jit
def chain_kernel(
    logits,  # [R, V] fp32, rows contiguous
    rows,  # [N] int64
    links,  # [N, len(Link)] fp64
    rooms,  # [N, _ROOM] fp32
    row_stride,
    V,
):
    number = tl.program_id(0).to(tl.int64)
    source, links = logits + tl.load(rows + number) * row_stride, links + number * _LINKS
    floor = tl.zeros([], tl.int32) + (KEY_OF_MINUS_INFINITY + 1)
    bottom, beyond = floor, tl.zeros([], tl.int32) + NONE
    far, cut, tie, roof, stays = beyond, bottom, beyond, beyond, beyond
    shift = tl.zeros([], tl.float64)
    largest, broken = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.int32)
    for start in tl.range(0, V, _PART):
        at = start + tl.arange(0, _PART)
        x = tl.load(source + at, mask=at < V, other=float("-inf"))
        broken = tl.maximum(broken, tl.max((x != x).to(tl.int32), axis=0))
        largest = tl.maximum(largest, tl.max(x, axis=0))
    if (broken == 0) & (tl.abs(largest) < float("inf")):
        one = tl.full([], 1.0, tl.float64)
        sigma, top_k = tl.load(links + _TOP_N_SIGMA), tl.load(links + _TOP_K).to(tl.int64)
        typical_p, top_p, min_p = tl.load(links + _TYPICAL_P), tl.load(links + _TOP_P), tl.load(links + _MIN_P)
        threshold, temperature = tl.load(links + _XTC), tl.load(links + _TEMPERATURE)
        if sigma > 0:
            count, total, squares = tl.zeros([], tl.int32), tl.zeros([], tl.float64), tl.zeros([], tl.float64)
            for start in tl.range(0, V, _PART):
                _at, x, _key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
                difference = tl.where(left, x.to(tl.float64) - largest.to(tl.float64), 0.0)
                count += tl.sum(left.to(tl.int32), axis=0)
                total += tl.sum(difference, axis=0)
                squares += tl.sum(difference * difference, axis=0)
            mean = total / count.to(tl.float64)
            spread = tl.sqrt(tl.maximum(squares / count.to(tl.float64) - mean * mean, 0.0))
            floor = tl.maximum(floor, _least_key(largest.to(tl.float64) - sigma * spread))
        if top_k > 0:
            count, _top, _whole, _mass, _weighted = _measure(
                source, V, largest, one, floor, shift, far, cut, tie, roof, stays
            )
            wanted, hi = tl.minimum(top_k, count.to(tl.int64)), key_of(largest) + 1
            kth, _above = _search(
                source, V, wanted, bottom, hi, largest, floor, shift, far, cut, tie, roof, stays, _COUNT
            )
            floor = tl.maximum(floor, kth)
        if typical_p < 1:
            _count, _top, whole, mass, weighted = _measure(
                source, V, largest, one, floor, shift, far, cut, tie, roof, stays
            )
            shift = largest.to(tl.float64) + weighted / mass  # ln mass - entropy + largest
            lo, hi = bottom, tl.zeros([], tl.int32) + 1
            nearest, _above = _search(
                source, V, _limit(typical_p, whole), lo, hi, largest, floor, shift, far, cut, tie, roof, stays,
                _NEARNESS,
            )  # fmt: skip
            far = -nearest
            _count, largest, _whole, _mass, _weighted = _measure(
                source, V, largest, one, floor, shift, far, cut, tie, roof, stays
            )
        if top_p < 1:
            _count, _top, whole, _mass, _weighted = _measure(
                source, V, largest, one, floor, shift, far, cut, tie, roof, stays
            )
            limit, hi = _limit(top_p, whole), key_of(largest) + 1
            last, above = _search(
                source, V, limit, bottom, hi, largest, floor, shift, far, cut, tie, roof, stays, _MASS
            )
            weight = mass_of(value_of(last), largest, _LOG2_E)
            ties = (limit - above + weight - 1) // weight
            tie = _id_of(source, V, last, ties, floor, shift, far, cut, tie, roof, stays)
            cut = last
        if min_p > 0:
            least = _min_p_floor(min_p, largest, one)
            if least > cut:
                cut, tie = least, beyond
        if threshold <= 0.5:
            _count, _top, _whole, mass, _weighted = _measure(
                source, V, largest, one, floor, shift, far, cut, tie, roof, stays
            )
            bound = tl.where(threshold > 0, tl.log(tl.maximum(threshold, 1e-300) * mass), float("-inf"))
            likely, least = tl.zeros([], tl.int32), beyond
            for start in tl.range(0, V, _PART):
                _at, x, key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
                hit = left & (x.to(tl.float64) - largest.to(tl.float64) >= bound)
                likely += tl.sum(hit.to(tl.int32), axis=0)
                least = tl.minimum(least, tl.min(tl.where(hit, key, NONE), axis=0))
            if likely > 1:
                last = tl.zeros([], tl.int32) - 1
                for start in tl.range(0, V, _PART):
                    at, _x, key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
                    last = tl.maximum(last, tl.max(tl.where(left & (key == least), at, -1), axis=0))
                roof, stays = least, last
                _count, largest, _whole, _mass, _weighted = _measure(
                    source, V, largest, one, floor, shift, far, cut, tie, roof, stays
                )
        divisor = tl.zeros([], tl.float64)
        high = tl.load(links + _HIGH)
        if high > 0:
            low, exponent = tl.load(links + _LOW), tl.load(links + _EXPONENT)
            count, _top, _whole, mass, weighted = _measure(
                source, V, largest, one, floor, shift, far, cut, tie, roof, stays
            )
            temperature = one
            if count > 1:
                share = (tl.log(mass) - weighted / mass) / tl.log(count.to(tl.float64))
                share = tl.minimum(tl.maximum(share, 0.0), 1.0)
                power = tl.where(exponent > 0, tl.exp(exponent * tl.log(tl.maximum(share, 1e-300))), 1.0)
                divisor = low + (high - low) * power
                temperature = divisor
                if divisor < 1e-5:
                    divisor, temperature = one * 0.0, one * 0.0
                    tie = _id_of(
                        source, V, key_of(largest), tl.full([], 1, tl.int64), floor, shift, far, cut, tie, roof, stays
                    )
                    cut = key_of(largest)
        mirostat, mu = tl.load(links + _MIROSTAT), tl.load(links + _MU)
        if (mirostat > 0) & (temperature > 0):
            rate = 1.0 / temperature
            count, _top, _whole, mass, _weighted = _measure(
                source, V, largest, rate, floor, shift, far, cut, tie, roof, stays
            )
            if mirostat > 1:
                bound = tl.log(mass) - mu * _LN_2
                if bound > 0:
                    tie = _id_of(
                        source, V, key_of(largest), tl.full([], 1, tl.int64), floor, shift, far, cut, tie, roof, stays
                    )
                    cut = key_of(largest)
                else:
                    least = _least_key(tl.maximum(bound * temperature + largest.to(tl.float64), -3.4028234663852886e38))
                    if least > cut:
                        cut, tie = least, beyond
            else:
                k = _estimated_k(
                    source, rooms + number * _ROOM, V, count, mu, rate, floor, shift, far, cut, tie, roof, stays,
                    largest,
                )  # fmt: skip
                wanted, hi = tl.minimum(k, count).to(tl.int64), key_of(largest) + 1
                kth, _above = _search(
                    source, V, wanted, bottom, hi, largest, floor, shift, far, cut, tie, roof, stays, _COUNT
                )
                floor = tl.maximum(floor, kth)
        for start in tl.range(0, V, _PART):
            at, x, _key, _distance, left = _look(source, start, V, floor, shift, far, cut, tie, roof, stays)
            scaled = (x.to(tl.float64) - largest.to(tl.float64)) / tl.where(divisor > 0, divisor, 1.0)
            scaled = tl.maximum(scaled, -3.4028234663852886e38).to(tl.float32)
            value = tl.where(divisor > 0, scaled, x)
            tl.store(source + at, tl.where(left, value, float("-inf")), mask=at < V)


def narrow(logits: torch.Tensor, rows: torch.Tensor, links: torch.Tensor) -> None:
    """See `narrow_tensors` in the package."""
    count, vocabulary = len(rows), logits.shape[1]
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1 or vocabulary == 1, "each row is contiguous"
    assert 0 < vocabulary <= MOST_LOGITS
    assert rows.dtype == torch.int64
    assert links.shape == (count, len(Link))
    assert links.dtype == torch.float64
    assert rows.is_contiguous()
    assert links.is_contiguous()
    if count:
        rooms = torch.empty(count, _ROOM.value, dtype=torch.float32, device=logits.device)
        launch: dict[str, Any] = {"num_warps": _WARPS, **OPTIONS}
        chain_kernel[(count,)](logits, rows, links, rooms, logits.stride(0), vocabulary, **launch)
