# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
"""Quantising weights as compiled functions, one for each type; they hold no lock and share nothing.

Letters: N blocks; a batch is what is searched at once, 16 groups: one block of groups of 16, two of groups of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compile_kept
from candle_vllm.core.kernels.cpu_runtime.primitives import float_from_bits
from candle_vllm.core.kernels.weight_quant.cpu_search import bits_of, ends_of_32, fit_offset, fit_scale, store_codes
from candle_vllm.core.kernels.weight_quant.searches import OFFSETS, SCALES, SIMPLE, Quantise
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

_MAGNITUDE = np.int32(0x7FFFFFFF)
_LARGEST_BITS = np.int32(0x477FE000)  # of 65504
_SMALLEST = np.float32(1e-37)
_SHIFTER = np.float32(12582912.0)  # 1.5 * 2^23: added, it rounds to nearest even

inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@inner
def _half(value):
    """Bits of the float16 nearest to a float32, ties to even; not for NaN."""
    bits = bits_of(value)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size < 0x38800000:  # below the smallest normal number: a multiple of 2^-24
        scaled = np.float32(float_from_bits(size) * np.float32(16777216.0))
        return sign | np.int64(np.float32(np.float32(scaled + _SHIFTER) - _SHIFTER))
    rounded = size + 0x0FFF + ((size >> 13) & 1) - 0x38000000
    return sign | min(rounded >> 13, 0x7C00)


@inner
def _value(half):
    """The float32 of a finite float16's bits."""
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
    """Bits of the smallest and the largest of the 32 numbers at an address."""
    both: Any = ends_of_32(x)
    return np.int32(both & 0xFFFFFFFF), np.int32(both >> 32)


@inner
def _extreme(x, bits):
    """Bits of the first of the 32 numbers that are farthest from 0."""
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
    """1 / d, or 0 where that is beyond a float32; such a scale is stored as 0."""
    return np.float32(0.0) if abs(d) < _SMALLEST else np.float32(np.float32(1.0) / d)


@inner
def _float(bits):
    return np.float32(float_from_bits(np.int64(bits)))


def _make_symmetric(BITS: int) -> Callable[..., Any]:
    """q4_0 and q5_0: the number farthest from 0 becomes the lowest code."""
    HALF, BYTES = 1 << (BITS - 1), 2 + 4 * BITS

    def quantise(x, bits, out):
        good, at, to = True, x.ctypes.data, out.ctypes.data
        for n in range(len(x)):
            extreme = _extreme(at, bits[n])
            good &= _fits(extreme)
            d = np.float32(_float(extreme) / np.float32(-HALF))
            inverse = _inverse(d)
            _store_half(out[n], 0, _half(d))
            store_codes(BITS, at, np.float32(0.0), inverse, np.float32(HALF + 0.5), to + 2)
            at, to = at + 128, to + BYTES
        return good

    return quantise


def _make_offset(BITS: int) -> Callable[..., Any]:
    """q4_1 and q5_1: the smallest number becomes 0, the largest the highest code."""
    MOST, BYTES = (1 << BITS) - 1, 4 + 4 * BITS

    def quantise(x, bits, out):
        good, at, to = True, x.ctypes.data, out.ctypes.data
        for n in range(len(x)):
            first, last = _ends(at)
            good &= _fits(first) and _fits(last)
            low = _float(first)
            d = np.float32(np.float32(_float(last) - low) / np.float32(MOST))
            inverse = _inverse(d)
            _store_half(out[n], 0, _half(d))
            _store_half(out[n], 2, _half(low))
            store_codes(BITS, at, low, inverse, np.float32(0.5), to + 4)
            at, to = at + 128, to + BYTES
        return good

    return quantise


def _q8_0(x, bits, out):
    good = True
    for n in range(len(x)):
        size = np.int32(0)
        for i in range(32):
            size = max(size, bits[n, i] & _MAGNITUDE)
        good &= size <= _LARGEST_BITS
        d = np.float32(_float(size) / np.float32(127.0))
        inverse = _inverse(d)
        _store_half(out[n], 0, _half(d))
        for i in range(32):  # halves go away from 0
            scaled = np.float32(x[n, i] * inverse)
            whole = np.int32(scaled)
            rest = np.float32(scaled - np.float32(whole))
            whole += np.int32(rest >= np.float32(0.5)) - np.int32(rest <= np.float32(-0.5))
            out[n, 2 + i] = np.uint8(whole & 255)
    return good


