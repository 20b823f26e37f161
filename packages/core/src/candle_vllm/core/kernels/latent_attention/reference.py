# SPDX-License-Identifier: MIT
"""Latent attention in plain torch, one sequence at a time; an indexer's choice in torch, on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.latent_attention.layout import attended

_QUERIES = 64  # queries at a time, so that the scores of a long prompt stay small
_SCORES = 1 << 25  # maximum indexer scores of all heads that are computed at a time, but at least one query's


def latent_attention(
    q_rope: torch.Tensor, q_latent: torch.Tensor, cache: torch.Tensor, rows: AttentionRows, *, scale: float
) -> torch.Tensor:
    """See the contract in the package."""
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    size, rope = cache.shape[1], q_rope.shape[2]
    for row, context in enumerate(rows.context_lens):
        start, end = rows.query_start[row], rows.query_start[row + 1]
        table = rows.block_tables[row, : -(-context // size)]
        keys = cache[table].flatten(0, 2)[:context].float()  # [C, R + L]
        for first in range(start, end, _QUERIES):
            last = min(first + _QUERIES, end)
            q = torch.cat([q_rope[first:last], q_latent[first:last]], -1).float()  # [Q, H, R + L]
            scores = torch.matmul(q, keys.T) * scale  # [Q, H, C]
            at = torch.arange(context - (end - first), context - (end - last), device=q.device)
            hidden = torch.arange(context, device=q.device) > at[:, None]  # [Q, C]
            scores.masked_fill_(hidden[:, None], float("-inf"))
            out[first:last] = torch.matmul(scores.softmax(-1), keys[:, rope:]).to(out.dtype)
    return out


def queries_at_once(scores: int) -> int:
    """Return how many queries an indexer scores at a time; `scores` is the number of scores of a query."""
    return max(1, min(_QUERIES, _SCORES // max(1, scores)))


def score_bytes(heads: int, keys: int) -> int:
    """Return an upper bound of the bytes that `choose` needs for scores: twice the products."""
    return 2 * 4 * heads * keys * queries_at_once(heads * keys)


def pool_keys(cache: torch.Tensor, slots: torch.Tensor, places: torch.Tensor) -> None:
    """Replace the keys of the last positions of groups by pooled keys, as the package says; cache [B, S, 1, 2 D]."""
    (pool, dim), flat = places.shape, cache.flatten(0, 2)
    ends = slots[(slots >= 0) & (slots % pool == pool - 1)].long()
    rows = flat[ends[:, None] - torch.arange(pool - 1, -1, -1, device=ends.device)].float()  # [N, pool, 2 D]
    keys, gates = rows.split((dim, dim), -1)
    flat[ends, :dim] = ((gates + places.float()).softmax(1) * keys).sum(1).to(cache.dtype)


def choose(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    rows: AttentionRows | DeviceRows,
    top: int,
    pool: int = 1,
) -> torch.Tensor | None:
    """Return the `chosen` positions [T, top] for q [T, H, D], weights [T, H] and keys [B, S, 1, D]; None for all.

    With a `pool` above 1, these are groups of neighbouring positions, whose pooled keys `pool_keys` has written.
    """
    rows, found = rows.on_host() if isinstance(rows, DeviceRows) else rows, list[torch.Tensor]()
    if max(rows.context_lens, default=0) // pool <= top // pool:
        return None
    inside = torch.arange(pool, device=q.device)
    for row, context in enumerate(rows.context_lens):
        start, end = rows.query_start[row], rows.query_start[row + 1]
        keys = cache[rows.block_tables[row, : -(-context // cache.shape[1])]].flatten(0, 2)[:context]
        keys = keys[pool - 1 :: pool, : q.shape[2]].float()
        ends = torch.arange(context, device=q.device)[pool - 1 :: pool]
        most = queries_at_once(q.shape[1] * len(keys))
        for first in range(start, end, most):
            last = min(first + most, end)
            # rows that fill up a captured step have no context
            at = torch.arange(context - (end - first), context - (end - last), device=q.device).clamp_(min=0)[:, None]
            scores = torch.matmul(q[first:last].float(), keys.T).relu_().mul_(weights[first:last, :, None].float())
            scores = scores.sum(1).masked_fill_(ends > at, float("-inf"))
            best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : top // pool]
            best = torch.where(best * pool + pool - 1 > at, context, best * pool)[..., None] + inside
            rest = (at + 1) // pool * pool + inside[:-1]
            best = torch.cat([best.flatten(1), rest], 1).sort(-1).values[:, :top]
            best = torch.nn.functional.pad(best, (0, top - best.shape[1]), value=context)
            found.append(torch.minimum(best, at))
    return torch.cat(found)


def chosen_rows(
    cache: torch.Tensor, rows: AttentionRows | DeviceRows, chosen: torch.Tensor, pool: int = 1
) -> Iterator[tuple[slice, torch.Tensor, AttentionRows]]:
    """Copy the cached rows at chosen positions [T, top]; yield for some tokens at a time: their slice, the copies as a
    cache with a sequence for each token, and the cache's `AttentionRows`."""
    rows, size = rows.on_host() if isinstance(rows, DeviceRows) else rows, cache.shape[1]
    counts = [end - start for start, end in zip(rows.query_start, rows.query_start[1:])]
    seen = [context - n + i + 1 for context, n in zip(rows.context_lens, counts) for i in range(n)]
    tables = rows.block_tables.repeat_interleave(torch.tensor(counts, device=cache.device), 0)
    padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[1] % size))  # to whole blocks
    for first in range(0, len(seen), _QUERIES):
        part = slice(first, first + _QUERIES)
        places = tables[part].gather(1, padded[part] // size) * size + padded[part] % size
        copies = cache.flatten(0, 1)[places].unflatten(1, (-1, size))
        blocks = torch.arange(copies.shape[:2].numel(), device=cache.device).view(copies.shape[:2])
        contexts = tuple(attended(n, chosen.shape[1], pool) for n in seen[part])
        yield part, copies.flatten(0, 1), AttentionRows(tuple(range(len(contexts) + 1)), contexts, blocks)


def latent_write(rope: torch.Tensor, latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """See the contract in the package."""
    there = slots >= 0
    cache.flatten(0, 2)[slots[there]] = torch.cat([rope, latent], -1)[there].to(cache.dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor, *, row_by_row: bool = False) -> torch.Tensor:
    """See the contract in the package; `row_by_row` computes each token separately."""
    if row_by_row and len(x) > 1:
        return torch.cat([head_linear(row, weight) for row in x.split(1)])
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
