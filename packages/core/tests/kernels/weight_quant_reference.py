# SPDX-License-Identifier: MIT
"""`kernels/weight_quant` in numpy, with which tests compare the kernels: searches have equal results, bit for bit.

Searches get x float32 [G, n], a group in each row; all sums go from a group's first element to its last, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

from candle_vllm.core.kernels.weight_quant import searches
from candle_vllm.core.quantization.ggml_blocks import BlockParts, put_together
from candle_vllm.core.quantization.ggml_types import CONTENTS, IQ4_VALUES, GGMLQuantizationType

F = np.float32


def quantiser(ggml_type: GGMLQuantizationType) -> Callable[..., bool]:
    def quantise(x: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None, /) -> bool:
        if not (np.abs(x) <= searches.LARGEST).all():
            return False
        with np.errstate(all="ignore"):
            out[:] = quantised(x, ggml_type, importance)
        return True

    return quantise


def quantised(x: np.ndarray, ggml_type: GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantise blocks [N, elements] to bytes [N, bytes]."""
    name = ggml_type.name
    if name in searches.SIMPLE:
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType(ggml_type))
    weights = None if importance is None else weighed(x, importance)
    if name in searches.OFFSETS:
        return _with_offset(x, ggml_type, searches.OFFSETS[name], weights)
    if name in searches.TABLES:
        return _in_table(x, ggml_type, searches.TABLES[name], weights)
    return _scaled(x, ggml_type, searches.SCALES[name], weights)


