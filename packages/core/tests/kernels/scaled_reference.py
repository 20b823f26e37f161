# SPDX-License-Identifier: MIT
"""Decode FP8 and FP4 weights in plain numpy: the reference of the tests."""

from __future__ import annotations

import numpy as np

from candle_vllm.core.kernels.scaled_linear.layout import HEAD_BYTES, ROWS, ScaledKind, ScaledMatrix
from candle_vllm.core.quantization.group_codes import nibbles
from candle_vllm.core.quantization.plain import read_plain

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack(matrix: ScaledMatrix) -> np.ndarray:
    """Return the weights as float32 [N, K]: each float times its scale, rounded once. A NaN scale gives a NaN span."""
    found, paired = [], 2 * matrix.pairs
    for start in range(0, paired, 2):
        pair = matrix.data[:, start * matrix.span_bytes : (start + 2) * matrix.span_bytes]
        turns = pair[:, 2 * HEAD_BYTES :].reshape(len(pair), -1, 2, matrix.kind.turn_bytes)
        found += [_span(pair[:, at * HEAD_BYTES :], turns[:, :, at], matrix.kind) for at in range(2)]
    for start in range(paired, matrix.spans):
        span = matrix.data[:, start * matrix.span_bytes : (start + 1) * matrix.span_bytes]
        turns = span[:, HEAD_BYTES:].reshape(len(span), -1, matrix.kind.turn_bytes)
        found.append(_span(span, turns, matrix.kind))
    return np.concatenate(found, axis=2).reshape(len(matrix.data) * ROWS, -1)[: matrix.rows, : matrix.columns]


def _span(head: np.ndarray, turns: np.ndarray, kind: ScaledKind) -> np.ndarray:
    """Return a span's weights [tiles, 16, columns] from its scales, the first bytes of `head`, and its `turns`."""
    tiles = len(turns)
    scales = head[:, :HEAD_BYTES].copy().view(np.float32) / np.float32(kind.factor)
    codes = turns[..., -8 * ROWS :]
    if kind is ScaledKind.E2M1:
        codes = codes.reshape(tiles, -1, 4, ROWS, 2)
    else:
        codes = codes.reshape(tiles, -1, 2, ROWS, 4)[..., [0, 2, 1, 3]]
    numbers = _widened(np.ascontiguousarray(codes.transpose(0, 3, 1, 2, 4)).reshape(tiles, ROWS, -1), kind)
    if kind is ScaledKind.E2M1:
        groups = _widened(np.ascontiguousarray(turns[..., :ROWS].transpose(0, 2, 1)), ScaledKind.E4M3)
        numbers = numbers * np.repeat(groups, kind.turn_columns, axis=2)
    with np.errstate(all="ignore"):  # scales may be infinite or NaN
        return numbers * scales[..., None]


def _widened(codes: np.ndarray, kind: ScaledKind) -> np.ndarray:
    """Convert the bits of small floats, uint8, to float32."""
    if kind is ScaledKind.E2M1:
        return np.array([*_E2M1, *(-x for x in _E2M1)], np.float32)[nibbles(codes)]
    return read_plain(codes, "F8_E4M3" if kind is ScaledKind.E4M3 else "F8_E5M2", codes.shape, "F32")
