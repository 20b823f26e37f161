# SPDX-License-Identifier: MIT
"""Mixture of experts on a GPU (step 6 of a request's life): gate and up with the activation, down, and the sum.

With few pairs there are three launches; with many four or five, because the pairs are sorted first. Every pair's result
is written separately, and results are added in the order of the token's experts, so no bit depends on the order of
programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.matrices import DeviceMatrix
from candle_vllm.core.kernels.moe.arguments import FEW, Activation, Pairs, is_gated
from candle_vllm.core.kernels.moe.triton_experts import block_tokens, product
from candle_vllm.core.kernels.moe.triton_sort import sort_pairs
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv

_PART = 1024  # elements of a program of the sum; not measured yet


@triton.jit
def sum_kernel(
    results,  # [T, TOP, E]
    weights,  # [T, TOP]
    experts,  # [T, TOP]
    y,  # [T, E]
    X,
    E,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < E
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP):
        pair = token * TOP + j + tl.arange(0, 1)
        expert = tl.load(experts + pair)
        valid = (expert >= 0) & (expert < X)
        weight = tl.load(weights + pair, mask=valid, other=0.0)
        part = tl.load(results + pair * E + at, mask=inside & valid, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(y + token * E + at, total.to(y.dtype.element_ty), mask=inside)


def expert_linear(
    x: torch.Tensor,
    matrix: DeviceMatrix,
    pairs: Pairs,
    bias: torch.Tensor | None,
    activation: Activation | None,
    invariant: bool,
) -> torch.Tensor:
    """See the contract in the package. Results have a row for each pair, or, for many pairs with an activation, for
    each place."""
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert x.stride(1) == 1 or x.shape[1] == 1, "the elements of a row must be contiguous"
    assert pairs.experts.is_contiguous()
    assert pairs.experts.device == x.device
    rows = matrix.rows // pairs.count // (2 if is_gated(activation) else 1)
    out = torch.empty((pairs.number, rows), dtype=x.dtype, device=x.device)
    if pairs.tokens:
        few = pairs.number <= FEW and not invariant
        if not few and pairs.blocks is None:
            pairs.blocks = sort_pairs(pairs, block_tokens(pairs))
        product(x, matrix, bias, pairs, None if few else pairs.blocks, out, activation)
    return out


def combine(results: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """See the contract in the package."""
    weights, experts, width = pairs.weights, pairs.experts, results.shape[1]
    assert weights.is_contiguous()
    assert weights.device == results.device
    y = torch.empty((pairs.tokens, width), dtype=results.dtype, device=results.device)
    if pairs.tokens:
        constants = {"TOP": pairs.top_k, "BLOCK": _PART}
        grid = (pairs.tokens, cdiv(width, _PART))
        sum_kernel[grid](results, weights, experts, y, pairs.count, width, **constants, num_warps=4, **OPTIONS)
    return y
