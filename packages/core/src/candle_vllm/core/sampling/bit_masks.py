"""Masks of a bit for each token, on logits in the host's memory (step 7 of ten).

A byte of the mask becomes eight limits by a table, and a logit the smaller of itself and its limit: +inf leaves it as
it is, -inf forbids it. That takes as long however many tokens are allowed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _limits() -> NDArray[np.void]:
    flags = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = np.where(flags, np.float32(np.inf), np.float32(-np.inf)).view("V32").ravel()
    table.flags.writeable = False
    return table


_LIMITS = _limits()  # eight limits as one value, so that they are taken at once


def mask_row(row: NDArray[np.float32], bits: NDArray[np.int32]) -> None:
    """Makes the logits of tokens that are not allowed -inf, in place.

    Args:
        row: [V], contiguous. NaN stays; where +inf was there, the row holds NaN afterwards, so that a broken model
            never passes for a working one.
        bits: [ceil(V / 32)], bit i % 32 of word i // 32 is 1 where token i is allowed.
    """
    broken = not row.max() < np.inf
    limits = _LIMITS.take(bits.view(np.uint8)).view(np.float32)
    np.minimum(row, limits[: len(row)], out=row)
    if broken:
        row[0] = np.nan


def mask_flags(bits: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """[V] whether each token is allowed."""
    return np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
