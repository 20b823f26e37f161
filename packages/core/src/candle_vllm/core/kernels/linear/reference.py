# SPDX-License-Identifier: MIT
"""Linear layer by torch's matrix products."""

from __future__ import annotations

import torch


def check_out(out: torch.Tensor | None, x: torch.Tensor, rows: int) -> None:
    """Check that products of x with a matrix of `rows` rows can be written to `out`."""
    if out is not None:
        assert out.shape == (len(x), rows)
        assert out.dtype == x.dtype
        assert out.stride(1) == 1 or rows == 1, "the elements of a row must be contiguous"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """See the contract in the package."""
    if invariant:
        rows = [torch.nn.functional.linear(row[None].clone(), weight, bias) for row in x]  # clones: equal alignment
        result = torch.cat([x.new_empty(0, len(weight)), *rows])
        return result if out is None else out.copy_(result)
    if out is None:
        return torch.nn.functional.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
