# SPDX-License-Identifier: MIT
"""Look up embedding rows.

Contract: for token_ids [T] int64 below V and table [V, E], y [T, E] is an exact copy of rows, in the table's dtype and
in new memory. Recorded steps read rows as float32 from tables in other layouts, and may add rows of several tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.dispatch import on_gpu

if TYPE_CHECKING:
    import torch


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the rows of table for token_ids."""
    if on_gpu(table):
        from candle_vllm.core.kernels.embedding import triton

        return triton.embedding(token_ids, table)
    return table[token_ids]


class AddArguments(NamedTuple):
    """Arguments of the operation that adds rows.

    Attributes:
        x: address of float32 rows [T, columns], `stride` floats apart.
        target: address of the rows to which x is added, `target_stride` floats apart.
    """

    x: int
    stride: int
    columns: int
    target: int
    target_stride: int
