# SPDX-License-Identifier: MIT
"""Compression of tokens and attention over the entries in torch, one sequence at a time, on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from candle_vllm.core.kernels.attention.rows import AttentionRows, PagedCache
from candle_vllm.core.kernels.compressed_attention import EntryParts, Groups, IndexQueries
from candle_vllm.core.kernels.latent_attention.reference import best_scored, queries_at_once


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last R elements of x [T, H, D], in pairs of adjacent elements, by cos and sin [T, R / 2]."""
    rest, pairs = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), -1)
    a, b = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([rest, both.to(x.dtype)], -1)


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


class TorchStep:
    """A layer's operations in one step; see the contract in the package.

    Args:
        positions: [T].
        tables: cos and sin [positions, R / 2] of the rotary embedding.
        cache, logs: cache of rows and inputs, and logs of entries and index keys.
        slots: [T], places of the tokens in the cache; negative slots are skipped.
        rows, log_rows: the step's sequences, with their blocks of the cache and of the logs.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        cache: PagedCache,
        logs: PagedCache,
        slots: torch.Tensor,
        rows: AttentionRows,
        log_rows: AttentionRows,
    ) -> None:
        self._tables, self._turns = tables, (tables[0][positions], tables[1][positions])
        self._cache, self._logs, self._slots, self._rows, self._log_rows = cache, logs, slots, rows, log_rows

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the last R elements of x [T, H, D], in pairs of adjacent elements."""
        return _turned(x, *self._turns)

    def write(self, values: Sequence[torch.Tensor], cache: torch.Tensor) -> None:
        """Write values [T, ...] side by side to a cache [B, S, 1, W]."""
        there, rows = self._slots >= 0, torch.cat([each.flatten(1) for each in values], -1)
        cache.flatten(0, 2)[self._slots[there].long()] = rows[there].to(cache.dtype)

    def compress(self, column: int, log: torch.Tensor, groups: Groups, parts: EntryParts) -> None:
        """Write the entries of the groups that end in this step to a log, from a column of the inputs on."""
        ratio, size, tables = groups.ratio, groups.size, self._rows.block_tables
        for row, (start, context) in enumerate(_spans(self._rows)):
            first, last = start // ratio, context // ratio
            if first == last:
                continue
            earlier = first - (groups.overlaps and first > 0)
            taken = _rows(self._cache.values, tables[row], earlier * ratio, last * ratio)
            taken = taken[:, column : column + 2 * groups.width].unflatten(0, (-1, ratio))
            kv, gate = taken.split(groups.width, -1)  # [groups, ratio, W]
            gate = gate + parts.bias
            if groups.overlaps:
                kv, gate = _with_earlier(kv, 0.0, size, first), _with_earlier(gate, float("-inf"), size, first)
            pooled = (kv * gate.softmax(1)).sum(1)
            pooled = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + parts.eps) * parts.norm
            at = torch.arange(first, last, device=log.device) * ratio
            entries = _turned(pooled[:, None], *(table[at] for table in self._tables))[:, 0]
            places = _places(log, self._log_rows.block_tables[row], groups, first, last)
            _entries(log, groups)[places] = entries.to(log.dtype)

    def attend(
        self, q: torch.Tensor, sinks: torch.Tensor, window: int, scale: float, groups: Any, index: IndexQueries | None
    ) -> torch.Tensor:
        """Return the weighted sums [T, H, D] for rotated q [T, H, D], rotated back."""
        cache, rows, log, out = self._cache.keys, self._rows, self._logs.keys, torch.empty_like(q)
        for row, (start, context) in enumerate(_spans(rows)):
            begin, heads = rows.query_start[row], 0 if index is None else index.q.shape[1]
            entries = 0 if groups is None else context // groups.ratio
            most = queries_at_once(heads * entries)
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
                    table, ended = self._log_rows.block_tables[row], (at[:, None] + 1) // groups.ratio  # [n, 1]
                    numbers = torch.arange(count, device=q.device).expand(last - first, -1)
                    if index is not None and count > index.top:
                        places = _places(index.log, table, index.groups, 0, count)
                        compared = _entries(index.log, index.groups)[places].float()
                        numbers = best_scored(index.q[own], index.weights[own], compared, ended, index.top)
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
        cos, sin = self._turns
        return _turned(out, cos, -sin)
