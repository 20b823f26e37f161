# SPDX-License-Identifier: MIT
"""Linear layers whose weights are codes of 4 or 8 bits in groups, on a GPU; step 6 of a request's life.

Files of GPTQ, AWQ and compressed-tensors have such weights: a weight is scale * (code - zero). A **group** of adjacent
weights of a row shares a scale, and perhaps a zero. It is the whole row, or a multiple of 32 columns; the last group of
floats may be shorter. FP8's codes are floats, e4m3 or e5m2, and a weight is scale * float. NVFP4's codes are e2m1, and
a weight is scale * (inner scale * float) with an inner scale (e4m3) for each 16 weights. Scales of floats are fp32. NaN
weights, and infinities of e5m2, act as in IEEE 754; infinite scales may give infinity for NaN, or NaN for infinity.

If the inputs of a group are not adjacent (activation order), the columns are reordered at load, and x before each
product (`GroupMatrix.order`).

Contract: x is [T, K] bfloat16 or float16 with contiguous rows; the matrix is a `GroupMatrix` [N, K]; bias is [N] in x's
dtype, or None. y [T, N] = x W^T + bias has x's dtype and is written to new memory or to `out`. `out` [T, N] has x's
dtype, contiguous rows and any row stride, and must not overlap the other arguments. Products are summed in fp32, and
the result is rounded once. With at most `SMALL` rows, or `invariant`, x is multiplied by the exact codes, and the sums
by scales in fp32 (floats by inner scales, exactly). Otherwise weights are first rounded to x's dtype.

Among calls with at most `SMALL` rows, and among calls with more, a row's result depends only on the row and the matrix;
with `invariant=True` it has the same bits for any number of rows. Tensors on the CPU are computed by `reference.py`,
for tests. Source: Frantar et al., 2022, arXiv:2210.17323; Lin et al., 2023, arXiv:2306.00978; Micikevicius et al.,
2022, arXiv:2209.05433; NVIDIA's modelopt.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.group_linear import reference
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, stack
from candle_vllm.core.kernels.group_linear.pack import check_span, from_codes, pack, pack_floats

__all__ = ["SMALL", "GroupMatrix", "check_span", "from_codes", "linear", "pack", "pack_floats", "stack"]

SMALL = 16
"""Maximum number of rows that are multiplied by exact codes if `invariant` is False."""


def linear(
    x: torch.Tensor,
    matrix: GroupMatrix,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """Return x times the transpose of the matrix, plus bias; written to `out` if it is given."""
    assert x.dim() == 2
    assert x.shape[1] == matrix.columns
    if matrix.order is not None:
        x = x.index_select(1, matrix.order)
    if on_gpu(x):
        from candle_vllm.core.kernels.group_linear import triton

        multiply = triton.linear_exact if invariant or len(x) <= SMALL else triton.linear
        return multiply(x, matrix, bias, out)
    return reference.linear(x, matrix, bias, out)
