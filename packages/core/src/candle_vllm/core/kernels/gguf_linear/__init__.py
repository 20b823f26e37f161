# SPDX-License-Identifier: MIT
"""Linear layers and embedding rows with GGUF weights that stay quantised, on a GPU; step 6 of a request's life.

Contract: x [T, K] bfloat16 or float16, its rows contiguous; a `GgufMatrix` [N, K], or [V, E] for embedding rows; bias
[N] of x's dtype or None. y [T, N] = x W^T + bias has x's dtype, in new memory or in `out`: x's dtype, shape [T, N], the
numbers of a row behind each other, rows any distance apart, so that matrices of several kinds write side by side into
one tensor; it shares no memory with the others. Products of x with the weights are summed in fp32 and the result is
rounded once. With up to `SMALL` rows the codes meet x exactly and scales are applied to sums in fp32; with more,
weights are rounded to x's dtype first, as a dequantised file's would be.

A row's result depends on the row and the matrix alone, up to `SMALL` rows, and likewise above: sums are cut along K
by the matrix's shape. `invariant=True` promises on a GPU that its bits are the same for any number of rows: codes are
exact for all of them (`triton.py` says why, and what the promise stands on). On the CPU the reference makes each
row by itself. Rows of an embedding are exact up to the rounding to their dtype.

`pack` makes a `GgufMatrix` from a GGUF tensor's bytes. Tensors on the CPU are computed by `reference.py`, for tests: a
CPU engine uses `kernels/packed_linear`.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.gguf_linear import reference
from candle_vllm.core.kernels.gguf_linear.layout import GgufMatrix, stack
from candle_vllm.core.kernels.gguf_linear.pack import pack
from candle_vllm.core.kernels.triton_build import TENSOR_CORES, capability

__all__ = ["SMALL", "GgufMatrix", "embedding", "linear", "pack", "stack"]

SMALL = 64
"""Most rows for which codes are kept exact where invariance is not asked for; not yet measured. The kernel for more
rows does not cut K, so with so few it leaves most of a GPU idle."""

SMALL_WITHOUT_TENSOR_CORES = 16
"""The same where Triton uses no tensor cores: by arithmetic, decoding a matrix for torch's product is as fast from
there on. Not measured yet."""


def linear(
    x: torch.Tensor,
    matrix: GgufMatrix,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """x times the transpose of the matrix, plus bias; `out` where it is given."""
    assert x.dim() == 2
    assert x.shape[1] == matrix.columns
    if out is not None:
        assert out.shape == (len(x), matrix.rows)
        assert out.dtype == x.dtype
        assert out.stride(1) == 1 or matrix.rows == 1, "the numbers of a row lie behind each other"
    if on_gpu(x):
        from candle_vllm.core.kernels.gguf_linear import triton

        most = SMALL if capability(x.device) >= TENSOR_CORES else SMALL_WITHOUT_TENSOR_CORES
        multiply = triton.linear_exact if invariant or len(x) <= most else triton.linear
        return multiply(x, matrix, bias, out)
    if invariant:
        return reference.linear_row_by_row(x, matrix, bias, out)
    return reference.linear(x, matrix, bias, out)


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The rows of the matrix for token_ids [T], below N: [T, K] of `dtype`."""
    if on_gpu(token_ids):
        from candle_vllm.core.kernels.gguf_linear import triton

        return triton.embedding(token_ids, matrix, dtype)
    return reference.embedding(token_ids, matrix, dtype)
