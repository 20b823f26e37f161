# SPDX-License-Identifier: MIT
"""Quantise rows of floats to ggml's blocks, at load and for GGUF files, in chunks and on several threads.

`quantization/ggml_types.py` describes the blocks; `kernels/weight_quant` has the algorithms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from candle_vllm.core.config import ISQ_NAMES
from candle_vllm.core.kernels import weight_quant
from candle_vllm.core.kernels.weight_quant.searches import LARGEST
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.threads import in_chunks

CHUNK = 1 << 18
"""Weights that a thread quantises at a time (at least one row), so that the data stays in the cache."""

BY_ROW = "w8a8"
"""Name in the setting `isq` of Q8_0 with one scale for each row, see `quantise_rows`."""

ISQ_TYPES: Mapping[str, GGMLQuantizationType] = MappingProxyType(
    {name: GGMLQuantizationType[re.sub("k$", "_K", name.replace(BY_ROW, "q8_0")).upper()] for name in ISQ_NAMES}
)
"""Types that weights can be quantised to, by their names in the setting `isq`."""

SOURCES = ("F32", "BF16", "F16", "F64")
"""Types of the weights that can be quantised."""


def fitting_type(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType | None:
    """Return `kind` if its blocks divide rows of `columns` elements, otherwise a type with blocks of 32, or None."""
    similar = GGMLQuantizationType.IQ4_NL if kind == GGMLQuantizationType.IQ4_XS else GGMLQuantizationType.Q8_0
    for choice in (kind, similar):
        if columns and columns % choice.block[0] == 0:
            return choice
    return None


def quantise(
    raw: np.ndarray, stored: str, columns: int, kind: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """Quantise rows; uses a few MB for each thread besides the result.

    Args:
        raw: the rows' bytes, uint8 [R, bytes per row]; need not be aligned.
        stored: type of the elements, one of `SOURCES`.
        columns: elements of a row, a multiple of the type's block.
        kind: one of the types of `ISQ_TYPES`.
        importance: float32 [E, C] for C columns, or None; entry e is for rows e * R / E .. (e + 1) * R / E - 1.

    Returns:
        The blocks, uint8 [R, bytes per row].

    Raises:
        ValueError: an element is not finite, or beyond 65,504.
    """
    size, width = kind.block
    assert columns % size == 0, (columns, kind)
    rows, run = len(raw), weight_quant.quantiser(kind)
    out = np.empty((rows, columns // size * width), np.uint8)
    each = rows if importance is None else rows // len(importance)
    step = max(1, min(CHUNK // columns, each))
    chunks = -(-each // step)  # of the rows that have the same importance

    def job(number: int, _: int) -> None:
        entry, chunk = divmod(number, chunks)
        first = entry * each + chunk * step
        last = min(first + step, (entry + 1) * each)
        values = read_plain(np.ascontiguousarray(raw[first:last]), stored, (last - first, columns), "F32")
        given = None if importance is None else importance[entry]
        _check(run(values.reshape(-1, size), out[first:last].reshape(-1, width), given))

    in_chunks(job, rows // max(1, each) * chunks, 1)
    return out


def quantise_rows(raw: np.ndarray, stored: str, columns: int) -> np.ndarray:
    """Quantise rows to blocks of Q8_0 that have one scale for each row, its largest magnitude divided by 127.

    Arguments, result and errors are those of `quantise`.
    """
    rows, blocks = len(raw), columns // 32
    out = np.empty((rows, blocks, 34), np.uint8)

    def job(first: int, last: int) -> None:
        values = read_plain(np.ascontiguousarray(raw[first:last]), stored, (last - first, columns), "F32")
        largest = np.abs(values).max(1, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore"):  # it holds for one thread
            halves = (largest / np.float32(127)).astype(np.float16)
            scales = halves.astype(np.float32)
            codes = np.rint(np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)).clip(-127, 127)
            codes = codes.astype(np.int8).view(np.uint8)
        out[first:last, :, :2] = halves.view(np.uint8)[:, None]
        out[first:last, :, 2:] = codes.reshape(last - first, blocks, 32)
        _check(bool((largest <= LARGEST).all()))

    in_chunks(job, rows, max(1, CHUNK // columns))
    return out.reshape(rows, -1)


def _check(good: bool) -> None:
    if not good:
        raise ValueError(f"an element is not finite, or beyond {LARGEST:,.0f}")
