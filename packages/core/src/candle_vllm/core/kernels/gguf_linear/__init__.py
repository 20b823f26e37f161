# SPDX-License-Identifier: MIT
"""Linear layers and embedding rows with GGUF weights that stay quantised, on a GPU; step 6 of a request's life.

Contract: x is [T, K] bfloat16 or float16 with contiguous rows; the matrix is a `GgufMatrix` [N, K], or [V, E] for
embedding rows; bias is [N] in x's dtype, or None. y [T, N] = x W^T + bias has x's dtype and is written to new memory or
to `out`. `out` has x's dtype, contiguous rows and any row stride, so that matrices of several kinds can write to column
ranges of one tensor; it must not overlap the other arguments. Products are summed in fp32, and the result is rounded
once. With few rows, at most `SMALL` or `SMALL_WITHOUT_TENSOR_CORES`, x is multiplied by the exact codes, and the scales
are applied to the sums in fp32; with more rows, weights are first rounded to x's dtype, as in a dequantised file.

Among calls with few rows, and among calls with more, a row's result depends only on the row and the matrix, whose shape
determines how sums are split along K. With `invariant=True` on a GPU, any number of rows is multiplied by exact codes,
with identical results (see `triton.py`). On the CPU the reference then computes each row separately. Rows of an
embedding are exact except for the rounding to their dtype.

`pack` makes a `GgufMatrix` from a GGUF tensor's bytes. Tensors on the CPU are computed by `reference.py`, for tests: a
CPU engine uses `kernels/packed_linear`.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.gguf_linear import reference
from candle_vllm.core.kernels.gguf_linear.layout import GgufMatrix, stack
from candle_vllm.core.kernels.gguf_linear.pack import pack
from candle_vllm.core.kernels.linear.reference import check_out
from candle_vllm.core.kernels.triton_build import TENSOR_CORES, capability

__all__ = ["SMALL", "GgufMatrix", "embedding", "linear", "pack", "stack"]

SMALL = 64
"""Maximum number of rows with exact codes if `invariant` is False; not yet measured. The kernel for more rows does not
split K, so with few rows most of a GPU would be idle."""

SMALL_WITHOUT_TENSOR_CORES = 16
"""The same maximum if Triton uses no tensor cores: with more rows, decoding a matrix for torch's product should be as
fast. Calculated, not measured yet."""


def linear(
    x: torch.Tensor,
    matrix: GgufMatrix,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """Return x times the transpose of the matrix, plus bias; written to `out` if it is given."""
    assert x.dim() == 2
    assert x.shape[1] == matrix.columns
    check_out(out, x, matrix.rows)
    if on_gpu(x):
        from candle_vllm.core.kernels.gguf_linear import triton

        most = SMALL if capability(x.device) >= TENSOR_CORES else SMALL_WITHOUT_TENSOR_CORES
        multiply = triton.linear_exact if invariant or len(x) <= most else triton.linear
        return multiply(x, matrix, bias, out)
    return reference.linear(x, matrix, bias, out, invariant=invariant)


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of the matrix for token_ids [T], all below N: [T, K] in `dtype`."""
    if on_gpu(token_ids):
        from candle_vllm.core.kernels.gguf_linear import triton

        return triton.embedding(token_ids, matrix, dtype)
    return reference.embedding(token_ids, matrix, dtype)
