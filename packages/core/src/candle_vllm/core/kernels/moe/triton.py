# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Mixture of experts on a GPU (step 6 of a request's life): gate and up with the activation, down, and the sum.

With few pairs of token and expert that is three launches, with many four or five: the pairs are sorted first. Every
pair's result is written on its own and added in the order of the token's experts, so that nothing depends on which
program comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.moe.arguments import Activation, Biases, Experts, MoeSizes
from candle_vllm.core.kernels.moe.triton_experts import block_tokens, few, many
from candle_vllm.core.kernels.moe.triton_sort import sort_pairs
from candle_vllm.core.kernels.triton_build import OPTIONS, Build, cdiv

_PART = 1024  # numbers of a program of the sum; not measured yet


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


def moe(
    x: torch.Tensor,
    gate_up: Experts,
    down: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    sizes: MoeSizes,
    activation: Activation,
    biases: Biases | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """See the contract in the package."""
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert x.stride(1) == 1 or sizes.hidden == 1, "the numbers of a row lie behind each other"
    assert experts.is_contiguous()
    assert weights.is_contiguous()
    assert experts.device == weights.device == x.device
    y = torch.empty((sizes.tokens, sizes.hidden), dtype=x.dtype, device=x.device)
    if not sizes.tokens:
        return y
    inner = torch.empty((sizes.pairs, sizes.inner), dtype=x.dtype, device=x.device)
    results = torch.empty((sizes.pairs, sizes.hidden), dtype=x.dtype, device=x.device)
    first, second = (None, None) if biases is None else biases
    products = ((x, gate_up, first, inner, activation), (inner, down, second, results, None))
    if sizes.few and not invariant:
        for source, matrix, bias, out, gate in products:
            few(source, matrix, bias, experts, out, sizes, gate)
    else:
        block = block_tokens(sizes)
        blocks = sort_pairs(experts, sizes, block)
        for source, matrix, bias, out, gate in products:
            many(source, matrix, bias, blocks, out, sizes, gate)
    grid = (sizes.tokens, cdiv(sizes.hidden, _PART))
    constants = {"TOP": sizes.top_k, "BLOCK": _PART}
    sum_kernel[grid](results, weights, experts, y, sizes.experts, sizes.hidden, **constants, num_warps=4, **OPTIONS)
    return y


def _build(dtype: str, top_k: int) -> Build:
    types = {"results": f"*{dtype}", "weights": "*fp32", "experts": "*i32", "y": f"*{dtype}", "X": "i32", "E": "i32"}
    return Build(sum_kernel, types, {"TOP": top_k, "BLOCK": _PART}, aligned=("E",), label=f"{dtype}-{top_k}")


AOT = (_build("bf16", 8), _build("fp16", 2))
