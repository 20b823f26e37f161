# SPDX-License-Identifier: MIT
"""Paged attention in plain torch, one sequence after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch

from candle_vllm.core.kernels.kv_write.scaled_rows import has_row_scales, read_blocks

if TYPE_CHECKING:
    from candle_vllm.core.kernels.attention.rows import AttentionRows, ScoreOptions

_QUERIES = 256  # maximum tokens that are computed at a time, to limit the memory of a long prompt's scores


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: AttentionRows,
    **scores: Unpack[ScoreOptions],
) -> torch.Tensor:
    """See the contract in `kernels/attention`."""
    out = torch.empty_like(q)
    size, window = key_cache.shape[1], scores.get("window")
    cache_scales, relative = scores.get("cache_scales"), scores.get("relative")
    for row, context in enumerate(rows.context_lens):
        start, end = rows.query_start[row], rows.query_start[row + 1]
        table = rows.block_tables[row, : -(-context // size)]
        k, v = (  # [K, C, D]
            blocks_of(cache, table, q.shape[2]).flatten(0, 1)[:context].transpose(0, 1).float()
            for cache in (key_cache, value_cache)
        )
        if window is not None:  # values to which no row attends may be NaN
            v[:, : max(0, first_seen(context - (end - start), window))] = 0
        if cache_scales is not None:
            k, v = k * cache_scales[0], v * cache_scales[1]
        for first in range(start, end, _QUERIES):
            last = min(first + _QUERIES, end)
            ahead = None if rows.ahead is None else rows.ahead[first:last, None]
            if relative is not None:
                scores["relative"] = relative[0][first:last], relative[1]
            out[first:last] = _attend(q[first:last], k, v, context - (end - first), ahead, scores)
    return out


def first_seen(position: Any, window: int) -> Any:
    """Return the first position that a token at `position` attends to; a result below 0 means position 0."""
    return position // -window * -window if window < 0 else position - window + 1


def relative_logits(states: torch.Tensor, profiles: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Return the relative logits [Q, H, C] fp32 of states [Q, H, P] for distances [Q, C] of queries and keys."""
    made, last = states.float() @ profiles, profiles.shape[1] - 1
    places = distance.clamp(0, last)[:, None].expand(-1, made.shape[1], -1)
    return made.gather(-1, places).masked_fill_(((distance < 0) | (distance > last))[:, None], 0)


def blocks_of(cache: torch.Tensor, tables: torch.Tensor, dim: int) -> torch.Tensor:
    """Return blocks of a cache, [..., S, K, D], in the cache's type; in fp32 if rows have scales. `dim` is D."""
    if has_row_scales(cache, dim):
        return read_blocks(cache, tables)
    return cache.index_select(0, tables.flatten()).unflatten(0, tables.shape)  # faster than `cache[tables]`


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, ahead: torch.Tensor | None, options: ScoreOptions
) -> torch.Tensor:
    """Compute attention [Q, H, D] of q [Q, H, D] at `position`, `position` + 1, ...; k, v [K, C, D]; ahead [Q, 1]."""
    queries, heads, dim = q.shape
    kv_heads, context, _ = k.shape
    grouped = q.float().view(queries, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)  # [K, G, Q, D]
    scores = torch.matmul(grouped.flatten(1, 2), k.transpose(1, 2)).mul_(options["scale"])  # [K, G * Q, C]
    if (softcap := options.get("softcap")) is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    at = torch.arange(position, position + queries, device=q.device).unsqueeze(1)  # [Q, 1]
    seen = torch.arange(context, device=q.device).unsqueeze(0)  # [1, C]
    if (slopes := options.get("slopes")) is not None:
        lost = slopes.float().view(kv_heads, -1, 1, 1) * (at - seen)  # [K, G, Q, C]
        scores.sub_(lost.flatten(1, 2))
    if (relative := options.get("relative")) is not None:
        scores.add_(relative_logits(*relative, at - seen).transpose(0, 1).reshape(scores.shape))
    hidden = seen > (at if ahead is None else at + ahead)
    if (window := options.get("window")) is not None:
        hidden |= seen < first_seen(at, window)
    scores.view(kv_heads, heads // kv_heads, queries, context).masked_fill_(hidden, float("-inf"))
    if (sinks := options.get("sinks")) is None:
        weights = scores.softmax(-1)
    else:
        beside = sinks.float().view(kv_heads, -1, 1).expand(-1, -1, queries).reshape(kv_heads, -1, 1)
        weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    mixed = torch.matmul(weights, v)  # [K, G * Q, D]
    return (
        mixed.view(kv_heads, heads // kv_heads, queries, dim)
        .permute(2, 0, 1, 3)
        .reshape(queries, heads, dim)
        .to(q.dtype)
    )
