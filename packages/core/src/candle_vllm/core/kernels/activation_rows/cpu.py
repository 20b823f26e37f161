# SPDX-License-Identifier: MIT
"""Convert activations to the input format of plain matrices on the CPU, and apply the prologue in the same pass.

Threads divide the work as in `activation_quant/cpu.py`, for I8 by whole rows. A row whose length is not a
multiple of 32 is first copied to the stack and padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.activation_quant import GROUP, Prologue
from candle_vllm.core.kernels.activation_quant.cpu import (
    SHIFTER_BITS,
    emit_rounded,
    emit_scales,
    fold,
    layer_scale,
    prologue_halves,
    rms_scale,
    row_mean,
    share,
    two_vectors,
)
from candle_vllm.core.kernels.activation_rows import SEGMENT, WORD, RowForm, RowsArguments
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I16, I32, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger_size
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes


@emitted
def _write_groups(
    e: Emitter,
    prologue: Prologue,
    form: RowForm,
    x: Int,
    other: Int,
    bias: Int,
    scale: Float,
    mean: Float,
    out: Int,
    scales: Int,
    first: Int,
    count: Int,
) -> None:
    """Write groups of 32 elements of a row after its prologue; `other` to `mean` are as for `prologue_halves`.

    scales: address of the groups' scales, which only I16 has.
    """
    b = e.b
    halves = prologue_halves(e, prologue, x, other, scale, mean=mean, bias=bias)

    with e.each(count) as index:
        group = b.add(first, index)
        target = b.add(out, b.mul(group, e.int64(GROUP * form.bytes)))
        if form is RowForm.I16:
            numbers, scale_of = _words(e, halves(group))
            for part, half in enumerate(numbers):
                e.store(target, half, part * LANES * form.bytes)
            e.store(b.add(scales, b.shl(group, e.int64(2))), scale_of)
        else:
            for part, half in enumerate(halves(group)):
                number = e.float_to_bf16(half) if form is RowForm.BF16 else half
                e.store(target, number, part * LANES * form.bytes)


def _words(e: Emitter, halves: list[Any]) -> tuple[list[Any], Any]:
    """Quantise a group, two vectors of floats, to 16-bit integers; return them and the scale."""
    b = e.b
    scales, inverse = emit_scales(e, [halves], float(WORD))
    numbers = [b.trunc(half, vector(I16)) for half in emit_rounded(e, halves, e.pick([0] * LANES, inverse))]
    return numbers, b.extract_element(scales, ir.Constant(I32, 0))


@emitted
def _write_bytes(e: Emitter, y: Int, out: Int, groups: Int) -> None:
    """Write a row of float32 y, `groups` groups, in I8."""
    b = e.b

    def larger(first: Any, group: Any, most: list[Any]) -> list[Any]:
        sizes = [e.call("llvm.fabs.v16f32", vector(F32), [half]) for half in two_vectors(e, y, b.add(first, group))]
        return [emit_larger_size(e, size, top) for size, top in zip(sizes, most)]

    def write(first: Any, factor: Any, group: Any, totals: list[Any]) -> list[Any]:
        number = b.add(first, group)
        at = b.add(out, b.mul(number, e.int64(GROUP)))
        for part, rounded in enumerate(emit_rounded(e, two_vectors(e, y, number), factor)):
            whole = b.sub(rounded, e.constant(I32, SHIFTER_BITS))
            totals = [b.add(totals[0], whole)]
            e.store(at, b.trunc(whole, vector(I8)), LANES * part)
        return totals

    end = b.add(out, b.mul(groups, e.int64(GROUP)))
    tail = b.add(out, b.and_(b.add(b.mul(groups, e.int64(GROUP)), e.int64(63)), e.int64(-64)))
    with e.each(b.udiv(b.add(groups, e.int64(SEGMENT // GROUP - 1)), e.int64(SEGMENT // GROUP))) as number:
        first = b.mul(number, e.int64(SEGMENT // GROUP))
        left = b.sub(groups, first)
        some = b.select(b.icmp_signed("<", left, e.int64(SEGMENT // GROUP)), left, e.int64(SEGMENT // GROUP))
        scales, inverse = emit_scales(e, [e.loop(some, [e.zeros(F32), e.zeros(F32)], partial(larger, first))], 127.0)
        (total,) = e.loop(some, [e.zeros(I32)], partial(write, first, e.pick([0] * LANES, inverse)))
        place, lane = b.add(tail, b.mul(number, e.int64(8))), ir.Constant(I32, 0)
        e.store(place, b.extract_element(scales, lane))
        e.store(place, b.mul(b.extract_element(fold(e, [total], b.add), lane), ir.Constant(I32, -128)), 4)
    with e.each_or_skip(b.and_(groups, e.int64(1))):
        e.store(end, e.zeros(I8, GROUP))


@njit
def padded_row(x: int, columns: int, target: int) -> int:
    """Copy a row to `target`, with zeros up to the next multiple of 32 columns; return `target`."""
    source, copy = float32_at(x), float32_at(target)
    for column in range(columns):
        copy[column] = source[column]
    for column in range(columns, (columns + 31) & -32):
        copy[column] = 0.0
    return target


def make_rows(PROLOGUE: int, GATED: int, FORM: int, BYTES: int) -> Callable[..., None]:
    """Return the operation for a prologue and a form of rows; BYTES is the size of its elements."""
    WORDS, WHOLE, F32_ROWS = int(FORM == RowForm.I16), int(FORM == RowForm.I8), int(RowForm.F32)

    def activation_rows(row, thread, threads):
        given = read(RowsArguments, row)
        weight, columns, eps = given.weight, given.columns, given.eps
        rows = step_number(row, given.rows_from)
        groups = (columns + GROUP - 1) // GROUP
        row_bytes, out_bytes = groups * GROUP * 4, groups * GROUP * BYTES
        if WORDS == 1:
            out_bytes += ((groups + 15) >> 4) * 64
        first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
        if WHOLE == 1:  # one thread converts a row
            out_bytes = ((columns + 63) >> 6) * 64 + (columns + 8 * SEGMENT - 1) // (8 * SEGMENT) * 64
            first_row, first_group, group_count = rows * thread // threads, 0, groups
            row_count = rows * (thread + 1) // threads - first_row
        if group_count == 0:
            return
        ragged = columns % GROUP != 0
        copies = stack_bytes((3 * row_bytes if ragged else 64) + WHOLE * row_bytes)
        whole = copies + (3 * row_bytes if ragged else 64)
        if ragged and (PROLOGUE == 1 or PROLOGUE == 3):
            if PROLOGUE == 3:
                padded_row(weight + columns * 4, columns, copies + 2 * row_bytes)
            weight = padded_row(weight, columns, copies + row_bytes)
        for t in range(first_row, first_row + row_count):
            source = int64_at(given.picked)[t] if given.picked != 0 else t
            at = given.x + source * given.stride * 4
            other, scale, mean = weight, eps, eps
            if GATED == 1:
                other = at + columns * 4
                if ragged:
                    other = padded_row(other, columns, copies + 2 * row_bytes)
            if ragged:
                at = padded_row(at, columns, copies)
            if PROLOGUE == 1:
                scale = rms_scale(0, at, columns, eps)
            elif PROLOGUE == 3:
                mean = row_mean(at, columns)
                scale = layer_scale(at, columns, mean, eps)
            target = given.out + t * out_bytes
            bias, scales = weight + row_bytes, target + groups * GROUP * BYTES
            if WHOLE == 1:
                _write_groups(PROLOGUE, F32_ROWS, at, other, bias, scale, mean, whole, 0, 0, groups)
                _write_bytes(whole, target, groups)
                continue
            _write_groups(PROLOGUE, FORM, at, other, bias, scale, mean, target, scales, first_group, group_count)

    return activation_rows
