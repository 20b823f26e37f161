# SPDX-License-Identifier: MIT
"""Ranks of tokens, and the top logits of rows, on a GPU (step 7 of a request's life): up to five launches, no sort.

    survey   finds the largest logits of chunks and of groups (`triton_rows.py`)
    edge     finds the row's largest logit, and an edge: a lower bound of the requested largest logits
    measure  finds each chunk's mass, how many of its logits rank before the token, and how many reach the edge
    gather   copies the logits that reach the edge to a short list, in the order of ids
    name     adds the chunks' results, and takes the largest logits from the list one after another

If too many logits reach the edge, as with equal logits, the largest are taken from the row itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.sampling.contract import DeviceStanding
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

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIGHEST = tl.constexpr(2**63 - 1)
_LOWEST = tl.constexpr(1 - 2**63)
_WARPS = 8  # not measured yet


@triton.jit
def edge_kernel(
    tops,  # [R] int64
    group_maxima,  # [R, C * GROUPS]
    maxima,  # [R, C]
    largest_out,  # [R] fp32
    edges,  # [R] int32
    V,
    C,
    CB: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = largest_of(maxima + row * C, C, CB)
    tl.store(largest_out + row, largest)
    top, groups = tl.minimum(tl.load(tops + row), V), C * GROUPS
    edge = NONE
    if (top > 0) & (tl.abs(largest) < float("inf")):
        edge = KEY_OF_MINUS_INFINITY
        if top <= (C - 1) * GROUPS + tl.minimum(V - (C - 1) * CHUNK, GROUPS):
            hi = key_of(largest).to(tl.int64) + 1
            lo = hi * 0 + KEY_OF_MINUS_INFINITY
            edge, _ = search(group_maxima + row * groups, groups, top, lo, hi, 0, largest, 1.0, False)
    tl.store(edges + row, edge)


@triton.jit
def measure_kernel(
    logits,  # [R, V] fp32, rows contiguous
    token_ids,  # [R] int64
    largest_in,  # [R]
    edges,  # [R]
    masses,  # [R, C] int64
    befores,  # [R, C] int32: logits that rank before the token's
    counts,  # [R, C] int32: logits that reach the edge
    row_stride,
    V,
    C,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(token_ids + row)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + at, mask=at < V, other=float("-inf"))
    chosen = tl.load(logits + row * row_stride + token)
    before = ((x > chosen) | ((x == chosen) & (at < token))) & (at < V)
    reaches = (key_of(x) >= tl.load(edges + row)) & (at < V)
    to = row * C + chunk
    tl.store(masses + to, tl.sum(mass_of(x, tl.load(largest_in + row), _LOG2_E), axis=0))
    tl.store(befores + to, tl.sum(before.to(tl.int32), axis=0))
    tl.store(counts + to, tl.sum(reaches.to(tl.int32), axis=0))


@triton.jit
def gather_top_kernel(
    logits,
    edges,
    counts,
    values,  # [R, BUFFER] fp32
    names,  # [R, BUFFER] int32
    row_stride,
    V,
    C,
    CB: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, CB)
    numbers = counts + row * C
    count = tl.sum(tl.load(numbers + part, mask=part < C, other=0), axis=0)
    if (count > 0) & (count <= BUFFER):
        source, to = logits + row * row_stride, row * BUFFER
        gather(source, chunk, V, tl.load(edges + row), numbers, C, CB, values + to, names + to)


@triton.jit(do_not_specialize=["MOST"])
def name_kernel(
    logits,
    token_ids,
    tops,
    largest_in,
    masses,
    befores,
    counts,
    values,
    names,
    offsets,  # [R] fp64
    ranks,  # [R] int64
    chosen,  # [R] fp32: the tokens' logits
    top_ids,  # [R, MOST] int64
    top_logits,  # [R, MOST] fp32
    row_stride,
    V,
    C,
    MOST,
    CB: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part, largest = tl.arange(0, CB), tl.load(largest_in + row)
    mass = tl.sum(tl.load(masses + row * C + part, mask=part < C, other=0), axis=0)
    before = tl.sum(tl.load(befores + row * C + part, mask=part < C, other=0), axis=0)
    count = tl.sum(tl.load(counts + row * C + part, mask=part < C, other=0), axis=0)
    weight = tl.maximum(mass, 1).to(tl.float64) * 1.1368683772161603e-13  # 2^-43
    sound = tl.abs(largest) < float("inf")
    tl.store(offsets + row, tl.where(sound, largest.to(tl.float64) + tl.log(weight), float("nan")))
    tl.store(ranks + row, (before + 1).to(tl.int64))
    tl.store(chosen + row, tl.load(logits + row * row_stride + tl.load(token_ids + row)))
    source, listed = logits + row * row_stride, count <= BUFFER
    if listed:
        source = values + row * BUFFER
    else:
        count = V
    previous = tl.full([], _HIGHEST, tl.int64)
    asked = tl.where(sound, tl.load(tops + row), 0)
    for place in tl.range(0, MOST):
        best = tl.full([], _LOWEST, tl.int64)
        if place < asked:
            for start in tl.range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(source + at, mask=at < count, other=float("-inf"))
                name = at
                if listed:
                    name = tl.load(names + row * BUFFER + at, mask=at < count, other=0)
                # An integer that is larger for larger logits, and among equal logits for lower ids.
                standing = (key_of(x).to(tl.int64) << 32) + (NONE - name)
                follows = (standing < previous) & (x > float("-inf"))
                best = tl.maximum(best, tl.max(tl.where(follows, standing, _LOWEST), axis=0))
        found = best > _LOWEST
        name = NONE - (best & 0xFFFFFFFF)
        tl.store(top_ids + row * MOST + place, tl.where(found, name, -1))
        logit = value_of((best >> 32).to(tl.int32))
        tl.store(top_logits + row * MOST + place, tl.where(found, logit, float("-inf")))
        previous = best


def stand(logits: torch.Tensor, token_ids: torch.Tensor, tops: torch.Tensor, most: int) -> DeviceStanding:
    """See `stand_tensors` in the package."""
    rows = rows_of(logits)
    number, device = len(logits), logits.device
    for given in (token_ids, tops):
        assert given.shape == (number,)
        assert given.dtype == torch.int64
        assert given.is_contiguous()
        assert given.device == device

    def empty(kind: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device=device)

    standing = DeviceStanding(
        offsets=empty(torch.float64, number),
        ranks=empty(torch.int64, number),
        logits=empty(torch.float32, number),
        top_ids=empty(torch.int64, number, most),
        top_logits=empty(torch.float32, number, most),
    )
    if not number:
        return standing
    largest, edges = empty(torch.float32, number), empty(torch.int32, number)
    masses = empty(torch.int64, number, rows.chunks)
    befores, counts = (empty(torch.int32, number, rows.chunks) for _ in range(2))
    values, names = empty(torch.float32, number, BUFFER.value), empty(torch.int32, number, BUFFER.value)
    shape = (logits.stride(0), logits.shape[1], rows.chunks)
    launch: dict[str, Any] = {"num_warps": _WARPS, **OPTIONS}
    found, block = (rows.group_maxima, rows.maxima, rows.firsts), rows.block
    survey_kernel[rows.grid](logits, *found, *shape, **launch)
    edge_kernel[(number,)](tops, *found[:2], largest, edges, *shape[1:], CB=block, **launch)
    measure_kernel[rows.grid](logits, token_ids, largest, edges, masses, befores, counts, *shape, **launch)
    if most:
        gather_top_kernel[rows.grid](logits, edges, counts, values, names, *shape, CB=block, **launch)
    given, lists = (logits, token_ids, tops, largest), (masses, befores, counts, values, names)
    name_kernel[(number,)](*given, *lists, *standing, *shape, most, CB=block, **launch)
    return standing
