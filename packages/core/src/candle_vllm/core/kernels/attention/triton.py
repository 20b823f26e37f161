# SPDX-License-Identifier: MIT
"""Paged attention on a GPU (step 6 of a request's life): checks, and the choice of the kernel for each sequence.

`triton_decode` computes the first `decodes` sequences of a step, which have one token each, `triton_prefill` the later
sequences. So other sequences of the batch do not change which kernel computes a sequence. No function waits for the
GPU. With `DeviceRows.decoding` both kernels are launched over all rows of a captured step, and each reads on the device
which sequences it computes. In the kernels, a tile is BLOCK_N consecutive positions of one sequence and one KV head, a
split is some consecutive tiles of a sequence, and an item is one split of one KV head.
"""

from __future__ import annotations

from typing import Unpack

import torch

from candle_vllm.core.kernels.attention.rows import DeviceRows, ScoreOptions
from candle_vllm.core.kernels.attention.triton_decode import decode
from candle_vllm.core.kernels.attention.triton_prefill import prefill
from candle_vllm.core.kernels.attention.triton_relative import relative_logits
from candle_vllm.core.kernels.kv_write.scaled_rows import has_row_scales
from candle_vllm.core.kernels.kv_write.triton import check_caches

MOST_DIM = 512


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: DeviceRows,
    **scores: Unpack[ScoreOptions],
) -> torch.Tensor:
    """See the contract in the package."""
    (tokens, heads, dim), block_size, scales = q.shape, key_cache.shape[1], scores.get("cache_scales")
    assert q.stride()[1:] == (dim, 1), "the heads of a token must be contiguous"
    assert dim <= MOST_DIM
    assert block_size >= 16, "a block has a power of two of slots, at least 16"
    assert block_size & (block_size - 1) == 0
    check_caches((key_cache, value_cache), scales, q)
    assert dim % 2 == 0 or not (scales or has_row_scales(key_cache, dim)), "values of 8 bits are read in pairs"
    check_rows(rows, q)
    for of_heads in (scores.get("sinks"), scores.get("slopes")):
        if of_heads is not None:
            assert of_heads.shape == (heads,)
            assert of_heads.dtype == torch.float32
            assert of_heads.is_contiguous()
            assert of_heads.device == q.device
    softcap, given = scores.get("softcap"), scores.get("relative")
    relative = None if given is None else relative_logits(*given)
    assert scores["scale"] > 0
    assert scores.get("window") != 0
    assert softcap is None or softcap > 0
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if rows.decodes:
        decode(q, key_cache, value_cache, out, rows, relative, scores)
    first = rows.decodes if rows.decoding is None else 0
    if tokens > first:
        prefill(q, key_cache, value_cache, out, rows, first, relative, scores)
    return out


def check_rows(rows: DeviceRows, q: torch.Tensor) -> None:
    """Check the tensors of the rows of queries q [T, ...]."""
    count = rows.context_lens.shape[0]
    assert rows.query_start.shape == (count + 1,)
    assert rows.block_tables.shape[0] == count
    assert rows.block_tables.stride(1) == 1
    assert 0 <= rows.decodes <= min(count, len(q))
    numbers = (rows.query_start, rows.context_lens, rows.block_tables)
    assert all(x.dtype in (torch.int32, torch.int64) for x in numbers)
    assert all(x.device == q.device for x in numbers)
    if rows.decoding is not None:
        assert rows.decoding.shape == (1,)
        assert rows.decoding.dtype == torch.int32
        assert rows.decoding.device == q.device
