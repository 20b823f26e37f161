# SPDX-License-Identifier: MIT
"""Random numbers (step 7 of a request's life): a uniform per (seed, sequence, position), with no state to save.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11). Its output is
a pure function of a 128-bit counter and a 64-bit key, so that a request's random numbers do not depend on the rest of
the batch, on preemption, or on how prompts are split into chunks. The counter's layout, which is part of the guarantee
that a seed gives the same text:

    key      seed mod 2**64, low word first
    counter  [position, sequence index, 1 where the seed is negative else 0, stream]

The sign has its own word because -1 and 2**64 - 1 are different seeds that share a key. Stream 0 samples tokens, stream
1 decides whether XTC removes tokens at a position.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)  # multipliers of counter words 0 and 2
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def fresh_seed() -> int:
    """Return 64 random bits of the operating system, for a request without a seed."""
    return secrets.randbits(64)


def seed_words(seed: int, index: int) -> tuple[int, int, int, int]:
    """Return the constant words of one sequence: (key low, key high, sequence index, sign).

    `seed` is -2**63 to 2**64 - 1; `index`, below 2**32, is the sequence's number among the request's `n` sequences.
    """
    key = seed & 0xFFFF_FFFF_FFFF_FFFF
    return key & 0xFFFF_FFFF, key >> 32, index, int(seed < 0)


def uniforms(
    words: Sequence[tuple[int, int, int, int]], first: Sequence[int], count: int, stream: int = 0
) -> NDArray[np.float64]:
    """Return the random numbers of some sequences, each for `count` positions from its first on.

    Args:
        words: `seed_words` of R sequences.
        first: [R] numbers of tokens that a sequence has generated when its first number is used; below 2**32 - `count`.
        stream: the stream of the numbers, see above.

    Returns:
        [R, count] float64, uniform on the open interval (0, 1): odd multiples of 2**-53, made of 52 random bits.
    """
    given = np.array(words, np.uint32).repeat(count, 0)  # [R * count, 4]
    counter = np.zeros_like(given)
    counter[:, 0] = (np.array(first)[:, None] + np.arange(count)).reshape(-1)
    counter[:, 1:3] = given[:, 2:]
    counter[:, 3] = stream
    block = philox4x32(counter, given[:, :2])
    bits = (block[:, 0].astype(np.uint64) << np.uint64(20)) | (block[:, 1] >> np.uint32(12))
    return ((bits.astype(np.float64) + 0.5) * 2.0**-52).reshape(-1, count)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return Philox4x32-10, [N, 4], of counters [N, 4] and keys [N, 2]."""
    turns = np.arange(_ROUNDS, dtype=np.uint32)[:, None, None]
    keys = (key + turns * _KEY_STEPS).astype(np.uint64)  # [rounds, N, 2]; the uint32 sum wraps, as it should
    wide = counter.astype(np.uint64)
    even, odd = wide[:, ::2], wide[:, 1::2]
    for turn in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even = (product >> _SHIFT)[:, ::-1] ^ odd ^ keys[turn]
        odd = (product & _LOW)[:, ::-1]
    return np.stack((even, odd), axis=2).reshape(-1, 4).astype(np.uint32)
