# SPDX-License-Identifier: MIT
"""Scale, soft-cap, clamp or sparsify rows in place: for example embeddings times a factor, or logits c tanh(z / c).

Contract: x [T, N] float32 (without a cap any float dtype) becomes x * scale, or with a cap c > 0
c * tanh(x * scale / c); the arithmetic is fp32. `clamp_` clamps every element. `cut_` replaces each element of a row by
max(x - mean - d * std, 0) with the row's mean and standard deviation: with d = 1.645, about 5 % of a gate of Gemma 3n
stay above 0. In recorded steps each of these is an operation, `cpu.py`.
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
    """Scale and cap x in place, and return it; on a GPU by torch's own kernels, without synchronisation."""
    import torch

    assert cap is None or (cap > 0 and x.dtype == torch.float32)
    if cap is None:
        return x if scale == 1 else x.mul_(scale)
    return x.mul_(scale / cap).tanh_().mul_(cap)


def clamp_(x: Value, low: float, high: float) -> Value:
    """Clamp x [T, N] to low..high in place, and return it; recorded columns must be lines of 16, or reach the end."""
    return x.clamped(low, high) if isinstance(x, Recorded) else x.clamp_(low, high)


def cut_(x: Value, deviations: float) -> None:
    """Replace x [T, N] in place as described above; no recorded operation may have read these columns."""
    if isinstance(x, Recorded):
        x.cut(deviations)
        return
    import torch

    std, mean = torch.std_mean(x.float(), -1, correction=0, keepdim=True)
    x.copy_((x.float() - (mean + std * deviations)).clamp(min=0))


class ScaleCapArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        lines: number of runs of 16 elements in a row; for `cut_`, number of elements.
        factor, cap: x becomes x * factor, cap * tanh(x * factor), or min(max(x, factor), cap); `cut_`: `factor` is d.
        rows_from: the `StepNumber` that is the number of rows.
    """

    x: int
    stride: int
    lines: int
    factor: float
    cap: float
    rows_from: int


def scale_cap_operation(kind: int) -> int:
    """Return the address of the compiled operation; `kind` 0 scales, 1 also caps, 2 clamps, 3 is `cut_`."""
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
    """Return the arguments for scaling N = `columns`; up to 15 elements after the end of a row change too."""
    lines = -(-columns // LANES)
    assert LANES * lines <= stride
    factor = scale if cap is None else scale / cap
    return ScaleCapArguments(x, stride, lines, factor, cap or 0.0, rows_from)
