# SPDX-License-Identifier: MIT
"""RMSNorm, and RMSNorm fused with the residual addition before it.

Contract: x [T, ..., E] of any float dtype; weight [E] of any float dtype, in `rms_norm` also [N, E] for x [T, N, E]; y
has x's shape and dtype, in new memory; a recorded norm overwrites heads. The sum of squares and the scaling are fp32;
the result is rounded once. A residual has x's shape and dtype: residual + x is rounded to that dtype and normalised, as
by two kernels. The bits of a row's result do not depend on other rows.
Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


class HeadNorms(NamedTuple):
    """Weights [D] fp32 of the norms of query and key heads, and their epsilon."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rms_norm(x: Value, weight: Value, eps: float) -> Value:
    """Return x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    if isinstance(x, Recorded):
        return x.rms_norm(weight, eps)
    assert weight.shape == x.shape[-weight.ndim :]
    if on_gpu(x):
        from candle_vllm.core.kernels.rms_norm import triton

        return triton.rms_norm(x, None, weight, eps)[0]
    from candle_vllm.core.kernels.rms_norm import reference

    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Value, residual: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    """Return rms_norm(residual + x) and residual + x, in new memory; a recorded sum overwrites a computed residual."""
    if isinstance(x, Recorded):
        total = residual + x
        return total.rms_norm(weight, eps), total
    assert x.shape == residual.shape
    assert x.dtype == residual.dtype
    assert weight.shape == x.shape[-1:]
    if on_gpu(x):
        from candle_vllm.core.kernels.rms_norm import triton

        return triton.rms_norm(x, residual, weight, eps)
    from candle_vllm.core.kernels.rms_norm import reference

    return reference.add_rms_norm(x, residual, weight, eps)


# ---- recorded -------------------------------------------------------------------------------------------------------


class HeadNormArguments(NamedTuple):
    """Arguments of `cpu.make_head_norm`, which normalises the heads of rows in place.

    Attributes:
        x: address of the first head of float32 rows, `stride` floats apart. If head_dim is not a multiple of 32, up to
            31 floats after the last head may be read.
        heads, head_dim: number and size of the adjacent heads.
        weight: address of head_dim floats, or of heads * head_dim floats with `weight_step`.
        eps: epsilon of the norm.
        weight_step: bytes from one head's weights to the next; 0 if all heads share them.
        rows_from: the `StepNumber` that is the number of rows.
    """

    x: int
    stride: int
    heads: int
    head_dim: int
    weight: int
    eps: float
    weight_step: int = 0
    rows_from: int = StepNumber.TOKENS


class NormOntoArguments(NamedTuple):
    """Arguments of `cpu.make_norm_onto`, which adds normalised rows to other rows or writes them there.

    Attributes:
        x: address of the rows that are normalised, float32, `stride` floats apart; not part of `target`.
        columns: elements of a row.
        weight: address of `columns` weights; for LayerNorm `columns` biases follow.
        eps: epsilon of the norm.
        target, target_stride: address and row stride of the rows that the result is added to.
        accumulate: 0 to overwrite the target instead.
        rows_from: the `StepNumber` that is the number of rows.
    """

    x: int
    stride: int
    columns: int
    weight: int
    eps: float
    target: int
    target_stride: int
    accumulate: int = 1
    rows_from: int = StepNumber.TOKENS


def norm_rows(x: np.ndarray, weight: np.ndarray, eps: float, *, layer: bool) -> np.ndarray:
    """Normalise rows float32 [..., K] in numpy; the bias of a LayerNorm follows its weight."""
    columns = x.shape[-1]
    if layer:
        x = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
    normed = x * scale * weight[:columns]
    return normed + weight[columns:] if layer else normed
