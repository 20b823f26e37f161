# SPDX-License-Identifier: MIT
"""Attention of many short steps at once against the reference, which takes one sequence after the other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from candle_vllm.core.kernels.attention import paged_attention, reference, torch_decode
from candle_vllm.core.kernels.attention.rows import AttentionRows

SIZE, HEADS, KV_HEADS, DIM = 8, 6, 2, 16
CONTEXTS, QUERIES = (1, 21, 8, 40, 130, 9, 16, 63), (1, 1, 1, 7, 1, 9, 1, 1)


def step(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionRows]:
    """Scattered pages; every slot that must not be read is NaN, and tails of tables lead out of the cache."""
    generator = torch.Generator().manual_seed(3)
    needed = [-(-context // SIZE) for context in CONTEXTS]
    order = torch.randperm(sum(needed) + 1, generator=generator)
    caches = [torch.full((len(order), SIZE, KV_HEADS, DIM), math.nan) for _ in range(2)]
    tables = torch.full((len(CONTEXTS), max(needed) + 2), 10**6)
    for row, (context, end) in enumerate(zip(CONTEXTS, itertools.accumulate(needed))):
        tables[row, : needed[row]] = order[end - needed[row] : end]
        at = torch.arange(context)
        for cache in caches:
            cache[tables[row, at // SIZE], at % SIZE] = torch.randn(context, KV_HEADS, DIM, generator=generator)
    starts = tuple(itertools.accumulate(QUERIES, initial=0))
    q = torch.randn(starts[-1], HEADS, DIM, generator=generator).to(dtype)
    return q, caches[0].to(dtype), caches[1].to(dtype), AttentionRows(starts, CONTEXTS, tables)


@pytest.mark.parametrize("most", [torch_decode.MOST, 3000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 1},
        {"window": 12},
        {"window": -12},
        {"softcap": 0.7},
        {"sinks": torch.arange(-3.0, 3.0)},
        {"window": 9, "softcap": 2.0},
        {"slopes": torch.tensor([0.0, 0.5, 0.1, 1.0, 0.01, 0.3])},
        {"relative": (torch.linspace(-2, 3, 4 * HEADS * sum(QUERIES)).view(-1, HEADS, 4), torch.eye(4, 30))},
    ],
    ids=str,
)
def test_the_same_as_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, most: int
) -> None:
    monkeypatch.setattr(torch_decode, "MOST", most)
    q, keys, values, rows = step(dtype)
    got = paged_attention(q, keys, values, rows, scale=0.3, **options)
    wanted = reference.paged_attention(q.float(), keys.float(), values.float(), rows, scale=0.3, **options)
    assert got.dtype == dtype
    gap = (got.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert gap < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("window", [None, 1, 12, -12])
def test_a_token_alone_is_as_in_a_batch(window: int | None) -> None:
    q, keys, values, rows = step(torch.float32)
    together = reference.paged_attention(q, keys, values, rows, scale=0.3, window=window)
    for row, (start, end) in enumerate(itertools.pairwise(rows.query_start)):
        if end - start == 1 and CONTEXTS[row]:
            one = AttentionRows((0, 1), (CONTEXTS[row],), rows.block_tables[row : row + 1])
            got = paged_attention(q[start:end], keys, values, one, scale=0.3, window=window)
            torch.testing.assert_close(got, together[start:end], rtol=1e-5, atol=1e-5)


def test_a_cache_of_8_bits() -> None:
    q, keys, values, rows = step(torch.float32)
    keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    scales = (torch.tensor([0.5]), torch.tensor([3.0]))
    got = paged_attention(q, keys, values, rows, scale=0.3, cache_scales=scales)
    wanted = reference.paged_attention(q, keys, values, rows, scale=0.3, cache_scales=scales)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_only_fill_up_a_batch_give_zeros() -> None:
    q, keys, values, rows = step(torch.float32)
    contexts = (0, 21, 0, 40, 130, 9, 16, 63)
    got = paged_attention(q, keys, values, AttentionRows(rows.query_start, contexts, rows.block_tables), scale=0.3)
    assert (got[[0, 2]] == 0).all()
    wanted = paged_attention(q, keys, values, rows, scale=0.3)
    torch.testing.assert_close(got[[1, *range(3, len(q))]], wanted[[1, *range(3, len(q))]])
