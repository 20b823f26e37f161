"""RMSNorm, alone and with the sum that stands before it.

Contract: x [T, ..., E] of any float dtype, weight [E] of any float dtype; y has x's shape and dtype, in new memory. The
sum of squares and the scaling are fp32, the result is rounded once. With a residual of x's shape and dtype, the sum of
both is rounded to that dtype first, and the norm is the sum's, as if two kernels had run. A row's result has the same
bits whatever the other rows are. Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
    assert weight.shape == x.shape[-1:]
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
