# SPDX-License-Identifier: MIT
"""The linear layer with 14-bit weights in plain numpy: the reference of the tests."""

from __future__ import annotations

import numpy as np

from candle_vllm.core.kernels.activation_rows import GROUP
from candle_vllm.core.kernels.plain_linear.layout import ROWS
from candle_vllm.core.kernels.word_linear.layout import GROUP_BYTES, SCALES, STEPS, WordMatrix


def parts(matrix: WordMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers int16 [N, G, 32] and scales float32 [N, G] of a matrix."""
    tiles = matrix.data.reshape(-1, matrix.length, GROUP_BYTES)
    words = np.ascontiguousarray(tiles[:, :, :SCALES]).view(np.int16).reshape(-1, matrix.length, STEPS, ROWS, 2)
    scales = np.ascontiguousarray(tiles[:, :, SCALES:]).view(np.float32)
    rows = words.transpose(0, 3, 1, 2, 4).reshape(-1, matrix.length, GROUP)
    return rows[: matrix.rows], scales.transpose(0, 2, 1).reshape(-1, matrix.length)[: matrix.rows]


def unpack(matrix: WordMatrix) -> np.ndarray:
    """Return the weights as float32 [N, K]."""
    words, scales = parts(matrix)
    return (words * scales[..., None]).reshape(matrix.rows, -1)[:, : matrix.columns].astype(np.float32)
