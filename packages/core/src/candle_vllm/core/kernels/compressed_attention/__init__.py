# SPDX-License-Identifier: MIT
"""Attention to groups of positions: entries that stand for groups, and an index that chooses groups.

Three families share these ideas; they differ in what an entry is, where it is, and what tokens attend to:

| | DeepSeek V4 | Qwen4 | GLM-5.3-Flash |
|---|---|---|---|
| index key | weighted by gates, rotated in pairs, in a log | mean, rotated in halves | weighted by gates |
| a token attends to | a window, and entries | positions of chosen groups | positions of chosen groups |
| layers | `models/deepseek_v4_attention.py` | `models/block_index.py` | `models/pooled_index.py` |

A pooled key of Qwen4 or GLM-5.3-Flash replaces the index key of its group's last position, which nothing else reads, so
that it needs no cache of its own. GLM's are bfloat16, and `kernels/latent_attention` computes them, because they are
keys of its indexer; this package has the other two. V4's entries are also attention's keys, and its inputs are no
longer needed once their groups have ended: they are in the pages of the window, and entries in a log.

**DeepSeek V4.** A token has a **row** of D elements, which is its key and its value for all heads; its last R elements
are rotated in pairs of adjacent elements. Rows are in a paged cache [B, S, 1, D] of which the window is read. A group
of `ratio` tokens, a power of two, has an **entry** [D] in a paged log [B, S, 1, E], in the block of the group's last
token: entry S / ratio * b + n is n-th in the memory of the sequence's block b, or, if S < ratio, the block of the
group's last token has one entry. E is `entry_share(D, ratio)` and S at least `LEAST_BLOCK`, so that entries fit.

`compress`: a token also has an **input** kv [W] and gate [W] in the paged cache [B, S, 1, C]. W is D, or 2 D if groups
overlap: the first D elements are for the entry of the next group, the last D for the entry of the token's own group.
The entry is the sum of kv over the group (and over the group before, where there is one), weighted for each element by
softmax(gate + bias), with a bias [ratio, W] for each place in a group. It is normalised (RMSNorm with a weight [D]) and
rotated by the position of its group's first token. Only groups that end in this step get an entry.

`attend`: the token at position p attends to the rows p - window + 1 .. p, to the entries of the groups that end at p or
earlier, and to a sink for each head, by one softmax. With an index it attends to the `top` of these entries with the
largest scores, among equal scores the earlier entries: score(e) = sum over index heads of weight * relu(q . key(e)),
with keys [Di] in a log of their own. The result [T, H, D] is the weighted sum of rows and entries.

**Qwen4** (recorded steps only; `models/block_index.py` computes the same op by op). Keys and values are plain. The
index caches a row [key | cos | sin] for each position, [B, S, Di + R]: its key before norm and rotation, and the
cosines and sines by which the position is rotated. The pooled key of `ratio` neighbouring positions, which divides S,
is the mean of their keys, normalised, the first R elements rotated in halves by the group's first position. The index
has weights of 1. A token attends to its chosen groups, and to all positions after the last whole group.

Caches of recorded steps are float32. Scores and sums are fp32. A token's result depends on its own sequence alone.
Source: DeepSeek-AI, 2026, DeepSeek-V4, sections 2.3.1 and 2.3.2; transformers' `DeepseekV4Attention` and
`Qwen4ExpTextQSAIndexer`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

LEAST_BLOCK = 16
"""Minimum tokens of a block, S."""


def entry_share(size: int, ratio: int) -> int:
    """Return E, the elements of the log for each token, for entries of `size` elements."""
    return -(-size // min(ratio, LEAST_BLOCK))


@dataclasses.dataclass(frozen=True)
class Groups:
    """How tokens become entries.

    Attributes:
        ratio: tokens of a group.
        size: D.
        overlaps: whether an entry also stands for the group before.
        gated: whether gates weight the tokens; otherwise an entry is a pooled key of Qwen4.
    """

    ratio: int
    size: int
    overlaps: bool = False
    gated: bool = True

    @property
    def width(self) -> int:
        """W, elements of kv and of the gate of a token."""
        return self.size * (1 + self.overlaps)


class EntryParts(NamedTuple):
    """Weights of `compress`.

    Attributes:
        bias: [ratio, W] fp32; None without gates.
        norm, eps: weight [D] fp32 and epsilon of the norm.
    """

    bias: Any
    norm: Any
    eps: float


class IndexQueries(NamedTuple):
    """An index of entries.

    Attributes:
        q: [T, Hi, Di], rotated.
        weights: [T, Hi]; None for weights of 1.
        log: paged log of keys.
        groups: how tokens become keys.
        top: maximum number of entries that a token attends to.
    """

    q: Any
    weights: Any
    log: Any
    groups: Groups
    top: int
