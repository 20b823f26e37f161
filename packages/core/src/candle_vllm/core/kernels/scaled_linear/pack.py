# SPDX-License-Identifier: MIT
"""Pack matrices of small floats with scales into the layout of `layout.py`, once, when a model is loaded."""

from __future__ import annotations

from functools import cache

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, pack_tiles
from candle_vllm.core.kernels.plain_linear.pack import check_shape
from candle_vllm.core.kernels.scaled_linear.layout import HEAD_BYTES, MOST_SPAN, ROWS, ScaledKind, ScaledMatrix
from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.quantization.scaled_codes import GROUP, ScaledCodes

LEAST_SPAN = 8
"""An FP8 scale covers a multiple of this number of columns, or all; a row of NVFP4 has one scale for all columns."""


def pack(codes: ScaledCodes, memory: WeightMemory | None = None) -> ScaledMatrix:
    """Pack a matrix; its weights stay exact.

    Args:
        codes: all rows of the matrix.
        memory: allocator of the result, shared by a model's matrices; None allocates separately.

    Raises:
        UnsupportedModelError: no kernel multiplies such a matrix.
        ValueError: the shapes of the arrays do not fit each other.
    """
    kind = ScaledKind[codes.numbers.upper()]
    rows, columns = len(codes.codes), codes.columns
    span_turns = _span_turns(codes, kind)
    tiles = -(-rows // ROWS)
    empty = ScaledMatrix(rows, columns, kind, np.empty(0, np.uint8), span_turns)
    data = (memory or WeightMemory(0)).take(tiles * empty.tile_bytes, tiles).reshape(tiles, -1)
    matrix = ScaledMatrix(rows, columns, kind, data, span_turns)

    def job(first: int, last: int) -> None:
        _store(codes.take(slice(first * ROWS, last * ROWS)), matrix, data[first:last])

    pack_tiles(job, tiles, columns)
    return matrix


def check_span(span: int, columns: int) -> None:
    """Raise `UnsupportedModelError` if no kernel supports a scale for `span` of a matrix's columns."""
    if span < columns and span % LEAST_SPAN:
        raise UnsupportedModelError(f"a scale for {span} columns has no kernel: it must cover a multiple of 8, or all")


def _span_turns(codes: ScaledCodes, kind: ScaledKind) -> int:
    """Check the arrays; return the number of turns of a span (see `layout.py`)."""
    rows, columns = len(codes.codes), codes.columns
    check_shape(rows, columns)
    spans = 1 if codes.span >= columns else -(-columns // codes.span)
    grouped = kind is ScaledKind.E2M1
    groups = (rows, columns // GROUP) if grouped else None
    if (
        codes.codes.dtype != np.uint8
        or codes.scales.dtype != np.float32
        or codes.scales.shape != (rows, spans)
        or groups != (None if codes.groups is None else codes.groups.shape)
        or (grouped and (columns % GROUP or (spans > 1 and codes.span % GROUP)))
    ):
        raise ValueError(
            f"codes of a matrix of {rows} x {columns} came with scales of shape {codes.scales.shape} for spans of "
            f"{codes.span}, and groups {None if codes.groups is None else codes.groups.shape}"
        )
    if kind is ScaledKind.E5M2 and (codes.codes & 0x7F == 0x7C).any():
        raise UnsupportedModelError("infinite weights have no kernel")
    finite = np.abs(codes.scales[np.isfinite(codes.scales)])
    if finite.size and finite.max() > np.finfo(np.float32).max / kind.factor:
        raise UnsupportedModelError(f"a scale of {finite.max():g} is too large for the kernel of {kind.name}")
    most = MOST_SPAN // kind.turn_columns
    if spans == 1:
        return most
    check_span(codes.span, columns)
    turns = codes.span // kind.turn_columns
    return next(count for count in range(min(most, turns), 0, -1) if turns % count == 0)


def _store(codes: ScaledCodes, matrix: ScaledMatrix, tiles: np.ndarray) -> None:
    """Write rows of weights to their tiles, uint8 [tiles, bytes of a tile]."""
    kind, turns, spans = matrix.kind, matrix.turns, matrix.spans
    rows, each = len(tiles) * ROWS, matrix.span_turns * kind.turn_columns
    scales = _filled(codes.scales[:, np.arange(spans) * each // codes.span], (rows, spans))
    width = kind.turn_columns // (2 if kind is ScaledKind.E2M1 else 1)
    data = _filled(codes.codes, (rows, turns * width))
    groups = None if codes.groups is None else _filled(codes.groups, (rows, turns))
    if kind is ScaledKind.E4M3:
        data, scales = _raised(data, scales, each)
    stored = np.empty((len(tiles), turns, kind.turn_bytes), np.uint8)
    if groups is not None:
        stored[..., :ROWS] = groups.reshape(len(tiles), ROWS, turns).transpose(0, 2, 1)
        words = data.view(np.uint16)
    else:
        words = np.ascontiguousarray(data).view(np.uint32)
        words = words & 0xFF0000FF | words >> 8 & 0xFF00 | words << 8 & 0xFF0000  # columns 0, 2, 1, 3
    vectors = words.reshape(len(tiles), ROWS, turns, -1).transpose(0, 2, 3, 1)
    stored[..., -8 * ROWS :].view(words.dtype).reshape(vectors.shape)[:] = vectors  # `reshape` gives a view
    with np.errstate(over="ignore"):  # infinite scales stay infinite
        scales = scales * np.float32(kind.factor)
    is_nan = (data if groups is None else groups) & 0x7F
    is_nan = is_nan > 0x7C if kind is ScaledKind.E5M2 else is_nan == 0x7F
    if is_nan.any():
        row, column = is_nan.nonzero()
        scales[row, column // (each if groups is None else matrix.span_turns)] = np.nan
    heads = np.ascontiguousarray(scales.reshape(len(tiles), ROWS, spans).transpose(0, 2, 1)).view(np.uint8)
    paired, length = 2 * matrix.pairs, matrix.span_turns
    pairs = tiles[:, : paired * matrix.span_bytes].reshape(len(tiles), matrix.pairs, 2 * matrix.span_bytes)
    pairs[..., : 2 * HEAD_BYTES] = heads[:, :paired].reshape(len(tiles), matrix.pairs, 2 * HEAD_BYTES)
    whole = stored[:, : paired * length].reshape(len(tiles), matrix.pairs, 2, length, kind.turn_bytes)
    target = whole.transpose(0, 1, 3, 2, 4)
    pairs[..., 2 * HEAD_BYTES :].reshape(target.shape)[:] = target
    for span in range(paired, spans):
        part = tiles[:, span * matrix.span_bytes :][:, : matrix.span_bytes]
        part[:, :HEAD_BYTES] = heads[:, span]
        part[:, HEAD_BYTES:] = stored[:, span * length : (span + 1) * length].reshape(len(tiles), -1)


def _raised(codes: np.ndarray, scales: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Multiply e4m3 codes [R, K] of a span by the largest 2^i, and divide its scale in [R, spans] by it unless tiny."""
    table, rooms = _raised_codes()
    (rows, columns), spans = codes.shape, scales.shape[1]
    whole = _filled(codes, (rows, spans * each)).reshape(rows, spans, each)
    sizes = whole & 0x7F
    shifts = np.where(np.abs(scales) > 2.0**-100, rooms[sizes.max(axis=2)], 0)  # smaller scales would be rounded
    if not shifts.any():
        return codes, scales
    raised = whole + (8 * shifts).astype(np.uint8)[..., None]  # the exponent is above three bits of mantissa
    small = np.flatnonzero(sizes < 8)  # the few subnormal codes and zeros, to which no exponent can be added
    raised.reshape(-1)[small] = table[shifts.reshape(-1)[small // each], whole.reshape(-1)[small]]
    return raised.reshape(rows, -1)[:, :columns], np.ldexp(scales, -shifts)


@cache
def _raised_codes() -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of e4m3 numbers times 2^i, uint8 [18, 256], and each positive code's largest i, int32 [128]."""
    numbers = read_plain(np.arange(256, dtype=np.uint8), "F8_E4M3", (256,), "F32")
    positive = numbers[:127]  # in order of codes; code 127 is NaN, which also stands for larger results
    codes = np.full((18, 256), 0x7F, np.uint8)
    for i, row in enumerate(codes):
        wanted = positive * np.float32(2.0**i)
        there = wanted <= positive[-1]
        row[:127][there] = np.searchsorted(positive, wanted[there])
        row[128:] = row[:128] | 0x80
    rooms = np.zeros(128, np.int32)
    rooms[1:127] = np.floor(np.log2(positive[-1] / positive[1:]))
    return codes, rooms


def _filled(numbers: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return `numbers` padded with zeros to a contiguous matrix of `shape`."""
    if numbers.shape == shape:
        return np.ascontiguousarray(numbers)
    return np.pad(numbers, [(0, shape[0] - numbers.shape[0]), (0, shape[1] - numbers.shape[1])])
