# SPDX-License-Identifier: MIT
"""Quantise activations to 8 bits, after a prologue such as a norm or an activation function.

Contract: for x float32 [T, C], first a prologue computes y [T, K]:
    NONE         y = x, K = C
    NORM         y = RMSNorm(x) * weight, K = C (see `kernels/rms_norm`)
    LAYER_NORM   y = LayerNorm(x) * weight + bias, K = C (see `kernels/layer_norm`)
    SILU         y = silu(x[:, :K]) * x[:, K:], K = C / 2 (see `kernels/silu_mul`)
    GELU_GATE    y = gelu(x[:, :K]) * x[:, K:] in the tanh form, K = C / 2 (see `kernels/silu_mul`)
    GELU_ERF_GATE  GELU_GATE by the error function
    SILU_7, SILU_16, SILU_10   SILU with a limit (see `kernels/silu_mul`)
    SWIGLU_OAI   y = gpt-oss's activation of gate x[:, :K] and up x[:, K:], K = C / 2 (see `kernels/moe`)
    GELU_TANH, GELU, RELU, RELU2, TANH, QUICK_GELU   y = act(x), K = C (see `kernels/activation`)
Then each group of 32 adjacent elements of a row becomes 32 signed bytes q = round(y * (1 / s)), to nearest even, with
one scale s = max|y| / 127; q is 0 if s is 0. Results: q int8 [T, K], s float32 [T, K/32], and s * sum(q) float32 [T,
K/32], which weights with an offset need. The arithmetic is fp32. GGML calls this format Q8_1.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation

GROUP = 32


@dataclasses.dataclass(frozen=True)
class Groups:
    """Input format of a matrix: quantised groups of 32 columns. Matrices with equal orders share their input.

    Attributes:
        order: bytes of int64 [K]: the column of y that each column of the matrix multiplies; None for the order of y.
    """

    order: bytes | None = None


class Prologue(enum.IntEnum):
    """Function that is applied to x before it is quantised or converted."""

    NONE = 0
    NORM = 1
    SILU = 2
    LAYER_NORM = 3
    GELU_GATE = 4
    GELU_TANH = 5
    GELU = 6
    RELU = 7
    SWIGLU_OAI = 8
    TANH = 9
    QUICK_GELU = 10
    RELU2 = 11
    GELU_ERF_GATE = 12
    SILU_7 = 13
    SILU_16 = 14
    SILU_10 = 15

    @property
    def gated(self) -> bool:
        """Whether two elements of x become one; the first half of a row is the gate."""
        return self.name.startswith(("SILU", "SWIGLU")) or self.name.endswith("GATE")

    @property
    def norm(self) -> bool:
        """Whether every element of y depends on the whole row."""
        return self in (Prologue.NORM, Prologue.LAYER_NORM)


class QuantiseArguments(NamedTuple):
    """Arguments of the operation that quantises.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        columns: K, a multiple of 32.
        q, scales, sums: addresses of the results.
        weight, eps: for a norm, the address of its weight, followed by the bias of LAYER_NORM, and its epsilon.
        picked: address of int64 row numbers of x; 0 for rows 0, 1, 2, ...
        rows_from: the `StepNumber` that is the number of rows.
        rows: address to which an operation with `written` writes y too, in one of the `FLOAT_FORMS`.
    """

    x: int
    stride: int
    columns: int
    q: int
    scales: int
    sums: int
    weight: int = 0
    eps: float = 0.0
    picked: int = 0
    rows_from: int = StepNumber.TOKENS
    rows: int = 0


def quantise_operation(prologue: Prologue, written: int = 0) -> int:
    """Return the address of the compiled operation; `written`: bytes of an element of y if y is written too, else 0."""
    constants = (prologue, prologue.gated, written) if written else (prologue, prologue.gated)
    return operation("activation_quant.cpu:make_quantise", *constants)
