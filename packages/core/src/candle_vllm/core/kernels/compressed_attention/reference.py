# SPDX-License-Identifier: MIT
"""Compression of tokens and attention over the entries in torch, one sequence at a time, on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.kernels.compressed_attention import EntryParts, Groups, IndexQueries

_QUERIES = 64  # queries at a time
_SCORES = 1 << 25  # maximum index scores of all heads that are computed at a time, but at least one query's


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last R elements of x [T, H, D], in pairs of adjacent elements, by cos and sin [T, R / 2]."""
    rest, pairs = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), -1)
    a, b = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([rest, both.to(x.dtype)], -1)


def write_rows(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows [T, W] to their slots [T] of a cache [B, S, 1, W]; negative slots are skipped."""
    there = slots >= 0
    cache.flatten(0, 2)[slots[there].long()] = rows[there].to(cache.dtype)


def _rows(cache: torch.Tensor, table: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return the rows of positions `first` to `last` - 1, [n, W] fp32."""
    places, size = torch.arange(first, last, device=cache.device), cache.shape[1]
    return cache.flatten(0, 2)[table[places // size].long() * size + places % size].float()


def _entries(log: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return a view [B, entries of a block, D] of a log."""
    count = max(1, log.shape[1] // groups.ratio)
    return log.flatten(1)[:, : count * groups.size].unflatten(1, (count, groups.size))


def _places(
    log: torch.Tensor, table: torch.Tensor, groups: Groups, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks of entries `first` to `last` - 1, and their places there."""
    ends = torch.arange(first + 1, last + 1, device=log.device) * groups.ratio - 1
    return table[ends // log.shape[1]].long(), ends % log.shape[1] // groups.ratio


def compress(
    inputs: torch.Tensor,
    first_column: int,
    rows: AttentionRows,
    log: torch.Tensor,
    log_rows: AttentionRows,
    groups: Groups,
    parts: EntryParts,
) -> None:
    """Write the entries of the groups that end in this step; see the contract in the package.

    Args:
        inputs, first_column: cache [B, S, 1, C], in which columns of kv, then of the gate begin at `first_column`.
        rows, log_rows: the step's sequences, with their blocks of `inputs` and of the log.
    """
    ratio, size = groups.ratio, groups.size
    for row, (start, context) in enumerate(_spans(rows)):
        first, last = start // ratio, context // ratio
        if first == last:
            continue
        earlier = first - (groups.overlaps and first > 0)
        taken = _rows(inputs, rows.block_tables[row], earlier * ratio, last * ratio)
        taken = taken[:, first_column : first_column + 2 * groups.width].unflatten(0, (-1, ratio))
        kv, gate = taken.split(groups.width, -1)  # [groups, ratio, W]
        gate = gate + parts.bias
        if groups.overlaps:
            kv, gate = _with_earlier(kv, 0.0, size, first), _with_earlier(gate, float("-inf"), size, first)
        pooled = (kv * gate.softmax(1)).sum(1)
        pooled = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + parts.eps) * parts.norm
        at = torch.arange(first, last, device=log.device) * ratio
        entries = turned(pooled[:, None], parts.cos[at], parts.sin[at])[:, 0]
        _entries(log, groups)[_places(log, log_rows.block_tables[row], groups, first, last)] = entries.to(log.dtype)


def _with_earlier(x: torch.Tensor, absent: float, size: int, first: int) -> torch.Tensor:
    """Return [n, 2 ratio, D]: the first halves of the group before, and the second halves of each of n groups."""
    before, own = x.split(size, -1)
    if first == 0:
        before = torch.cat([torch.full_like(before[:1], absent), before])
    else:
        own = own[1:]
    return torch.cat([before[:-1], own], 1)


def _spans(rows: AttentionRows) -> Iterator[tuple[int, int]]:
    """Return each sequence's first position in this step, and its context length; (0, 0) for a row that pads a step."""
    for row, context in enumerate(rows.context_lens):
        yield max(0, context - (rows.query_start[row + 1] - rows.query_start[row])), context


def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    rows: AttentionRows,
    sinks: torch.Tensor,
    *,
    window: int,
    scale: float,
    log: torch.Tensor | None = None,
    log_rows: AttentionRows | None = None,
    groups: Groups | None = None,
    index: IndexQueries | None = None,
) -> torch.Tensor:
    """Return the weighted sums [T, H, D] for rotated q [T, H, D]; without a log a token attends to its window alone."""
    out = torch.empty_like(q)
    for row, (start, context) in enumerate(_spans(rows)):
        begin, heads = rows.query_start[row], 0 if index is None else index.q.shape[1]
        entries = 0 if groups is None else context // groups.ratio
        most = max(1, min(_QUERIES, _SCORES // max(1, heads * entries)))
        for first in range(start, context, most):
            last = min(first + most, context)
            own = slice(begin + first - start, begin + last - start)
            at, wide, low = torch.arange(first, last, device=q.device), q[own].float(), max(0, first - window + 1)
            keys = _rows(cache, rows.block_tables[row], low, last)
            far = at[:, None] - torch.arange(low, last, device=q.device)  # [n, C]
            hidden = (far < 0) | (far >= window)
            scores = [(torch.matmul(wide, keys.T) * scale).masked_fill_(hidden[:, None], float("-inf"))]
            values, count = None, 0 if groups is None else last // groups.ratio
            if count:
                assert log is not None
                assert log_rows is not None
                assert groups is not None
                table, ended = log_rows.block_tables[row], (at[:, None] + 1) // groups.ratio  # [n, 1]
                numbers = torch.arange(count, device=q.device).expand(last - first, -1)
                if index is not None and count > index.top:
                    numbers = _chosen(index, own, table, groups, count, ended)
                values = _entries(log, groups)[_places(log, table, groups, 0, count)].float()
                if numbers.shape[1] < count:
                    values = values[numbers]  # [n, top, D]
                compared = torch.matmul(wide, values.mT) * scale
                scores.append(compared.masked_fill_((numbers >= ended)[:, None], float("-inf")))
            scores.append(sinks.float()[:, None].expand(last - first, -1, -1))
            weights = torch.cat(scores, -1).softmax(-1)
            result = torch.matmul(weights[..., : len(keys)], keys)
            if values is not None:
                result += torch.matmul(weights[..., len(keys) : -1], values)
            out[own] = result.to(out.dtype)
    return out


def _chosen(
    index: IndexQueries, own: slice, table: torch.Tensor, groups: Groups, count: int, ended: torch.Tensor
) -> torch.Tensor:
    """Return the numbers [n, top] of the entries with the largest scores; those from `ended` on are not to be read."""
    sizes = Groups(groups.ratio, index.size, groups.overlaps)
    keys = _entries(index.log, sizes)[_places(index.log, table, sizes, 0, count)].float()
    scores = torch.matmul(index.q[own].float(), keys.T).relu_().mul_(index.weights[own, :, None].float()).sum(1)
    scores.masked_fill_(torch.arange(count, device=keys.device) >= ended, float("-inf"))
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, : index.top]
