# SPDX-License-Identifier: MIT
"""Quantising activations to 8 bits, with what comes right before it.

Contract: x float32 [T, C]; first a prologue makes y [T, K]:
    NONE         y = x, K = C
    NORM         y = RMSNorm(x) * weight, K = C (see `kernels/rms_norm`)
    LAYER_NORM   y = LayerNorm(x) * weight + bias, K = C (see `kernels/layer_norm`)
    SILU         y = silu(x[:, :K]) * x[:, K:], K = C / 2 (see `kernels/silu_mul`)
    GELU_GATE    y = gelu(x[:, :K]) * x[:, K:] in the tanh form, K = C / 2 (the same)
    GELU_ERF_GATE  the same by the error function
    SILU_7, SILU_16   SILU with a limit, see the same
    SWIGLU_OAI   y = gpt-oss's act(x[:, :K], x[:, K:]), K = C / 2 (see `kernels/moe`)
    GELU_TANH, GELU, RELU, RELU2, TANH, QUICK_GELU   y = act(x), K = C (see `kernels/activation`)
then every group of 32 neighbours of a row becomes 32 signed bytes q with one scale s = max|y| / 127 (q is 0 where s is)
and q = round(y / s) to nearest even. Results: q int8 [T, K], s float32 [T, K/32], and s * sum(q) float32 [T, K/32],
which weights with an offset need. All in fp32. This is the step that GGML calls Q8_1.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation

GROUP = 32


@dataclasses.dataclass(frozen=True)
class Groups:
    """The result as a form in which matrices read their input; equal orders are one form.

    Attributes:
        order: the columns' numbers in an order of their own, the bytes of int64 [K]; None where they are not moved.
    """

    order: bytes | None = None


class Prologue(enum.IntEnum):
    """What is computed on the way."""

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

    @property
    def gated(self) -> bool:
        """Two numbers become one: the gate's half of a row stands before the other."""
        return self.name.startswith(("SILU", "SWIGLU")) or self.name.endswith("GATE")

    @property
    def norm(self) -> bool:
        """Every number depends on the whole row."""
        return self in (Prologue.NORM, Prologue.LAYER_NORM)


class QuantiseArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        columns: K, a multiple of 32.
        q, scales, sums: addresses of the results.
        weight, eps: of a norm; the weight's address, behind which LAYER_NORM has its bias.
        picked: address of int64 row numbers of x; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers counts the rows.
        rows: where y itself goes too, as `kernels/activation_rows` has it, of the operation that writes it.
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
    """Address of the compiled operation; `written` are the bytes of a number of y, where it is written too."""
    constants = (prologue, prologue.gated, written) if written else (prologue, prologue.gated)
    return operation("activation_quant.cpu:make_quantise", *constants)
