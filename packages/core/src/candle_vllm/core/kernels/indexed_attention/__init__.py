# SPDX-License-Identifier: MIT
"""Attention to blocks of positions that an indexer chooses by pooled keys, with plain keys and values (QSA of Qwen4).

The indexer caches a row [key | cos | sin] for each position, [B, S, 1, Di + R]: its key before norm and rotation, and
the cosines and sines by which the position is rotated. A group of `pool` neighbouring positions, a power of two that
divides S, has a pooled key: the mean of its keys, normalised (RMSNorm with a weight [Di]), the first R elements rotated
by the group's first position. It replaces the key of the group's last position. The score of a group is the sum over
index heads of relu(q . key), in fp32. A token attends to the top // pool whole groups with the largest scores, among
equal scores the earlier ones, and to all positions after the last whole group; `top` is pool - 1 more than a multiple
of `pool`. A token's result depends on its own sequence alone. Source: transformers' `Qwen4ExpTextQSAIndexer`.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class IndexedLayer(NamedTuple):
    """A layer's weights and sizes.

    Attributes:
        scale: factor of the scores of attention.
        top, pool: see above.
        norm, eps: weight [Di] fp32 and epsilon of the norm of pooled keys.
        cos, sin: tables [positions, R / 2] fp32.
    """

    scale: float
    top: int
    pool: int
    norm: Any
    eps: float
    cos: Any
    sin: Any
