# SPDX-License-Identifier: MIT
"""MiniMax M3's choice of key blocks op by op, and attention of each key-value head to its blocks.

`kernels/attention/cpu_choice.py` describes the choice. Shapes as in `minimax_m3_index.py`.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.models.minimax_m3_config import KeyBlocks

_QUERIES = 64  # queries at a time, so that the copied keys and values of a long prompt stay small


def choose(q: Any, cache: Any, rows: AttentionRows | DeviceRows, attend: Any, blocks: KeyBlocks) -> ByHead | None:
    """Choose blocks by q [T, K, Di] and keys [B, S, 1, Di]; return attention to them by `attend`, or None for all."""
    from candle_vllm.core.kernels.latent_attention.reference import queries_at_once

    rows, slots = rows.on_host() if isinstance(rows, DeviceRows) else rows, cache.shape[1]
    size, top, per = blocks.size, blocks.top, blocks.size // slots
    if max(rows.context_lens, default=0) <= top * size:
        return None
    tables, contexts, filled = rows.block_tables.new_zeros((len(q), q.shape[1], top * per)), list[int](), 0
    for row, context in enumerate(rows.context_lens):
        start, end = rows.query_start[row], rows.query_start[row + 1]
        table = rows.block_tables[row, : -(-context // slots)]
        keys, whole = cache[table].flatten(0, 2)[:context], -(-context // size)
        most = queries_at_once(q.shape[1] * context)
        for first in range(start, end, most):
            last = min(first + most, end)
            places = [max(0, context - end + t) for t in range(first, last)]  # a padding row has no context
            at, number = table.new_tensor(places)[:, None, None], table.new_tensor(range(whole))
            scores = q.new_full((last - first, q.shape[1], whole * size), float("-inf"), dtype=cache.dtype)
            scores[..., :context] = q[first:last].to(cache.dtype) @ keys.T  # [N, K, C]
            scores[..., :context].masked_fill_(table.new_tensor(range(context)) > at, float("-inf"))
            scores, own = scores.unflatten(-1, (-1, size)).amax(-1), at // size
            scores.masked_fill_((number <= own) & (number > own - blocks.local), float("inf"))
            best, found = scores.topk(min(top, whole))
            found = found.masked_fill(best == float("-inf"), whole).sort(-1).values[..., None]
            found = (found * per + table.new_tensor(range(per))).flatten(2)
            tables[first:last, :, : found.shape[2]] = table[found.minimum(at // slots).long()]
            contexts += [p + 1 - max(0, p // size + 1 - top) * size for p in places]
        filled = end
    return ByHead(attend, tables[:filled], contexts)


class ByHead:
    """Attention by another function to blocks [T, K, N] of each key-value head, with a number of positions for each
    token.

    The blocks are copied, because the keys of one head are not contiguous in a cache.
    """

    def __init__(self, attend: Any, tables: Any, contexts: list[int]) -> None:
        self._attend, self._tables, self._contexts = attend, tables, contexts

    def __call__(self, q: Any, keys: Any, values: Any, _: Any, **scores: Any) -> Any:
        """See `kernels/attention`; the chosen blocks replace the step's rows."""
        made, group = q.new_zeros(q.shape), q.shape[1] // keys.shape[2]
        for head in range(keys.shape[2]):
            heads = slice(head * group, (head + 1) * group)
            for first in range(0, len(self._contexts), _QUERIES):
                part = slice(first, min(first + _QUERIES, len(self._contexts)))
                tables, contexts = self._tables[part, head], tuple(self._contexts[part])
                copies = [each[:, :, head : head + 1][tables].flatten(0, 1) for each in (keys, values)]
                own = tables.new_tensor(range(tables.numel())).view(tables.shape)
                each = AttentionRows(tuple(range(len(contexts) + 1)), contexts, own)
                made[part, heads] = self._attend(q[part, heads], *copies, each, **scores)
        return made
