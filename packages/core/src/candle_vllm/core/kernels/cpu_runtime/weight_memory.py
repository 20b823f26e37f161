# SPDX-License-Identifier: MIT
"""Memory for the weights of recorded steps, in few large pieces; used at load, before step 1 of a request's life.

A single row of activations reads all weights once, as fast as the memory goes. That needs the system's large pages: on
pages of 4 KiB, weights were read up to a third slower. Numpy asks for large pages for arrays from 4 MiB on, and most
matrices of a small model are smaller than that, so they share.
"""

from __future__ import annotations

import threading

import numpy as np

PIECE_BYTES = 64 << 20
ALIGNMENT = 64


class WeightMemory:
    """Hands out aligned memory. Matrices that share a piece keep it alive together. Safe for several threads.

    Args:
        piece_bytes: size of a piece; larger matrices have one of their own.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self._piece_bytes = piece_bytes
        self._piece = np.empty(0, np.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> np.ndarray:
        """`count` uninitialised bytes, uint8, at a multiple of 64.

        What a piece has left is abandoned when it is too small; it was never touched, so that it costs no memory.
        """
        with self._lock:
            return self._take(count)

    def _take(self, count: int) -> np.ndarray:
        space = -(-count // ALIGNMENT) * ALIGNMENT
        if self._used + space > self._piece.size:
            memory = np.empty(max(space, self._piece_bytes) + ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT
            piece = memory[start : start + memory.size - ALIGNMENT]
            if space >= self._piece_bytes:  # a piece of its own; the current one goes on being filled
                return piece[:count]
            self._piece, self._used = piece, 0
        start, self._used = self._used, self._used + space
        return self._piece[start : start + count]
