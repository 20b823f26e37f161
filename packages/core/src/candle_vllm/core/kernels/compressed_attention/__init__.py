# SPDX-License-Identifier: MIT
"""Attention over the last tokens and over compressed entries, each of which stands for a group of tokens.

Caches. A token has a **row** of D elements, which is its key and its value for all heads; its last R elements are
rotated in pairs of adjacent elements. Rows are in a paged cache [B, S, 1, D] of which the window is read. A group of
`ratio` tokens, a power of two, has an **entry** [D] in a paged log [B, S, 1, E], in the block of the group's last
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

Scores and sums are fp32. A token's result depends on its own sequence alone.
Source: DeepSeek-AI, 2026, DeepSeek-V4, sections 2.3.1 and 2.3.2; transformers' `DeepseekV4Attention`.
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
    """

    ratio: int
    size: int
    overlaps: bool

    @property
    def width(self) -> int:
        """W, elements of kv and of the gate of a token."""
        return self.size * (1 + self.overlaps)


class EntryParts(NamedTuple):
    """Weights of `compress`.

    Attributes:
        bias: [ratio, W] fp32.
        norm, eps: weight [D] fp32 and epsilon of the norm.
        cos, sin: tables [positions, R / 2] fp32.
    """

    bias: Any
    norm: Any
    eps: float
    cos: Any
    sin: Any


class IndexQueries(NamedTuple):
    """An index of entries.

    Attributes:
        q: [T, Hi, Di], rotated.
        weights: [T, Hi].
        log: paged log of keys.
        size, top: Di, and the maximum number of entries that a token attends to.
    """

    q: Any
    weights: Any
    log: Any
    size: int
    top: int


@dataclasses.dataclass(frozen=True, eq=False)
class CompressedLayer:
    """Sizes and weights of a layer's attention in recorded steps.

    Attributes:
        heads, size: H and D.
        window, scale: positions of the window, and factor of the scores.
        norm, eps: weight [D] and epsilon of the norm of rows.
        cos, sin: tables [positions, R / 2].
        sinks: [H].
        entries: groups and weights of the entries, and of the index keys if the layer has an index; or empty.
        index_heads, index_size, top: Hi, Di, and the maximum number of entries of a token; 0 without an index.
    """

    heads: int
    size: int
    window: int
    scale: float
    norm: Any
    eps: float
    cos: Any
    sin: Any
    sinks: Any
    entries: tuple[tuple[Groups, EntryParts], ...] = ()
    index_heads: int = 0
    index_size: int = 0
    top: int = 0
