"""Embedding rows.

Contract: token_ids [T] int64 below V, table [V, E]; y [T, E] has the table's dtype, in new memory; an exact copy.
Recorded steps read rows of tables in layouts of their own, as float32, and may add those of several (`cpu.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
