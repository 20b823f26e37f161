# SPDX-License-Identifier: MIT
"""Scaling, soft-capping and clamping rows in place: embeddings times a factor, logits that end in c tanh(z / c).

Contract: x [T, N] float32 (without a cap any float dtype) becomes x * scale, and with a cap c > 0,
c * tanh(x * scale / c); the arithmetic is fp32. `clamp_` bounds every number. `cut_` leaves of each what is above the
mean of its row and d standard deviations of all N numbers, max(x - mean - d * std, 0): Gemma 3n keeps some 5 % of a
gate with d = 1.645. Recorded steps have each as an operation of its own, `cpu.py`.
Source: Gemma Team, 2024, arXiv:2408.00118 (soft cap); You et al., 2025, arXiv:2506.06644 (statistical top-k).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


def scale_cap_(x: torch.Tensor, scale: float, cap: float | None = None) -> torch.Tensor:
    """Changes x and returns it; on a GPU by torch's own kernels, which wait for nothing."""
    import torch

    assert cap is None or (cap > 0 and x.dtype == torch.float32)
    from candle_vllm.core.kernels.scale_cap import reference

    return reference.scale_cap_(x, scale, cap)


def clamp_(x: Value, low: float, high: float) -> Value:
    """Changes x [T, N] to min(max(x, low), high) and returns it; in a recorded step x must be all of its memory."""
    return x.clamped(low, high) if isinstance(x, Recorded) else x.clamp_(low, high)


def cut_(x: Value, deviations: float) -> None:
    """Changes x [T, N], columns of some value that nothing has read yet, to what stands out of each row."""
    if isinstance(x, Recorded):
        x.cut(deviations)
        return
    from candle_vllm.core.kernels.scale_cap import reference

    x.copy_(reference.cut(x, deviations))


class ScaleCapArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        lines: of 16 numbers, of a row; of one that is cut, its numbers.
        factor, cap: x becomes x * factor, or cap * tanh(x * factor); clamped, min(max(x, factor), cap); d is `factor`.
        rows_from: which of the step's numbers counts the rows.
    """

    x: int
    stride: int
    lines: int
    factor: float
    cap: float
    rows_from: int


def scale_cap_operation(kind: int) -> int:
    """Address of the compiled operation: 0 scales, 1 caps too, 2 clamps, 3 cuts."""
    return operation("scale_cap.cpu:make_scale_cap", kind)


def scale_cap_arguments(
    *,
    x: int,
    stride: int,
    columns: int,
    scale: float,
    cap: float | None,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> ScaleCapArguments:
    """The operation's arguments.

    Args:
        x: address of float32 rows, `stride` floats apart; up to 15 numbers behind the end of a row change too.
        columns: N.
        scale, cap: see the contract in the package.
        rows_from: which of the step's numbers counts the rows.
    """
    lines = -(-columns // LANES)
    assert LANES * lines <= stride
    factor = scale if cap is None else scale / cap
    return ScaleCapArguments(x, stride, lines, factor, cap or 0.0, rows_from)
