# SPDX-License-Identifier: MIT
"""Linear layers whose weights are codes of 4 or 8 bits in groups, on a GPU; step 6 of a request's life.

What files of GPTQ, AWQ and compressed-tensors hold once they are unpacked: a weight is scale * (code - zero), and the
weights of a row share a scale, and where there are any a zero, by groups of 32 or a multiple along K, or all of them.
FP8's codes are floats, e4m3 or e5m2, and a weight is scale * float; NVFP4's are e2m1, and a weight is scale * (scale of
16 * float). Scales are fp32, those of 16 e4m3. Infinite and NaN weights make the products that IEEE 754 says, but
infinite scales NaN where K fills no whole step.

Groups of inputs that are no neighbours (activation order) are brought together at load, and x likewise before each
product (`GroupMatrix.order`).

Contract: x [T, K] bfloat16 or float16, its rows contiguous; a `GroupMatrix` [N, K]; bias [N] of x's dtype or None.
y [T, N] = x W^T + bias has x's dtype, in new memory or in `out`: x's dtype, shape [T, N], the numbers of a row behind
each other, rows any distance apart; it shares no memory with the others. Products of x with the weights are summed in
fp32 and the result is rounded once. With up to `SMALL` rows the codes meet x exactly and scales are applied to sums in
fp32 (those of 16 meet the floats, exactly); with more, weights are rounded to x's dtype first.

A row's result depends on the row and the matrix alone, up to `SMALL` rows, and likewise above; `invariant=True`
promises that its bits are the same for any number of rows. Tensors on the CPU are computed by `reference.py`, for
tests.
Source: Frantar et al., 2022, arXiv:2210.17323; Lin et al., 2023, arXiv:2306.00978; Micikevicius et al., 2022,
arXiv:2209.05433; NVIDIA's modelopt.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.group_linear import reference
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, stack
from candle_vllm.core.kernels.group_linear.pack import from_codes, pack
from candle_vllm.core.kernels.group_linear.pack_floats import check_span, pack_floats

__all__ = ["SMALL", "GroupMatrix", "check_span", "from_codes", "linear", "pack", "pack_floats", "stack"]

SMALL = 16
"""Most rows for which codes are kept exact where invariance is not asked for."""


def linear(
    x: torch.Tensor,
    matrix: GroupMatrix,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """x times the transpose of the matrix, plus bias."""
    assert x.dim() == 2
    assert x.shape[1] == matrix.columns
    if matrix.order is not None:
        x = x.index_select(1, matrix.order)
    if on_gpu(x):
        from candle_vllm.core.kernels.group_linear import triton

        multiply = triton.linear_exact if invariant or len(x) <= SMALL else triton.linear
        return multiply(x, matrix, bias, out)
    return reference.linear(x, matrix, bias, out)
