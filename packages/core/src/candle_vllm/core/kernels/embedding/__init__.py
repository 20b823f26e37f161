# SPDX-License-Identifier: MIT
"""Embedding rows.

Contract: token_ids [T] int64 below V, table [V, E]; y [T, E] has the table's dtype, in new memory; an exact copy.
Recorded steps read rows of tables in layouts of their own, as float32, and may add those of several (`cpu.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import operation
from candle_vllm.core.kernels.dispatch import on_gpu

if TYPE_CHECKING:
    import torch


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rows of table for token_ids."""
    if on_gpu(table):
        from candle_vllm.core.kernels.embedding import triton

        return triton.embedding(token_ids, table)
    from candle_vllm.core.kernels.embedding import reference

    return reference.embedding(token_ids, table)


class AddArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows [T, columns], `stride` floats apart.
        target: address of the rows that they are added to, `target_stride` floats apart.
    """

    x: int
    stride: int
    columns: int
    target: int
    target_stride: int


def add_operation() -> int:
    """Address of the compiled operation."""
    return operation("embedding.cpu:add")