def weighed(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Compute the weights of blocks' elements, in the shape of x, by the importance [C] of their columns."""
    of_blocks = importance.reshape(-1, x.shape[1])[np.arange(len(x)) * x.shape[1] % importance.size // x.shape[1]]
    square = x * x
    base = F(2) * (_sum(square) / F(x.shape[1]))
    return of_blocks * np.sqrt(base[:, None] + square)


def plain_weights(x: np.ndarray, floor: float, squared: bool) -> np.ndarray:
    """Compute the weights of groups' elements without an importance matrix; see the package."""
    square = x * x
    mean = _sum(square) / F(x.shape[1])
    return (F(floor) * (mean if squared else np.sqrt(mean)))[:, None] + (square if squared else np.abs(x))


def fit_offset(x: np.ndarray, weights: np.ndarray, search: searches.OffsetSearch) -> tuple[np.ndarray, np.ndarray]:
    """Find scale [G] and negated minimum [G] of groups, so that x is about scale * code - minimum.

    Try t = 0, 1, ... divides the group's span into most + first + 0.1 * t steps; the codes give scale and minimum by
    weighted least squares. The plain scale, span / most, is used unless a tried scale is better.
    """
    low = np.minimum(x.min(axis=1), F(0))
    span = x.max(axis=1) - low
    plain, most = span / F(search.most), F(search.most)
    total, weighted = _sum(weights), _sum(weights * x)
    best_error, best_scale, best_low = np.full(len(x), searches.NOTHING, F), plain, low
    for index in range(search.tries):
        inverse = (F(search.first) + F(index) * F(searches.OFFSET_STEP) + most) / span
        code = _codes(x, low, inverse, most)
        sum_l, sum_ll, sum_lx = _sum(weights * code), _sum(weights * code * code), _sum(weights * code * x)
        whole = total * sum_ll
        spread = whole - sum_l * sum_l
        scale = (total * sum_lx - weighted * sum_l) / spread
        fitted = (sum_ll * weighted - sum_l * sum_lx) / spread
        above = fitted > 0  # a minimum above 0 cannot be stored
        scale, fitted = np.where(above, sum_lx / sum_ll, scale), np.where(above, F(0), fitted)
        error = F(0) - (scale * sum_lx + fitted * weighted)
        better = (spread > whole * F(searches.LEAST_SPREAD)) & (error < best_error)
        best_error, best_scale, best_low = (
            np.where(better, new, old) for new, old in ((error, best_error), (scale, best_scale), (fitted, best_low))
        )
    plain_error, error = (
        _sum(weights * (off * off))
        for s, m in ((plain, low), (best_scale, best_low))
        for off in [s[:, None] * _codes(x, m, F(1) / s, most) + m[:, None] - x]
    )
    better = error < plain_error
    scale, low = np.where(better, best_scale, plain), np.where(better, best_low, low)
    return np.where(span == 0, F(0), scale), F(0) - low


def fit_scale(x: np.ndarray, weights: np.ndarray, search: searches.ScaleSearch) -> np.ndarray:
    """Find scales [G] by weighted least squares over the codes of several step sizes around the plain step size."""
    at = np.abs(x).argmax(axis=1)
    extreme = x[np.arange(len(x)), at]
    gain, best = np.zeros(len(x), F), np.zeros(len(x), F)
    for index in range(2 * searches.SCALE_STEPS + 1):
        wanted = F(search.half) + (F(index) - F(searches.SCALE_STEPS)) * F(searches.SCALE_STEP)
        inverse = (F(0) - wanted) / extreme
        code = np.clip(np.rint(inverse[:, None] * x), F(-search.half), F(search.half - 1))
        sum_lx, sum_ll = _sum(weights * code * x), _sum(weights * code * code)
        scale = sum_lx / sum_ll
        better = (sum_ll > 0) & (scale * sum_lx > gain)
        gain, best = np.where(better, scale * sum_lx, gain), np.where(better, scale, best)
    return np.where(extreme == 0, F(0), best)


def fit_table(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Find scales [G] by weighted least squares: the element farthest from 0 is tried near both ends of the table."""
    at = np.abs(x).argmax(axis=1)
    extreme = x[np.arange(len(x)), at]
    gain, best = np.zeros(len(x), F), np.zeros(len(x), F)
    for wanted in (first + index for first in searches.TABLE_STARTS for index in range(searches.TABLE_STEPS)):
        inverse = F(wanted) / extreme
        number = np.array(IQ4_VALUES, F)[_places(inverse[:, None] * x)]
        sum_lx, sum_ll = _sum(weights * number * x), _sum(weights * number * number)
        scale = sum_lx / sum_ll
        better = (sum_ll > 0) & (scale * sum_lx > gain)
        gain, best = np.where(better, scale * sum_lx, gain), np.where(better, scale, best)
    return np.where(extreme == 0, F(0), best)


def _places(x: np.ndarray) -> np.ndarray:
    """Return the codes of the nearest values of the table."""
    found = np.zeros(x.shape, np.uint8)
    for middle in searches.TABLE_MIDDLES:
        found += x >= F(middle)
    return found


def _sum(x: np.ndarray) -> np.ndarray:
    total = np.zeros(len(x), F)
    for column in x.T:
        total = total + column
    return total


def _codes(x: np.ndarray, low: np.ndarray, inverse: np.ndarray, most: np.float32) -> np.ndarray:
    return np.clip(np.rint(inverse[:, None] * (x - low[:, None])), F(0), most)


def _whole(values: np.ndarray, most: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Round values [N, groups] to integers times a float16 scale [N, 1]; return both."""
    at = np.abs(values).argmax(axis=1)[:, None]
    d = (np.take_along_axis(values, at, axis=1) / F(most)).astype(np.float16)
    codes = np.where(d == 0, F(0), np.rint(values / d.astype(F)))
    return np.clip(codes, low, high).astype(np.int32), d


def _with_offset(
    x: np.ndarray, kind: GGMLQuantizationType, search: searches.OffsetSearch, weights: np.ndarray | None
) -> np.ndarray:
    groups = x.reshape(-1, search.group)
    weights = plain_weights(groups, search.floor, False) if weights is None else weights.reshape(groups.shape)
    scales, mins = (found.reshape(len(x), -1) for found in fit_offset(groups, weights, search))
    (sc, d), (mn, m) = (_whole(values, search.stored, 0, search.stored) for values in (scales, mins))
    scale, low = d.astype(F) * sc.astype(F), m.astype(F) * mn.astype(F)
    shaped = x.reshape(*scale.shape, -1)
    codes = np.where(scale[..., None] == 0, F(0), np.rint((shaped + low[..., None]) / scale[..., None]))
    codes = _bytes(np.clip(codes, 0, search.most)).reshape(len(x), -1)
    parts = BlockParts(codes, d.view(np.uint8), m.view(np.uint8), _bytes(sc), _bytes(mn))
    return put_together(parts, CONTENTS[kind])


def _scaled(
    x: np.ndarray, kind: GGMLQuantizationType, search: searches.ScaleSearch, weights: np.ndarray | None
) -> np.ndarray:
    groups = x.reshape(-1, 16)
    weights = plain_weights(groups, search.floor, True) if weights is None else weights.reshape(groups.shape)
    scales = fit_scale(groups, weights, search).reshape(-1, 16)
    sc, d = _whole(scales, -search.stored, -search.stored, search.stored - 1)
    scale = (d.astype(F) * sc.astype(F))[..., None]
    codes = np.where(scale == 0, F(0), np.rint(x.reshape(-1, 16, 16) / scale))
    codes = _bytes(np.clip(codes, -search.half, search.half - 1)).reshape(len(x), -1)
    return put_together(BlockParts(codes, d.view(np.uint8), scales=_bytes(sc)), CONTENTS[kind])


def _in_table(x: np.ndarray, kind: GGMLQuantizationType, stored: int, weights: np.ndarray | None) -> np.ndarray:
    groups = x.reshape(-1, 32)
    weights = plain_weights(groups, searches.TABLE_FLOOR, True) if weights is None else weights.reshape(groups.shape)
    scales = fit_table(groups, weights).reshape(len(x), -1)
    if stored:
        sc, d = _whole(scales, -stored, -stored, stored - 1)
    else:
        sc, d = None, scales.astype(np.float16)
    scale = d.astype(F) * (F(1) if sc is None else sc.astype(F))
    places = np.where(scale[..., None] == 0, F(0), x.reshape(*scale.shape, -1) / scale[..., None])
    parts = BlockParts(_places(places).reshape(x.shape), d.view(np.uint8), scales=None if sc is None else _bytes(sc))
    return put_together(parts, CONTENTS[kind])


def _bytes(numbers: np.ndarray) -> np.ndarray:
    """Convert integers to the bits of int8."""
    return numbers.astype(np.int8).view(np.uint8)
