# SPDX-License-Identifier: MIT
"""Heads times a number of their position: queries that grow sharper far into a long context.

Contract: x [T, H, D] of any float dtype, table [P] fp32, positions [T] below P. Token t becomes
x[t] * table[positions[t]] in fp32, rounded to x's dtype, in new memory; recorded steps do it in place, by the operation
in `cpu.py`.
Source: Llama 4's temperature tuning, as Ministral 3 has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import operation
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


def position_scale(x: Value, positions: torch.Tensor, table: Value) -> Value:
    """Heads times their position's number; on a GPU by torch's own kernels, which wait for nothing."""
    if isinstance(x, Recorded):
        return x.position_scale(table)
    assert x.dim() == 3
    from candle_vllm.core.kernels.position_scale import reference

    return reference.position_scale(x, positions, table)


class PositionScaleArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart, of which `columns` change.
        positions: address of the step's int64 positions.
        table: address of the float32 numbers of all positions.
    """

    x: int
    stride: int
    columns: int
    positions: int
    table: int


def position_scale_operation() -> int:
    """Address of the compiled operation."""
    return operation("position_scale.cpu:position_scale")
