# SPDX-License-Identifier: MIT
"""Paged attention of decoding steps in plain torch: sequences with one new token are computed together.

The reference makes some thirty torch calls for each sequence and layer, which take most of the time of an eager step.
In this module groups of sequences with one token share these calls: keys and values of a group are gathered and padded
to its longest context, and the padding is masked. Prompts are computed by the reference.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Unpack

import torch

from candle_vllm.core.kernels.attention import reference

if TYPE_CHECKING:
    from candle_vllm.core.kernels.attention.rows import AttentionRows, ScoreOptions

MOST = 1 << 22
"""Maximum elements of keys that are gathered at a time, unless one sequence has more; it limits memory."""


def paged_attention(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, rows: AttentionRows, **options: Any
) -> torch.Tensor:
    """See the contract in `kernels/attention`."""
    starts, counts = rows.query_start, [end - start for start, end in itertools.pairwise(rows.query_start)]
    single = [row for row, count in enumerate(counts) if count == 1 and rows.context_lens[row]]
    plain = all(options.get(each) is None for each in ("softcap", "cache_scales", "sinks", "slopes", "relative"))
    if counts == [1] and single and plain and rows.ahead is None:
        return _attend_one(q, (key_cache, value_cache), rows, options["scale"], options.get("window"))
    if len(single) < 2:
        return reference.paged_attention(q, key_cache, value_cache, rows, **options)
    size, kv_heads, dim = *key_cache.shape[1:3], q.shape[2]
    out = torch.zeros_like(q)  # padding rows, which have no context, get zeros
    relative = options.pop("relative", None)

    def picked(tokens: Any) -> Any:
        return None if relative is None else (relative[0][tokens], relative[1])

    single.sort(key=lambda row: rows.context_lens[row])  # sequences of similar lengths need little padding
    while single:
        blocks = -(-rows.context_lens[single[-1]] // size)
        together = single[-max(1, MOST // (blocks * size * kv_heads * dim)) :]
        del single[-len(together) :]
        tokens = torch.tensor([starts[row] for row in together], device=q.device)
        contexts = torch.tensor([rows.context_lens[row] for row in together], device=q.device)
        tables = rows.block_tables[torch.tensor(together, device=q.device), :blocks]
        out[tokens] = _attend(q[tokens], key_cache, value_cache, tables, contexts, relative=picked(tokens), **options)
    for row, count in enumerate(counts):
        if count > 1:
            tokens, alone = slice(starts[row], starts[row + 1]), _row(rows, row)
            options["relative"] = picked(tokens)
            out[tokens] = reference.paged_attention(q[tokens], key_cache, value_cache, alone, **options)
    return out


def _attend_one(q: torch.Tensor, caches: Any, rows: AttentionRows, scale: float, window: int | None) -> torch.Tensor:
    """Compute attention [1, H, D] of the only token; only the blocks that it attends to are gathered."""
    context, (size, kv_heads), dim = rows.context_lens[0], caches[0].shape[1:3], q.shape[2]
    first = 0 if window is None else max(0, reference.first_seen(context - 1, window))
    table = rows.block_tables[0, first // size : -(-context // size)]
    seen = slice(first % size, first % size + context - first)
    k, v = (reference.blocks_of(each, table, dim).flatten(0, 1)[seen].transpose(0, 1).float() for each in caches)
    scores = torch.matmul(q.float().view(kv_heads, -1, dim), k.transpose(1, 2)).mul_(scale)  # [K, G, C]
    return torch.matmul(scores.softmax(-1), v).view(1, -1, dim).to(q.dtype)


def _row(rows: AttentionRows, row: int) -> AttentionRows:
    """Return the `AttentionRows` of a step with only sequence `row`."""
    count = rows.query_start[row + 1] - rows.query_start[row]
    ahead = None if rows.ahead is None else rows.ahead[rows.query_start[row] : rows.query_start[row + 1]]
    return type(rows)((0, count), (rows.context_lens[row],), rows.block_tables[row : row + 1], ahead)


def _attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    **options: Unpack[ScoreOptions],
) -> torch.Tensor:
    """Compute attention [R, H, D] of q [R, H, D], a token for each sequence; tables [R, blocks], contexts [R]."""
    count, heads, dim = q.shape
    size, kv_heads = key_cache.shape[1:3]
    context = tables.shape[1] * size
    at = torch.arange(context, device=q.device)
    hidden = at >= contexts[:, None]  # [R, C]
    tables = tables.masked_fill(hidden[:, ::size], 0)  # a table's entries after its context may be anything
    if (window := options.get("window")) is not None:
        hidden |= at < reference.first_seen(contexts[:, None] - 1, window)
    k = reference.blocks_of(key_cache, tables, dim).flatten(1, 2).permute(0, 2, 3, 1).float()  # [R, K, D, C]
    v = reference.blocks_of(value_cache, tables, dim).flatten(1, 2).float()
    v = v.masked_fill_(hidden[:, :, None, None], 0)  # hidden values may be NaN
    if (cache_scales := options.get("cache_scales")) is not None:
        k, v = k * cache_scales[0], v * cache_scales[1]
    scores = torch.matmul(q.float().view(count, kv_heads, -1, dim), k).mul_(options["scale"])  # [R, K, G, C]
    if (softcap := options.get("softcap")) is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if (slopes := options.get("slopes")) is not None:
        scores.sub_(slopes.float().view(kv_heads, -1, 1) * (contexts[:, None] - 1 - at)[:, None, None])
    if (relative := options.get("relative")) is not None:
        scores.add_(reference.relative_logits(*relative, contexts[:, None] - 1 - at).view(scores.shape))
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    if (sinks := options.get("sinks")) is None:
        weights = scores.softmax(-1)
    else:
        beside = sinks.float().view(1, kv_heads, -1, 1).expand(count, -1, -1, -1)
        weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    return torch.matmul(weights, v.transpose(1, 2)).view(count, heads, dim).to(q.dtype)
