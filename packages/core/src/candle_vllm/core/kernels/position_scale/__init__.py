# SPDX-License-Identifier: MIT
"""Multiply each token's row by a factor from a table, such as queries by one that grows with the position.

Contract: for x [T, H, D] of any float dtype, table [P] fp32 and positions [T] below P, the result for token t is
x[t] * table[positions[t]] in fp32, rounded to x's dtype, in new memory; in recorded steps x is overwritten (`cpu.py`).
Source: Llama 4's temperature tuning, which Ministral 3 uses too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


def position_scale(x: Value, positions: torch.Tensor, table: Value) -> Value:
    """Multiply heads by the factor of their position; on a GPU by torch's own kernels, without synchronisation."""
    if isinstance(x, Recorded):
        return x.position_scale(table)
    assert x.dim() == 3
    return (x.float() * table[positions][:, None, None]).to(x.dtype)


class PositionScaleArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x: address of float32 rows, `stride` floats apart, of which `columns` columns change.
        positions: address of int64 [T], the index of each row's factor: the token's position, for queries.
        table: address of the float32 factors.
    """

    x: int
    stride: int
    columns: int
    positions: int
    table: int
