# SPDX-License-Identifier: MIT
"""Choose a token's experts on a GPU (step 6 of a request's life). A program holds one token's logits in registers.

An expert is chosen by the maximum of integers that have the value in the high bits and 0xFFFF less the index in the low
bits, so one reduction finds both, and equal values give the lowest index. Experts that are not candidates have a lower
integer.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.moe.arguments import LEAST_SUM, Routing, Scoring
from candle_vllm.core.kernels.triton_build import OPTIONS, next_power_of_2


@triton.jit
def _ordered(values, places):
    """Return int64 in the order of the values, and of falling indices for equal ones; NaN counts as -infinity."""
    values = tl.where(values == 0.0, 0.0, values)  # -0 is 0
    values = tl.where(values == values, values, float("-inf"))
    bits = values.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 16) | (0xFFFF - places)


@triton.jit
def _place(key):
    return (0xFFFF - (key & 0xFFFF)).to(tl.int32)


@triton.jit(do_not_specialize=["scale"])
def route_kernel(
    logits,  # [T, X], rows contiguous
    bias,  # [X]
    expert_scale,  # [X] fp32, or None
    weights,  # [T, K] contiguous
    experts,  # [T, K] contiguous
    stride,  # elements from a token to the next
    scale,
    X: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORING: tl.constexpr,  # index in `Scoring`
    BIAS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    LEAST: tl.constexpr,
    G: tl.constexpr,  # GROUPS, rounded up to a power of two
    M: tl.constexpr,  # experts of a group, rounded up to a power of two
    SLOTS: tl.constexpr,  # K, rounded up to a power of two
):
    SIZE: tl.constexpr = X // GROUPS
    NONE: tl.constexpr = -(1 << 62)  # below every key
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, G)[:, None]
    member = tl.arange(0, M)[None, :]
    expert = group * SIZE + member
    there = (group < GROUPS) & (member < SIZE)
    values = tl.load(logits + token * stride + expert, mask=there, other=float("-inf")).to(tl.float32)
    if SCORING == 3:
        small = tl.exp(-tl.abs(values))
        whole = 1.0 + small  # its logarithm lacks what this sum rounds off
        scores = tl.sqrt(tl.maximum(values, 0.0) + tl.log(whole) + (small - (whole - 1.0)) / whole)
    elif SCORING == 1:
        scores = 1.0 / (1.0 + tl.exp(-values))
    else:
        above = tl.exp(values - tl.max(tl.max(values, 1), 0))
        scores = above / tl.sum(tl.sum(above, 1), 0)
    choice = values
    if BIAS:
        choice = scores + tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
    keys = tl.where(there, _ordered(choice, expert), NONE)
    if GROUPS > 1:
        best = tl.max(keys, 1)
        worth = tl.max(tl.where(keys == best[:, None], choice, float("-inf")), 1)
        if BIAS:
            second = tl.max(tl.where(keys == best[:, None], NONE, keys), 1)
            worth += tl.max(tl.where(keys == second[:, None], choice, float("-inf")), 1)
        numbers = tl.arange(0, G)
        ranks = tl.where(numbers < GROUPS, _ordered(worth, numbers), NONE)
        chosen = tl.zeros((G,), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            first = tl.max(ranks, 0)
            chosen = tl.where(ranks == first, 1, chosen)
            ranks = tl.where(ranks == first, NONE, ranks)
        keys = tl.where(chosen[:, None] == 1, keys, NONE)
    slot = tl.arange(0, SLOTS)
    found = tl.zeros((SLOTS,), tl.float32)
    places = tl.zeros((SLOTS,), tl.int32)
    for j in tl.range(0, K):
        first = tl.max(tl.max(keys, 1), 0)
        here = keys == first
        score = tl.sum(tl.sum(tl.where(here, scores, 0.0), 1), 0)
        found = tl.where(slot == j, score, found)
        places = tl.where(slot == j, _place(first), places)
        keys = tl.where(here, NONE, keys)
    if RENORMALISE:
        found = found / (tl.sum(found, 0) + LEAST)
    found *= scale
    if expert_scale is not None:  # torch would index by `experts`, which `compile_together` does not write
        found *= tl.load(expert_scale + places)
    tl.store(weights + token * K + slot, found, mask=slot < K)
    tl.store(experts + token * K + slot, places, mask=slot < K)


def route(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and experts [T, k]; see the contract in the package."""
    top_k, bias, groups = routing.top_k, routing.bias, (routing.groups, routing.top_groups)
    tokens, count = logits.shape
    assert logits.stride(1) == 1 or count == 1, "the elements of a row must be contiguous"
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    for each in (bias, routing.expert_scale):
        assert each is None or (each.is_contiguous() and each.device == logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        scoring = get_args(Scoring).index(routing.scoring)
        constants = _constants(count, top_k, groups, scoring, bias is not None, routing.renormalise)
        arguments = (logits, bias, routing.expert_scale, weights, experts, logits.stride(0), routing.scale)
        route_kernel[(tokens,)](*arguments, **constants, num_warps=_warps(constants), **OPTIONS)
    return weights, experts


def _constants(
    experts: int, top_k: int, groups: tuple[int, int], scoring: int, bias: bool, renormalise: bool
) -> dict[str, Any]:
    return {
        "X": experts,
        "K": top_k,
        "GROUPS": groups[0],
        "TOP_GROUPS": groups[1],
        "SCORING": scoring,
        "BIAS": bias,
        "RENORMALISE": renormalise,
        "LEAST": LEAST_SUM,
        "G": next_power_of_2(groups[0]),
        "M": next_power_of_2(experts // groups[0]),
        "SLOTS": next_power_of_2(top_k),
    }


def _warps(constants: dict[str, Any]) -> int:
    """Return the number of warps: one for each 512 padded experts; one needs no barriers. Not measured yet."""
    return max(1, constants["G"] * constants["M"] // 512)
