# SPDX-License-Identifier: MIT
"""Embedding rows on a GPU (step 6 of a request's life). A program copies part of one token's row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

_PART = 1024  # elements of a program; not measured yet


@triton.jit
def embedding_kernel(
    token_ids,  # [T]
    table,  # [V, E], rows contiguous
    y,  # [T, E] contiguous
    table_stride,  # elements from a row to the next
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token).to(tl.int64)
    values = tl.load(table + row * table_stride + at, mask=at < E)
    tl.store(y + token * E + at, values, mask=at < E)


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See the contract in the package. Ids may also be int32."""
    assert token_ids.dim() == 1
    assert token_ids.is_contiguous()
    assert token_ids.dtype in (torch.int32, torch.int64)
    assert table.stride(1) == 1
    assert token_ids.device == table.device
    size = table.shape[1]
    y = torch.empty(len(token_ids), size, dtype=table.dtype, device=table.device)
    if y.numel():
        constants = _constants(size)
        grid = (len(token_ids), cdiv(size, constants["BLOCK"]))
        embedding_kernel[grid](token_ids, table, y, table.stride(0), **constants, num_warps=4, **OPTIONS)
    return y


def _constants(size: int) -> dict[str, int]:
    return {"E": size, "BLOCK": min(next_power_of_2(size), _PART)}
