# SPDX-License-Identifier: MIT
"""Multiply each head by its own matrix on a GPU, so that a token's bits do not depend on the rest of the step.

A program computes some elements of one head for a tile of tokens. Tiles have the same size for any number of tokens,
and a sum always runs over the columns in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv

_TOKENS, _OUTPUTS = 16, 64  # tokens and outputs of a program; not measured yet


@triton.jit(do_not_specialize=["tokens"])
def head_linear_kernel(
    x,  # [T, H, I]
    weight,  # [H, O, I] contiguous
    y,  # [T, H, O] contiguous
    tokens,
    x_token,  # strides
    x_head,
    H: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    head = tl.program_id(0) % H
    token = (tl.program_id(0) // H).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    matrix = weight + head.to(tl.int64) * (OUT * IN)
    sums = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, IN, BLOCK_I):
        at = start + tl.arange(0, BLOCK_I)
        inside = at[None, :] < IN
        rows = tl.load(
            x + token[:, None] * x_token + head * x_head + at[None, :],
            mask=(token < tokens)[:, None] & inside,
            other=0.0,
        )
        columns = tl.load(matrix + output[:, None] * IN + at[None, :], mask=(output < OUT)[:, None] & inside, other=0.0)
        sums = tl.dot(rows, tl.trans(columns), sums, input_precision="ieee")
    target = y + (token[:, None] * H + head) * OUT + output[None, :]
    tl.store(target, sums.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (output < OUT)[None, :])


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    tokens, heads, _ = x.shape
    outputs = weight.shape[1]
    assert x.stride(2) == 1
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    assert x.device == weight.device
    y = torch.empty(tokens, heads, outputs, dtype=x.dtype, device=x.device)
    if tokens:
        grid = (cdiv(tokens, _TOKENS) * heads, cdiv(outputs, _OUTPUTS))
        sizes = _constants(heads, x.shape[2], outputs, x.element_size())
        head_linear_kernel[grid](x, weight, y, tokens, *x.stride()[:2], **sizes, num_warps=4, **OPTIONS)
    return y


def _constants(heads: int, inputs: int, outputs: int, bytes_per_number: int) -> dict[str, Any]:
    sizes = {"H": heads, "IN": inputs, "OUT": outputs}
    return {**sizes, "BLOCK_T": _TOKENS, "BLOCK_O": _OUTPUTS, "BLOCK_I": 32 if bytes_per_number == 4 else 64}
