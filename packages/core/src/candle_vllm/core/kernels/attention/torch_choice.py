# SPDX-License-Identifier: MIT
"""Choice of key blocks by an index in torch, and attention of each KV head to its blocks; see `cpu_choice.py`."""

from __future__ import annotations

from typing import Any

import torch

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows, KeyBlocks

_QUERIES = 64  # queries at a time, so that the scores and copied keys of a long prompt stay small


def choose(
    q: torch.Tensor, cache: torch.Tensor, rows: AttentionRows | DeviceRows, attend: Any, blocks: KeyBlocks
) -> ByHead | None:
    """Choose blocks by q [T, K, Di] and keys [B, S, 1, Di]; return attention to them by `attend`, or None for all."""
    rows, slots = rows.on_host() if isinstance(rows, DeviceRows) else rows, cache.shape[1]
    size, top, local = blocks
    if max(rows.context_lens, default=0) <= top * size:
        return None
    tables, contexts, per = list[torch.Tensor](), list[int](), size // slots
    for row, context in enumerate(rows.context_lens):
        start, end = rows.query_start[row], rows.query_start[row + 1]
        table = rows.block_tables[row, : -(-context // slots)].long()
        keys = cache[table].flatten(0, 2)[:context].float()  # [C, Di]
        keys = torch.nn.functional.pad(keys, (0, 0, 0, -context % size))
        for first in range(start, end, _QUERIES):
            last = min(first + _QUERIES, end)
            places = [max(0, context - end + t) for t in range(first, last)]  # a padding row has no context
            at = torch.tensor(places, device=q.device)[:, None, None]
            scores = torch.matmul(q[first:last].float(), keys.T)  # [N, K, C]
            scores.masked_fill_(torch.arange(len(keys), device=q.device) > at, float("-inf"))
            scores = scores.unflatten(-1, (-1, size)).amax(-1)
            number, own = torch.arange(scores.shape[-1], device=q.device), at // size
            scores.masked_fill_((number <= own) & (number > own - local), float("inf"))
            best, found = scores.topk(min(top, len(number)))
            found = found.masked_fill(best == float("-inf"), len(number)).sort(-1).values[..., None]
            found = (found * per + torch.arange(per, device=q.device)).flatten(2)
            chosen = table[torch.minimum(found, at // slots)]  # entries after the context are not read
            tables.append(torch.nn.functional.pad(chosen, (0, top * per - chosen.shape[2])))
            contexts += [p + 1 - max(0, p // size + 1 - top) * size for p in places]
    return ByHead(attend, torch.cat(tables), contexts)


class ByHead:
    """Attention by another function to blocks [T, K, N] of each KV head, with a number of positions for each token.

    The blocks are copied, because the keys of one head are not contiguous in a cache.
    """

    def __init__(self, attend: Any, tables: torch.Tensor, contexts: list[int]) -> None:
        self._attend, self._tables, self._contexts = attend, tables, contexts

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, _: Any, **scores: Any) -> Any:
        """See `kernels/attention`; the chosen blocks replace the step's rows."""
        made, group = torch.empty_like(q), q.shape[1] // keys.shape[2]
        for head in range(keys.shape[2]):
            heads = slice(head * group, (head + 1) * group)
            for first in range(0, len(self._contexts), _QUERIES):
                part = slice(first, min(first + _QUERIES, len(self._contexts)))
                tables, contexts = self._tables[part, head], tuple(self._contexts[part])
                copies = [each[:, :, head : head + 1][tables].flatten(0, 1) for each in (keys, values)]
                own = torch.arange(tables.numel(), device=q.device).view(tables.shape)
                each = AttentionRows(tuple(range(len(contexts) + 1)), contexts, own)
                made[part, heads] = self._attend(q[part, heads], *copies, each, **scores)
        return made