# ---- the types of 256 ------------------------------------------------------------------------------------------------


@inner
def _transpose(x, bits, groups, size, lanes):
    """Groups of `size` numbers one after the other to lanes [size, 16]; lanes without a group are zeros."""
    largest = np.int32(0)
    for i in range(16 * size):
        lanes[i] = np.float32(0.0)
    for g in range(groups):
        for i in range(size):
            lanes[i * 16 + g] = x[g * size + i]
            largest = max(largest, bits[g * size + i] & _MAGNITUDE)
    return largest <= _LARGEST_BITS


@inner
def _whole(values, count, most, low, high, whole):
    """Stores values as whole numbers of the scale that makes `most` of the one farthest from 0; returns it as half."""
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


def _make_with_offset(GROUP: int, MOST: int, STORED: int, TRIES: int) -> Callable[..., Any]:
    """q2_K, q4_K and q5_K. First and floor are arguments, as floats cannot be part of a compiled function's name."""
    PER_BLOCK = 256 // GROUP
    BATCH = 16 // PER_BLOCK

    def quantise(x, bits, out, first, floor):
        good = True
        lanes, fitted = np.empty(16 * GROUP, np.float32), np.empty((2, 16), np.float32)
        scales, mins, codes = np.empty(16, np.int32), np.empty(16, np.int32), np.empty(256, np.uint8)
        flat, flat_bits = x.reshape(-1), bits.reshape(-1)
        for start in range(0, len(x), BATCH):
            blocks = min(BATCH, len(x) - start)
            part = slice(start * 256, (start + blocks) * 256)
            good &= _transpose(flat[part], flat_bits[part], blocks * PER_BLOCK, GROUP, lanes)
            at, to = lanes.ctypes.data, fitted.ctypes.data
            fit_offset(at, GROUP, np.float32(MOST), first, TRIES, floor, to, to + 64)
            for b in range(blocks):
                n, own = start + b, slice(b * PER_BLOCK, (b + 1) * PER_BLOCK)
                d = _whole(fitted[0, own], PER_BLOCK, STORED, 0, STORED, scales)
                m = _whole(fitted[1, own], PER_BLOCK, STORED, 0, STORED, mins)
                for g in range(PER_BLOCK):
                    scale = np.float32(_value(d) * np.float32(scales[g]))
                    low = np.float32(_value(m) * np.float32(mins[g]))
                    for i in range(GROUP * g, GROUP * (g + 1)):
                        code = _round(np.float32(np.float32(x[n, i] + low) / scale)) if scale != 0 else 0
                        codes[i] = min(max(code, 0), MOST)
                if MOST == 3:
                    _pack_q2(scales, mins, d, m, codes, out[n])
                else:
                    _pack_q45(scales, mins, d, m, codes, out[n])
        return good

    return quantise


@inner
def _pack_q2(scales, mins, d, m, codes, out):
    """Scales and minima as nibbles, codes of 2 bits, d, dmin."""
    for g in range(16):
        out[g] = scales[g] | (mins[g] << 4)
    _two_bits(codes, out, 16)
    _store_half(out, 80, d)
    _store_half(out, 82, m)


@inner
def _two_bits(codes, out, at):
    """Of 128 neighbours, those 32 apart share a byte."""
    for part in range(2):
        for i in range(32):
            j = 128 * part + i
            four = (codes[j] & 3) | ((codes[j + 32] & 3) << 2) | ((codes[j + 64] & 3) << 4) | ((codes[j + 96] & 3) << 6)
            out[at + 32 * part + i] = four


@inner
def _pack_q45(scales, mins, d, m, codes, out):
    """d, dmin, 12 bytes of scales and minima of 6 bits, for q5_K the fifth bits, nibbles."""
    _store_half(out, 0, d)
    _store_half(out, 2, m)
    for g in range(4):
        out[4 + g] = scales[g] | ((scales[g + 4] >> 4) << 6)
        out[8 + g] = mins[g] | ((mins[g + 4] >> 4) << 6)
        out[12 + g] = (scales[g + 4] & 15) | ((mins[g + 4] & 15) << 4)
    at = 16
    if len(out) == 176:
        for i in range(32):
            fifth = 0
            for g in range(8):
                fifth |= (codes[32 * g + i] >> 4) << g
            out[16 + i] = fifth
        at = 48
    for pair in range(4):
        for i in range(32):
            out[at + 32 * pair + i] = (codes[64 * pair + i] & 15) | ((codes[64 * pair + 32 + i] & 15) << 4)


