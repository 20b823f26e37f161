# SPDX-License-Identifier: MIT
"""Multiply by an activated gate: the gates of SwiGLU and GeGLU, and gates of an attention layer's result.

Contract of `gate_mul`: x [T, 2F] of any float dtype has the columns of gate, then of up; y [T, F] = act(gate) * up has
x's dtype, in new memory; the arithmetic is fp32. act is SiLU, or GELU in its tanh form (gelu_tanh): 0.5 g (1 + tanh(
sqrt(2 / pi) (g + 0.044715 g^3))), or GELU by the error function (gelu): g Phi(g). "silu_7" and "silu_16" have a limit
l: y is min(silu(gate), l) * min(max(up, -l), l), as in Step 3.5. "silu_10" has its limit before SiLU, as in DeepSeek
V4: y is silu(min(gate, 10)) * min(max(up, -10), 10). "swiglu_oai", of gpt-oss, is (up + 1) * gate * sigmoid(1.702
gate), with gate at most 7 and up within [-7, 7].
`gated` has x [T, F] and gate [T, H] as separate arguments, and each gate belongs to F / H adjacent columns:
y = x * act(gate), where act is SiLU, GELU in its tanh form, the sigmoid or softplus. Recorded steps overwrite x. The
elements of a row are contiguous; rows may have any stride.
Source: Shazeer, 2020, arXiv:2002.05202; Hendrycks and Gimpel, 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import GateKind, Recorded, Value

GATES: Mapping[GateKind, Prologue] = MappingProxyType({
    "silu": Prologue.SILU, "gelu_tanh": Prologue.GELU_GATE, "gelu": Prologue.GELU_ERF_GATE,
    "silu_7": Prologue.SILU_7, "silu_16": Prologue.SILU_16, "silu_10": Prologue.SILU_10,
    "swiglu_oai": Prologue.SWIGLU_OAI,
})  # fmt: skip
"""Prologue by which recorded steps compute `gate_mul`."""


def gate_mul(x: Value, kind: GateKind) -> Value:
    """Return act(x[:, :F]) * x[:, F:] for a kind in `GATES`; on a GPU, torch's own kernels compute "gelu"."""
    if isinstance(x, Recorded):
        return x.gate_mul(kind)
    assert x.dim() == 2
    assert x.shape[1] % 2 == 0
    if on_gpu(x) and kind != "gelu":
        from candle_vllm.core.kernels.silu_mul import triton

        gate, up = x.chunk(2, 1)
        return triton.gated(up, gate, kind)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.gate_mul(x, kind)


def gated(x: Value, gate: Value, kind: GateKind) -> Value:
    """Return x * act(gate)."""
    if isinstance(x, Recorded):
        return x.gated(gate, kind)
    assert x.shape[1] % gate.shape[1] == 0
    assert x.dtype == gate.dtype
    if on_gpu(x):
        from candle_vllm.core.kernels.silu_mul import triton

        return triton.gated(x, gate, kind)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.gated(x, gate, kind)


# ---- recorded -------------------------------------------------------------------------------------------------------


class GatedRowsArguments(NamedTuple):
    """Arguments of the operation for `gated` and `Recorded.xielu`.

    Attributes:
        x: address of float32 rows, `stride` floats apart, which are overwritten.
        columns: F.
        gate, gate_stride: address and row stride of the gates; for xielu the address of its three parameters.
        span: number of columns that share a gate.
        picked: address of the int64 row numbers of the gates; 0 for rows 0, 1, 2, ...
        rows_from: the `StepNumber` that is T.
    """

    x: int
    stride: int
    columns: int
    gate: int
    gate_stride: int
    span: int = 1
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def gated_rows_operation(kind: str, *, spread: bool) -> int:
    """Return the address of the compiled operation; with `spread` a gate belongs to several columns."""
    kinds = ("sigmoid", "silu", "gelu_tanh", "softplus", "xielu")
    return operation("silu_mul.cpu:make_gated_rows", kinds.index(kind), spread)
