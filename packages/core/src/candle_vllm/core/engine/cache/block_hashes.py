# SPDX-License-Identifier: MIT
"""Hash the full blocks of a sequence (step 4 of a request's life)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType


def block_hashes(
    tokens: Sequence[int],
    block_size: int,
    salt: str | None,
    parents: Sequence[bytes] = (),
    marks: Mapping[int, bytes] = MappingProxyType({}),
) -> list[bytes]:
    """Return chained SHA-256 hashes of the full blocks of `tokens`; `parents` are the hashes of the first blocks.

    `marks` are bytes by block that change the hash of the block and of all later ones, such as an adapter's digest.

    The hash is SHA-256, not a faster one, because a collision would show one user another user's context.
    """
    hashes = list(parents)
    parent = hashes[-1] if hashes else hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        if mark := marks.get(start // block_size):
            parent = hashlib.sha256(parent + b"mark:" + mark).digest()
        parent = hashlib.sha256(parent + array("q", tokens[start : start + block_size]).tobytes()).digest()
        hashes.append(parent)
    return hashes
