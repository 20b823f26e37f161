# SPDX-License-Identifier: MIT
"""Activation-and-multiply: the gates of SwiGLU and GeGLU, and those of what an attention layer gives.

Contract: x [T, 2F] holds gate then up, of any float dtype; y [T, F] = act(gate) * up has x's dtype, in new memory; the
arithmetic is fp32. act is SiLU, or GELU in its tanh form: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))), or GELU by
the error function: g Phi(g).
`gated` takes x [T, F] and its gate [T, F] apart: y = x * act(gate), where act is SiLU, GELU in its tanh form, or the
sigmoid. Recorded steps do so in place: x is changed. The elements of a row lie next to each other, rows any distance
apart.
Source: Shazeer, 2020, arXiv:2002.05202; Hendrycks and Gimpel, 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import GateKind, Recorded, Value

if TYPE_CHECKING:
    import torch


def silu_mul(x: Value) -> Value:
    """silu(x[:, :F]) * x[:, F:]."""
    if isinstance(x, Recorded):
        return x.silu_mul()
    _check(x)
    if on_gpu(x):
        from candle_vllm.core.kernels.silu_mul import triton

        return triton.silu_mul(x)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.silu_mul(x)


def gelu_tanh_mul(x: Value) -> Value:
    """gelu(x[:, :F]) * x[:, F:]."""
    if isinstance(x, Recorded):
        return x.gelu_tanh_mul()
    _check(x)
    if on_gpu(x):
        from candle_vllm.core.kernels.silu_mul import triton

        return triton.gelu_tanh_mul(x)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.gelu_tanh_mul(x)


def gelu_mul(x: Value) -> Value:
    """gelu(x[:, :F]) * x[:, F:] by the error function; on a GPU by torch's own kernels."""
    if isinstance(x, Recorded):
        return x.gelu_mul()
    _check(x)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.gelu_mul(x)


def gated(x: Value, gate: Value, kind: GateKind) -> Value:
    """x * act(gate)."""
    if isinstance(x, Recorded):
        return x.gated(gate, kind)
    assert x.shape == gate.shape
    assert x.dtype == gate.dtype
    if on_gpu(x):
        from candle_vllm.core.kernels.silu_mul import triton

        return triton.gated(x, gate, kind)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.gated(x, gate, kind)


def _check(x: torch.Tensor) -> None:
    assert x.dim() == 2
    assert x.shape[1] % 2 == 0


# ---- recorded -------------------------------------------------------------------------------------------------------


class GatedRowsArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart, which are changed.
        columns: F.
        gate, gate_stride: the same of the gates.
        picked: address of int64 row numbers, of which the gates are taken; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers is T.
    """

    x: int
    stride: int
    columns: int
    gate: int
    gate_stride: int
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def gated_rows_operation(kind: GateKind) -> int:
    """Address of the compiled operation."""
    return operation("silu_mul.cpu:make_gated_rows", ("sigmoid", "silu", "gelu_tanh").index(kind))
