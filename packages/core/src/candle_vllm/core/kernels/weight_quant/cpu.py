# SPDX-License-Identifier: MIT
"""Compiled functions that quantise weights, one for each type; they release the GIL and share no memory.

A batch is 16 groups, searched at once: one block with groups of 16, two with groups of 32, or 16 of IQ4_NL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float_from_bits, int32_at, int64_at, uint8_at
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.weight_quant import cpu_search, searches
from candle_vllm.core.quantization.ggml_types import CONTENTS, GGMLQuantizationType

_MAGNITUDE = np.int32(0x7FFFFFFF)
_LARGEST_BITS = np.int32(0x477FE000)  # bits of float32 65504
_SMALLEST = np.float32(1e-37)
_SHIFTER = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to nearest even

inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@inner
def _half(value):
    """Return the bits of the float16 nearest to a float32 that is not NaN, ties to even."""
    bits = cpu_search.bits_of(value)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size < 0x38800000:  # below the smallest normal number: a multiple of 2^-24
        scaled = np.float32(float_from_bits(size) * np.float32(16777216.0))
        return sign | np.int64(np.float32(np.float32(scaled + _SHIFTER) - _SHIFTER))
    rounded = size + 0x0FFF + ((size >> 13) & 1) - 0x38000000
    return sign | min(rounded >> 13, 0x7C00)


@inner
def _value(half):
    """Convert the bits of a finite float16 to float32."""
    sign = np.float32(-1.0) if half & 0x8000 else np.float32(1.0)
    size = half & 0x7FFF
    if size < 0x400:
        return np.float32(sign * np.float32(np.float32(size) * np.float32(2.0**-24)))
    return np.float32(sign * float_from_bits((size << 13) + 0x38000000))


@inner
def _store_half(out, at, half):
    out[at] = half & 255
    out[at + 1] = half >> 8


@inner
def _round(value):
    return np.int32(np.float32(value + _SHIFTER) - _SHIFTER)


# ---- the simple types ------------------------------------------------------------------------------------------------


@inner
def _ends(x):
    """Return the bits of the smallest and the largest of the 32 floats at an address."""
    both: Any = cpu_search.ends_of_32(x)
    return np.int32(both & 0xFFFFFFFF), np.int32(both >> 32)


@inner
def _extreme(x, bits):
    """Return the bits of the first of the 32 floats that are farthest from 0."""
    low, high = _ends(x)
    below, above = low & _MAGNITUDE, high & _MAGNITUDE
    if low < 0 and (high < 0 or below > above):
        return low
    if low >= 0 or above > below:
        return high
    for i in range(32):
        if bits[i] & _MAGNITUDE == above:
            return bits[i]
    return high


@inner
def _fits(bits):
    return (bits & _MAGNITUDE) <= _LARGEST_BITS


@inner
def _inverse(d):
    """Return 1 / d, or 0 if |d| is below 1e-37; the scale d is then stored as 0."""
    return np.float32(0.0) if abs(d) < _SMALLEST else np.float32(np.float32(1.0) / d)


@inner
def _float(bits):
    return np.float32(float_from_bits(np.int64(bits)))


def _make_symmetric(BITS: int) -> Callable[..., Any]:
    """Compile q4_0 or q5_0: the element farthest from 0 becomes the lowest code."""
    HALF, BYTES = 1 << (BITS - 1), 2 + 4 * BITS

    def quantise(at, to, count, importance, period):
        good = True
        for _ in range(count):
            extreme = _extreme(at, int32_at(at))
            good &= _fits(extreme)
            d = np.float32(_float(extreme) / np.float32(-HALF))
            inverse = _inverse(d)
            _store_half(uint8_at(to), 0, _half(d))
            cpu_search.store_codes(BITS, at, np.float32(0.0), inverse, np.float32(HALF + 0.5), to + 2)
            at, to = at + 128, to + BYTES
        return good

    return quantise


def _make_offset(BITS: int) -> Callable[..., Any]:
    """Compile q4_1 or q5_1: the smallest element becomes code 0, the largest the highest code."""
    MOST, BYTES = (1 << BITS) - 1, 4 + 4 * BITS

    def quantise(at, to, count, importance, period):
        good = True
        for _ in range(count):
            first, last = _ends(at)
            good &= _fits(first) and _fits(last)
            low = _float(first)
            d = np.float32(np.float32(_float(last) - low) / np.float32(MOST))
            inverse = _inverse(d)
            _store_half(uint8_at(to), 0, _half(d))
            _store_half(uint8_at(to), 2, _half(low))
            cpu_search.store_codes(BITS, at, low, inverse, np.float32(0.5), to + 4)
            at, to = at + 128, to + BYTES
        return good

    return quantise


def _q8_0(at, to, count, importance, period):
    good = True
    for n in range(count):
        x, bits, out, size = float32_at(at + 128 * n), int32_at(at + 128 * n), uint8_at(to + 34 * n), np.int32(0)
        for i in range(32):
            size = max(size, bits[i] & _MAGNITUDE)
        good &= size <= _LARGEST_BITS
        d = np.float32(_float(size) / np.float32(127.0))
        inverse = _inverse(d)
        _store_half(out, 0, _half(d))
        for i in range(32):  # round to nearest, ties away from 0
            scaled = np.float32(x[i] * inverse)
            whole = np.int32(scaled)
            rest = np.float32(scaled - np.float32(whole))
            whole += np.int32(rest >= np.float32(0.5)) - np.int32(rest <= np.float32(-0.5))
            out[2 + i] = np.uint8(whole & 255)
    return good


# ---- the searched types ----------------------------------------------------------------------------------------------


@inner
def _transpose(x, bits, groups, size, lanes):
    """Transpose consecutive groups of `size` elements to lanes [size, 16]; lanes without a group are zeros."""
    largest = np.int32(0)
    for i in range(16 * size):
        lanes[i] = np.float32(0.0)
    for g in range(groups):
        for i in range(size):
            lanes[i * 16 + g] = x[g * size + i]
            largest = max(largest, bits[g * size + i] & _MAGNITUDE)
    return largest <= _LARGEST_BITS


@inner
def _weigh_by(importance, period, first, x, groups, size, block, weights):
    """Compute the weights of the elements of `groups` groups by importance, in the lanes of `_transpose`.

    A block has `block` elements, a row `period` blocks; the first group's block has index `first`, row by row.
    """
    for start in range(0, groups * size, block):
        total = np.float32(0.0)
        for i in range(start, start + block):
            total = np.float32(total + np.float32(x[i] * x[i]))
        base = np.float32(np.float32(2.0) * np.float32(total / np.float32(block)))
        column = (first + start // block) % period * block - start
        for i in range(start, start + block):
            root = np.sqrt(np.float32(base + np.float32(x[i] * x[i])))
            weights[i % size * 16 + i // size] = np.float32(importance[column + i] * root)


@inner
def _whole(values, count, most, low, high, whole):
    """Store values as integers times a scale that maps the value farthest from 0 to `most`; return the fp16 scale."""
    extreme = np.float32(0.0)
    for g in range(count):
        if abs(values[g]) > abs(extreme):
            extreme = values[g]
    half = _half(np.float32(extreme / np.float32(most)))
    d = _value(half)
    for g in range(count):
        code = _round(np.float32(values[g] / d)) if d != 0 else 0
        whole[g] = min(max(code, low), high)
    return half


def _make_with_offset(kind: GGMLQuantizationType) -> Callable[..., Any]:
    """Compile q2_K, q4_K or q5_K."""
    search, (SCALE_AT, LOW_AT) = searches.OFFSETS[kind.name], (start for start, _ in CONTENTS[kind].floats)
    KIND, BYTES = int(kind), kind.block[1]
    GROUP, MOST, STORED, TRIES = search.group, search.most, search.stored, search.tries
    PER_BLOCK = 256 // GROUP
    BATCH = 16 // PER_BLOCK
    FIRST, FLOOR = np.float32(search.first), np.float32(search.floor)

    def quantise(at, to, count, importance, period):
        good, work = True, stack_bytes(128 * GROUP + 512)
        weights, fitted = work + 64 * GROUP, work + 128 * GROUP
        small, low_small, at_codes = fitted + 128, fitted + 192, fitted + 256
        scales, mins, codes = int32_at(small), int32_at(low_small), uint8_at(at_codes)
        for start in range(0, count, BATCH):
            blocks, part = min(BATCH, count - start), at + 1024 * start
            good &= _transpose(float32_at(part), int32_at(part), blocks * PER_BLOCK, GROUP, float32_at(work))
            if importance:
                given, groups, found = float32_at(importance), blocks * PER_BLOCK, float32_at(weights)
                _weigh_by(given, period, start, float32_at(part), groups, GROUP, 256, found)
            else:
                cpu_search.weigh(0, work, GROUP, FLOOR, weights)
            cpu_search.fit_offset(work, weights, GROUP, np.float32(MOST), FIRST, TRIES, fitted, fitted + 64)
            for b in range(blocks):
                x, out, own = float32_at(part + 1024 * b), to + BYTES * (start + b), 4 * b * PER_BLOCK
                d = _whole(float32_at(fitted + own), PER_BLOCK, STORED, 0, STORED, scales)
                m = _whole(float32_at(fitted + 64 + own), PER_BLOCK, STORED, 0, STORED, mins)
                for g in range(PER_BLOCK):
                    scale = np.float32(_value(d) * np.float32(scales[g]))
                    low = np.float32(_value(m) * np.float32(mins[g]))
                    for i in range(GROUP * g, GROUP * (g + 1)):
                        code = _round(np.float32(np.float32(x[i] + low) / scale)) if scale != 0 else 0
                        codes[i] = min(max(code, 0), MOST)
                cpu_search.store_block(KIND, at_codes, small, low_small, out)
                _store_half(uint8_at(out), SCALE_AT, d)
                _store_half(uint8_at(out), LOW_AT, m)
        return good

    return quantise


def _make_scaled(kind: GGMLQuantizationType) -> Callable[..., Any]:
    """Compile q3_K or q6_K."""
    search, SCALE_AT, KIND, BYTES = searches.SCALES[kind.name], CONTENTS[kind].scale[0], int(kind), kind.block[1]
    HALF, STORED, FLOOR = search.half, search.stored, np.float32(search.floor)

    def quantise(at, to, count, importance, period):
        good, work = True, stack_bytes(2048 + 64 + 64 + 256)
        weights, fitted, small, at_codes = work + 1024, work + 2048, work + 2112, work + 2176
        scales, codes = int32_at(small), uint8_at(at_codes)
        for n in range(count):
            x, out = float32_at(at + 1024 * n), to + BYTES * n
            good &= _transpose(x, int32_at(at + 1024 * n), 16, 16, float32_at(work))
            if importance:
                _weigh_by(float32_at(importance), period, n, x, 16, 16, 256, float32_at(weights))
            else:
                cpu_search.weigh(1, work, 16, FLOOR, weights)
            cpu_search.fit_scale(work, weights, 16, np.float32(HALF), fitted)
            d = _whole(float32_at(fitted), 16, -STORED, -STORED, STORED - 1, scales)
            for g in range(16):
                scale = np.float32(_value(d) * np.float32(scales[g]))
                for i in range(16 * g, 16 * (g + 1)):
                    code = _round(np.float32(x[i] / scale)) if scale != 0 else 0
                    codes[i] = min(max(code, -HALF), HALF - 1) + HALF
            cpu_search.store_block(KIND, at_codes, small, small, out)
            _store_half(uint8_at(out), SCALE_AT, d)
        return good

    return quantise


@inner
def _places(x, first, scale, codes):
    """Set the codes of 32 elements from `first` on: indices of the nearest values of the table times the scale."""
    for i in range(first, first + 32):
        value, code = np.float32(x[i] / scale) if scale != 0 else np.float32(0.0), 0
        for middle in searches.TABLE_MIDDLES:
            code += value >= np.float32(middle)
        codes[i] = code


def _make_in_table(kind: GGMLQuantizationType) -> Callable[..., Any]:
    """Compile iq4_nl or iq4_xs."""
    STORED, FLOOR, KIND, BYTES = searches.TABLES[kind.name], np.float32(searches.TABLE_FLOOR), int(kind), kind.block[1]
    PER_BLOCK = 8 if STORED else 1
    BLOCK, BATCH = 32 * PER_BLOCK, 16 // PER_BLOCK

    def quantise(at, to, count, importance, period):
        good, work = True, stack_bytes(4096 + 64 + 64 + 256)
        weights, fitted, small, at_codes = work + 2048, work + 4096, work + 4160, work + 4224
        scales, codes = int32_at(small), uint8_at(at_codes)
        for start in range(0, count, BATCH):
            blocks, part = min(BATCH, count - start), at + 4 * BLOCK * start
            groups = blocks * PER_BLOCK
            good &= _transpose(float32_at(part), int32_at(part), groups, 32, float32_at(work))
            if importance:
                given, found = float32_at(importance), float32_at(weights)
                _weigh_by(given, period, start, float32_at(part), groups, 32, BLOCK, found)
            else:
                cpu_search.weigh(1, work, 32, FLOOR, weights)
            cpu_search.fit_table(work, weights, 32, fitted)
            for b in range(blocks):
                x, out = float32_at(part + 4 * BLOCK * b), to + BYTES * (start + b)
                if STORED:
                    d = _whole(float32_at(fitted + 32 * b), 8, -STORED, -STORED, STORED - 1, scales)
                    for g in range(8):
                        _places(x, 32 * g, np.float32(_value(d) * np.float32(scales[g])), codes)
                else:
                    d = _half(float32_at(fitted)[b])
                    _places(x, 0, _value(d), codes)
                cpu_search.store_block(KIND, at_codes, small, small, out)
                _store_half(uint8_at(out), 0, d)
        return good

    return quantise


# ---- compiled --------------------------------------------------------------------------------------------------------


def make_quantise(KIND: int) -> Callable[..., None]:
    """Return the function of a type, which quantises `count` blocks from address x to `out`.

    Other arguments of the function: address of an int64, which becomes 1 if all elements can be quantised, else 0; the
    address of the columns' importance, or 0; and the number of blocks in a row.
    """
    kind = GGMLQuantizationType(KIND)
    if kind.name in searches.SIMPLE:
        simple = _make_symmetric if kind.name.endswith("_0") else _make_offset
        quantise = _q8_0 if kind.name == "Q8_0" else simple(int(kind.name[1]))
    elif kind.name in searches.OFFSETS:
        quantise = _make_with_offset(kind)
    else:
        quantise = _make_scaled(kind) if kind.name in searches.SCALES else _make_in_table(kind)
    blocks = inner(quantise)

    def quantise_blocks(x, out, count, answer, importance, period):
        int64_at(answer)[0] = blocks(x, out, count, importance, period)

    return quantise_blocks
