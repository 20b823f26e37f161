# SPDX-License-Identifier: MIT
"""Compiled function that quantises an adapter's weights to 8 bits with scales; it releases the GIL.

It produces the bytes of `reference.quantised` on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I16, I32, SHIFTER, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float_from_bits, int32_at, int64_at, pointers, uint8_at
from candle_vllm.core.kernels.lora.layout import NumberForm
from candle_vllm.core.kernels.weight_quant.cpu_search import bits_of

uint16_at = pointers(types.uint16, "uint16")
_LARGEST = np.float32(127)
_SMALLEST = 0x00800000  # bits of the smallest scale; a smaller one is stored as 0
_SHIFTER = np.float32(SHIFTER)

inner = njit(error_model="numpy")


def _bits(e: Emitter, form: NumberForm, address: Any) -> Any:
    """Load 16 elements as the bits of float32."""
    if form is NumberForm.F32:
        return e.load(address, vector(I32))
    return e.b.shl(e.b.zext(e.load(address, vector(I16)), vector(I32)), e.constant(I32, 16))


@emitted
def _largest(e: Emitter, form: NumberForm, source: Int, count: Int) -> Int:
    """Return the float32 bits of the largest magnitude of 16 * count elements."""
    b = e.b

    def body(index: Any, state: list[Any]) -> list[Any]:
        at = b.add(source, b.mul(index, e.int64(LANES * form.bytes)))
        size = b.and_(_bits(e, form, at), e.constant(I32, 0x7FFFFFFF))
        return [b.select(b.icmp_unsigned(">", size, state[0]), size, state[0])]

    (found,) = e.loop_or_skip(count, [e.zeros(I32)], body)
    return b.zext(e.call(f"llvm.vector.reduce.umax.v{LANES}i32", I32, [found]), ir.IntType(64))


@emitted
def _write(e: Emitter, form: NumberForm, source: Int, count: Int, inverse: Float, target: Int) -> None:
    """Write 16 * count elements times `inverse`, rounded to the nearest 8-bit integers."""
    b = e.b
    factor = e.splat(inverse)
    with e.each_or_skip(count) as index:
        at = b.add(source, b.mul(index, e.int64(LANES * form.bytes)))
        value = b.fmul(b.bitcast(_bits(e, form, at), vector(F32)), factor)
        moved = b.bitcast(b.fadd(value, e.constant(F32, SHIFTER)), vector(I32))
        e.store(b.add(target, b.mul(index, e.int64(LANES))), b.trunc(moved, vector(I8)))


def make_quantise(FORM: int) -> Callable[..., None]:
    """Return the function for elements of a type, bfloat16 or float32."""
    ITEM, SHIFT = NumberForm(FORM).bytes, 16 if FORM == 0 else 0

    @inner
    def bits_at(source, index):
        if SHIFT == 16:
            return types.int64(uint16_at(source)[index]) << 16
        return types.int64(int32_at(source)[index])

    @inner
    def quantise_group(source, count, target):
        """Write the codes of a group, and return the bits of their scale."""
        whole = count >> 4
        largest = _largest(FORM, source, whole)
        for index in range(16 * whole, count):
            largest = max(largest, bits_at(source, index) & 0x7FFFFFFF)
        scale = np.float32(float_from_bits(largest) / _LARGEST)
        bits = (bits_of(scale) + 0xFFFF) & 0x7FFF0000
        inverse = np.float32(0)
        if bits < _SMALLEST:
            bits = 0
        else:
            inverse = np.float32(np.float32(1) / float_from_bits(bits))
        _write(FORM, source, whole, inverse, target)
        for index in range(16 * whole, count):
            value = np.float32(float_from_bits(bits_at(source, index)) * inverse)
            uint8_at(target)[index] = bits_of(np.float32(value + _SHIFTER)) & 255
        return bits

    def quantise(source, target, matrices, count):
        """Quantise matrices.

        source, target: addresses of the elements, and of the bytes to write. matrices: address of int64 [count, 5]: the
        index of a matrix's first element, its rows, columns and scales of a row, and the offset of its codes [rows,
        columns] in bytes; its scales follow the codes, bfloat16 [rows, scales].
        """
        for number in range(count):
            told = int64_at(matrices + 40 * number)
            begin, rows, columns, groups, at = told[0], told[1], told[2], told[3], told[4]
            size = (columns + 8 * groups - 1) // (8 * groups) * 8
            for row in range(rows):
                for group in range(groups):
                    first = group * size
                    left = max(min(columns - first, size), 0)
                    to = target + at + row * columns + first
                    bits = quantise_group(source + (begin + row * columns + first) * ITEM, left, to)
                    scale = uint8_at(target + at + rows * columns + 2 * (row * groups + group))
                    scale[0], scale[1] = bits >> 16 & 255, bits >> 24

    return quantise
