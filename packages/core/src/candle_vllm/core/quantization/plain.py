# SPDX-License-Identifier: MIT
"""Plain element types: their numpy types, and conversion from one type to another.

Types have the names of safetensors and GGUF files. Numpy has no bfloat16 and no 8-bit floats: an array contains their
bits, and the type's name is passed with it.
Source: OCP 8-bit Floating Point Specification (e4m3, e5m2) and OCP Microscaling Formats 1.0 (e8m0), 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np

ELEMENTS: Mapping[str, np.dtype] = MappingProxyType(
    {
        name: np.dtype(kind)
        for name, kind in (
            ("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2"),
            ("F8_E4M3", "u1"), ("F8_E5M2", "u1"), ("F8_E8M0", "u1"),
            ("I64", "<i8"), ("I32", "<i4"), ("I16", "<i2"), ("I8", "i1"),
            ("U64", "<u8"), ("U32", "<u4"), ("U16", "<u2"), ("U8", "u1"), ("BOOL", "?"),
        )
    }
)  # fmt: skip
"""The numpy type of an array's elements, for each type."""

_CHUNK = 1 << 15
"""Elements per round: the data of a round stays in the cache."""


def read_plain(raw: np.ndarray, stored: str, shape: tuple[int, ...], wanted: str) -> np.ndarray:
    """Copy elements from a file's bytes, and convert them if the types differ.

    Args:
        raw: the bytes, uint8, contiguous; they need not be aligned.
        stored: element type in the file.
        shape: shape of the result.
        wanted: element type of the result, which is newly allocated.
    """
    out = np.empty(shape, ELEMENTS[wanted])
    flat, data = out.reshape(-1), raw.reshape(-1)
    if wanted == stored:
        flat.view(np.uint8)[:] = data
        return out
    scratch = np.empty(min(_CHUNK, flat.size), ELEMENTS[stored])
    for first in range(0, flat.size, _CHUNK):
        part = scratch[: flat.size - first]
        start = first * scratch.itemsize
        part.view(np.uint8)[:] = data[start : start + part.nbytes]
        convert(part, stored, flat[first : first + _CHUNK], wanted)
    return out


def rounded(value: float, name: str) -> float:
    """Round a number to a floating-point type."""
    held = read_plain(np.array([value]).view(np.uint8), "F64", (1,), name)
    return read_plain(held.view(np.uint8), name, (1,), "F64").item()


def convert(values: np.ndarray, stored: str, out: np.ndarray, wanted: str) -> None:
    """Convert a flat array to another type; floats to nearest, ties to even, F64 to F16, BF16 and F8 by way of F32."""
    with np.errstate(all="ignore"):  # overflow becomes infinite, and NaN stays NaN
        if wanted == "BF16" or wanted in _LAST:
            wide = values if stored == "F32" else read_plain(values.view(np.uint8), stored, values.shape, "F32")
            _to_bf16(wide, out) if wanted == "BF16" else _to_small_floats(wide, wanted, out)
        elif stored == "BF16" and wanted == "F32":
            bits = out.view(np.uint32)
            bits[:] = values
            np.left_shift(bits, 16, out=bits)
        elif stored == "BF16":
            out[:] = read_plain(values.view(np.uint8), stored, values.shape, "F32")
        elif stored.startswith("F8"):
            out[:] = _small_floats(stored)[values]
        elif stored == "F64" and wanted == "F16":
            out[:] = values.astype(np.float32)
        else:
            np.copyto(out, values, casting="unsafe")


def _to_bf16(values: np.ndarray, out: np.ndarray) -> None:
    scratch = np.empty(min(_CHUNK, values.size), np.uint32)
    for first in range(0, values.size, _CHUNK):
        part = values[first : first + _CHUNK]
        rounded, bits = scratch[: part.size], part.view(np.uint32)
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        target = out[first : first + _CHUNK]
        target[:] = rounded.view(np.uint16)[1::2]
        if math.isnan(part.max(initial=0)):  # rounding may have carried a NaN's bits into the sign
            target[np.isnan(part)] = 0x7FC0


_LAST = MappingProxyType({"F8_E4M3": (0x7E, 448.0), "F8_E5M2": (0x7C, 65536.0)})  # code, value of maximum or infinity


def _to_small_floats(values: np.ndarray, name: str, out: np.ndarray) -> None:
    """Round float32 to 8-bit floats; above the largest number, e4m3 saturates and e5m2 becomes infinite."""
    last, most = _LAST[name]
    numbers, sizes = np.append(_small_floats(name)[:last].astype(np.float64), most), np.minimum(np.abs(values), most)
    middles = (numbers[1:] + numbers[:-1]) / 2
    codes = np.searchsorted(middles, sizes)  # of two numbers equally near, the lower one
    codes += (codes & 1) & (sizes == np.append(middles, np.inf)[codes])
    codes[np.isnan(values)] = 0x7F
    out[:] = codes + 128 * np.signbit(values)


@cache
def _small_floats(name: str) -> np.ndarray:
    """Return the values of the 256 codes of an 8-bit float, float32 [256]; read-only."""
    codes = np.arange(256)
    if name == "F8_E5M2":
        found = (codes << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    elif name == "F8_E8M0":
        found = np.ldexp(np.float32(1), codes - 127).astype(np.float32)
        found[255] = np.nan
    else:
        exponents, mantissas = codes >> 3 & 15, codes & 7
        found = np.ldexp(np.where(exponents > 0, 8 + mantissas, mantissas), np.maximum(exponents, 1) - 10)
        found = np.where(codes & 127 == 127, np.nan, np.where(codes < 128, found, -found)).astype(np.float32)
    found.flags.writeable = False
    return found