def _make_scaled(HALF: int, STORED: int) -> Callable[..., Any]:
    """q3_K and q6_K."""

    def quantise(x, bits, out, floor):
        good = True
        lanes, fitted = np.empty(256, np.float32), np.empty(16, np.float32)
        scales, codes = np.empty(16, np.int32), np.empty(256, np.uint8)
        for n in range(len(x)):
            good &= _transpose(x[n], bits[n], 16, 16, lanes)
            fit_scale(lanes.ctypes.data, 16, np.float32(HALF), floor, fitted.ctypes.data)
            d = _whole(fitted, 16, -STORED, -STORED, STORED - 1, scales)
            for g in range(16):
                scale = np.float32(_value(d) * np.float32(scales[g]))
                for i in range(16 * g, 16 * (g + 1)):
                    code = _round(np.float32(x[n, i] / scale)) if scale != 0 else 0
                    codes[i] = min(max(code, -HALF), HALF - 1) + HALF
            if HALF == 4:
                _pack_q3(scales, d, codes, out[n])
            else:
                _pack_q6(scales, d, codes, out[n])
        return good

    return quantise


@inner
def _pack_q3(scales, d, codes, out):
    """High bits, low 2 bits, 12 bytes of scales of 6 bits, d."""
    for i in range(32):
        high = 0
        for g in range(8):
            high |= (codes[32 * g + i] >> 2) << g
        out[i] = high
    _two_bits(codes, out, 32)
    for g in range(8):
        out[96 + g] = ((scales[g] + 32) & 15) | (((scales[g + 8] + 32) & 15) << 4)
    for g in range(4):
        high = 0
        for part in range(4):
            high |= ((scales[4 * part + g] + 32) >> 4) << (2 * part)
        out[104 + g] = high
    _store_half(out, 108, d)


@inner
def _pack_q6(scales, d, codes, out):
    """Nibbles, of 128 neighbours those 64 apart; the upper 2 bits, those 32 apart; scales of 8 bits, d."""
    for part in range(2):
        for i in range(64):
            j = 128 * part + i
            out[64 * part + i] = (codes[j] & 15) | ((codes[j + 64] & 15) << 4)
        for i in range(32):
            j = 128 * part + i
            low, high = (
                (codes[j] >> 4) | ((codes[j + 32] >> 4) << 2),
                (codes[j + 64] >> 4) | ((codes[j + 96] >> 4) << 2),
            )
            out[128 + 32 * part + i] = low | (high << 4)
    for g in range(16):
        out[192 + g] = np.uint8(scales[g] & 255)
    _store_half(out, 208, d)


# ---- compiled --------------------------------------------------------------------------------------------------------


def quantiser(ggml_type: GGMLQuantizationType) -> Quantise:
    """See the package."""
    compiled, extra = _compiled(ggml_type.name), ()
    if ggml_type.name in OFFSETS:
        search = OFFSETS[ggml_type.name]
        extra = (np.float32(search.first), np.float32(search.floor))
    elif ggml_type.name in SCALES:
        extra = (np.float32(SCALES[ggml_type.name].floor),)

    def quantise(x: np.ndarray, out: np.ndarray) -> bool:
        return bool(compiled(x, x.view(np.int32), out, *extra))

    return quantise


@cache
def _compiled(name: str) -> Any:
    function = _function(name)
    # Numba keeps an index for each name, which two functions, or two processes, must not share.
    function.__qualname__ += f".{name}"
    floats = ", float32, float32" if name in OFFSETS else ", float32" if name in SCALES else ""
    signature = f"boolean(float32[:, ::1], int32[:, ::1], uint8[:, ::1]{floats})"
    return compile_kept(lambda cached: njit(signature, nogil=True, cache=cached, error_model="numpy")(function))


def _function(name: str) -> Callable[..., Any]:
    if name in OFFSETS:
        search = OFFSETS[name]
        return _make_with_offset(search.group, search.most, search.stored, search.tries)
    if name in SCALES:
        return _make_scaled(SCALES[name].half, SCALES[name].stored)
    assert name in SIMPLE
    if name == "Q8_0":
        return _q8_0
    make = _make_symmetric if name.endswith("_0") else _make_offset
    return make(int(name[1]))
