# SPDX-License-Identifier: MIT
"""The plain linear layer in plain numpy: the reference of the tests."""

from __future__ import annotations

import numpy as np

from candle_vllm.core.kernels.activation_rows import SEGMENT
from candle_vllm.core.kernels.plain_linear.layout import ROWS, PlainKind, PlainMatrix
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain


def round_activations(x: np.ndarray, kind: PlainKind) -> np.ndarray:
    """Return float32 activations as the kernels of a kind use them: rounded to bfloat16, int8 times scale, or equal."""
    if kind is PlainKind.W8A8:
        padded = np.zeros((len(x), -(-x.shape[1] // SEGMENT), SEGMENT), np.float32)
        padded.reshape(len(x), -1)[:, : x.shape[1]] = x
        scales = np.abs(padded).max(2, keepdims=True) / np.float32(127)
        rounded = np.rint(padded * (np.float32(1) / np.where(scales > 0, scales, np.float32(1)))) * scales
        return rounded.reshape(len(x), -1)[:, : x.shape[1]]
    if kind is not PlainKind.BF16:
        return x
    rounded = read_plain(np.ascontiguousarray(x).view(np.uint8), "F32", x.shape, "BF16")
    return read_plain(rounded.view(np.uint8), "BF16", x.shape, "F32")


def linear(weight: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Multiply weight [N, K] by rounded activations [T, K], plus bias [N]: float32 [T, N], summed in float64."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return (y if bias is None else y + bias).astype(np.float32)


def unpack(matrix: PlainMatrix) -> np.ndarray:
    """Return the exact weights as float32 [N, K]."""
    kind, tiles, count = matrix.kind, len(matrix.data), matrix.kind.steps(matrix.columns)
    if kind is PlainKind.W8A8:
        codes, scales = matrix.data[:, : -4 * ROWS], np.ascontiguousarray(matrix.data[:, -4 * ROWS :]).view(np.float32)
        rows = codes.reshape(tiles, count, ROWS, 4).transpose(0, 2, 1, 3).reshape(tiles * ROWS, -1)
        weights = (rows.astype(np.float32) - 128) * scales.reshape(-1, 1)
        return np.ascontiguousarray(weights[: matrix.rows, : matrix.columns])
    numbers = matrix.data.reshape(-1).view(ELEMENTS[kind.name])
    steps = numbers.reshape(tiles, count, ROWS, kind.step_columns).transpose(0, 2, 1, 3)
    rows = np.ascontiguousarray(steps).reshape(tiles * ROWS, -1)[: matrix.rows, : matrix.columns]
    return read_plain(np.ascontiguousarray(rows).view(np.uint8), kind.name, rows.shape, "F32")
