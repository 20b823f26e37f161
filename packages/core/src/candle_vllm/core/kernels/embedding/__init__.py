"""Embedding rows.

Contract: token_ids [T] int64 below V, table [V, E]; y [T, E] has the table's dtype, in new memory; an exact copy.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.embedding import reference


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rows of table for token_ids."""
    if on_gpu(table):
        from candle_vllm.core.kernels.embedding import triton

        return triton.embedding(token_ids, table)
    return reference.embedding(token_ids, table)
