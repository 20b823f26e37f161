# SPDX-License-Identifier: MIT
"""RMSNorm, alone and with the sum that stands before it.

Contract: x [T, ..., E] of any float dtype, weight [E] of any float dtype, or [N, E] where x is [T, N, E]; y has x's
shape and dtype, in new memory. The sum of squares and the scaling are fp32, the result is rounded once. With a residual
of x's shape and dtype, the sum of both is rounded to that dtype first, and the norm is the sum's, as if two kernels had
run. A row's result has the same bits whatever the other rows are.
Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


class HeadNorms(NamedTuple):
    """Weights [D] in fp32 of the norms of query and key heads, and their eps."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rms_norm(x: Value, weight: Value, eps: float) -> Value:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if isinstance(x, Recorded):
        return x.rms_norm(weight, eps)
    assert weight.shape == x.shape[-weight.ndim :]
    if on_gpu(x):
        from candle_vllm.core.kernels.rms_norm import triton

        return triton.rms_norm(x, weight, eps)
    from candle_vllm.core.kernels.rms_norm import reference

    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Value, residual: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    """(rms_norm(residual + x), residual + x); both in new memory, but for recorded values, which add in place."""
    if isinstance(x, Recorded):
        total = residual + x
        return total.rms_norm(weight, eps), total
    assert x.shape == residual.shape
    assert x.dtype == residual.dtype
    assert weight.shape == x.shape[-1:]
    if on_gpu(x):
        from candle_vllm.core.kernels.rms_norm import triton

        return triton.add_rms_norm(x, residual, weight, eps)
    from candle_vllm.core.kernels.rms_norm import reference

    return reference.add_rms_norm(x, residual, weight, eps)


# ---- recorded -------------------------------------------------------------------------------------------------------


class HeadNormArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of the first head of float32 rows, `stride` floats apart. Behind the last head, 31 floats may be
            read where head_dim is no multiple of 32.
        heads, head_dim: heads stand side by side.
        weight: address of head_dim floats.
        eps: of the norm.
        weight_step: bytes from one head's weights to the next; 0 where all heads have the same.
        rows_from: which of the step's numbers counts the rows.
    """

    x: int
    stride: int
    heads: int
    head_dim: int
    weight: int
    eps: float
    weight_step: int = 0
    rows_from: int = StepNumber.TOKENS


def head_norm_operation(layer: bool = False) -> int:
    """Address of the compiled operation."""
    return operation("rms_norm.cpu:make_head_norm", layer)


class NormOntoArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart, whose norms are taken; not part of `target`.
        columns: of a row.
        weight: address of as many floats, behind which LayerNorm has its bias.
        eps: of the norm.
        target, target_stride: the rows that are added to.
        accumulate: 0 where the norms are written there instead.
        rows_from: which of the step's numbers counts the rows.
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


def norm_onto_operation(layer: bool = False) -> int:
    """Address of the compiled operation."""
    return operation("rms_norm.cpu:make_norm_onto", layer)


def norm_rows(x: np.ndarray, weight: np.ndarray, eps: float, *, layer: bool) -> np.ndarray:
    """The norm of a step's last rows, float32 [..., K], in numpy; the bias of a LayerNorm stands behind its weight."""
    columns = x.shape[-1]
    if layer:
        x = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
    normed = x * scale * weight[:columns]
    return normed + weight[columns:] if layer else normed
