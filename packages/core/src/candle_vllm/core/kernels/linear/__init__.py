# SPDX-License-Identifier: MIT
"""Linear layer with an unquantised weight; step 6 of a request's life.

Contract: x [T, I] and weight [O, I] have one float dtype, and bias [O] has the same dtype or is None. The result
y [T, O] = x weight^T + bias has x's dtype, in new memory or in `out`. `out` [T, O] has x's dtype, contiguous rows and
any row stride, so that several layers can write to column ranges of one tensor, and shares no memory with the inputs.
Sums are at least fp32, except that cuBLAS, which multiplies without `invariant` on a GPU, may add partial sums in x's
dtype. On a GPU the rows of x and of the weight are contiguous, and so is the bias.

With `invariant=True` on a GPU, a row's bits depend on this row, weight and bias alone: not on T, other rows, `out` or
strides (`triton.py` names the assumptions), for float32, bfloat16 and float16. On the CPU, it multiplies row by row.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.linear import reference

OWN_ROWS = 0
"""Maximum number of rows for the Triton kernel without `invariant`. 0 until it is measured against cuBLAS."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """Return x times the transpose of weight, plus bias; written to `out` if it is given."""
    assert x.shape[-1] == weight.shape[1]
    reference.check_out(out, x, len(weight))
    if on_gpu(x) and (invariant or len(x) <= OWN_ROWS):
        from candle_vllm.core.kernels.linear import triton

        return triton.linear(x, weight, bias, out=out, invariant=invariant)
    return reference.linear(x, weight, bias, out, invariant=invariant)
