# SPDX-License-Identifier: MIT
"""Convert activations to the input format of plain matrices on the CPU, and apply the prologue in the same pass.

Threads divide the work as in `activation_quant/cpu.py`. A row whose length is not a multiple of 32 is first copied to
the stack and padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.activation_quant import GROUP, Prologue
from candle_vllm.core.kernels.activation_quant.cpu import (
    emit_scales,
    layer_scale,
    prologue_halves,
    rms_scale,
    row_mean,
    share,
)
from candle_vllm.core.kernels.activation_rows import WORD, RowForm, RowsArguments, WordForm
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I32, SHIFTER, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes


@intrinsic(prefer_literal=True)
def _write_groups(
    _: Any,
    prologue: Any,
    form: Any,
    x: Any,
    other: Any,
    bias: Any,
    scale: Any,
    mean: Any,
    out: Any,
    scales: Any,
    first: Any,
    count: Any,
) -> Any:
    """Write groups of 32 elements of a row after its prologue; `other` to `mean` are as for `prologue_halves`.

    scales: address of the groups' scales, which only `WordForm` has.
    """
    before, words = Prologue(prologue.literal_value), form.literal_value == WordForm.I16
    wanted = WordForm.I16 if words else RowForm(form.literal_value)
    integers = [types.int64] * 3

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        at_x, at_other, at_bias, factor, centre, at_out, at_scales, start, number = args[2:]
        halves = prologue_halves(e, before, at_x, at_other, factor, mean=centre, bias=at_bias)

        def body(index: Any, state: list[Any]) -> list[Any]:
            group = b.add(start, index)
            target = b.add(at_out, b.mul(group, e.int64(GROUP * wanted.bytes)))
            if words:
                numbers, scale_of = _words(e, halves(group))
                for part, half in enumerate(numbers):
                    e.store(target, half, part * LANES * wanted.bytes)
                e.store(b.add(at_scales, b.shl(group, e.int64(2))), scale_of)
                return state
            for part, half in enumerate(halves(group)):
                numbers = e.float_to_bf16(half) if wanted is RowForm.BF16 else half
                e.store(target, numbers, part * LANES * wanted.bytes)
            return state

        e.loop(number, [], body)
        return context.get_dummy_value()

    return types.void(prologue, form, *integers, types.float32, types.float32, *integers, types.int64), code


def _words(e: Emitter, halves: list[Any]) -> tuple[list[Any], Any]:
    """Quantise a group, two vectors of floats, to 16-bit integers; return them and the scale."""
    b = e.b
    scales, inverse = emit_scales(e, [halves], float(WORD))
    factor = b.shuffle_vector(inverse, inverse, ir.Constant(vector(I32), [0] * LANES))
    rounded = [b.fadd(b.fmul(half, factor), e.constant(F32, SHIFTER)) for half in halves]
    numbers = [b.trunc(b.bitcast(half, vector(I32)), vector(I16)) for half in rounded]
    return numbers, b.extract_element(scales, ir.Constant(I32, 0))


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
    """Return the operation for a prologue and a `RowForm` or `WordForm`; BYTES is the size of its elements."""
    WORDS = int(FORM == WordForm.I16)

    def activation_rows(row, thread, threads):
        given = read(RowsArguments, row)
        weight, columns, eps = given.weight, given.columns, given.eps
        rows = step_number(row, given.rows_from)
        groups = (columns + GROUP - 1) // GROUP
        row_bytes, out_bytes = groups * GROUP * 4, groups * GROUP * BYTES
        if WORDS == 1:
            out_bytes += ((groups + 15) >> 4) * 64
        first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
        if group_count == 0:
            return
        ragged = columns % GROUP != 0
        copies = stack_bytes(3 * row_bytes if ragged else 64)
        if ragged and (PROLOGUE == 1 or PROLOGUE == 3):
            if PROLOGUE == 3:
                padded_row(weight + columns * 4, columns, copies + 2 * row_bytes)
            weight = padded_row(weight, columns, copies + row_bytes)
        for t in range(first_row, first_row + row_count):
            source = t
            if given.picked != 0:
                source = int64_at(given.picked)[t]
            at = given.x + source * given.stride * 4
            other, scale, mean = weight, eps, eps
            if GATED == 1:
                other = at + columns * 4
                if ragged:
                    other = padded_row(other, columns, copies + 2 * row_bytes)
            if ragged:
                at = padded_row(at, columns, copies)
            if PROLOGUE == 1:
                scale = rms_scale(at, columns, eps)
            elif PROLOGUE == 3:
                mean = row_mean(at, columns)
                scale = layer_scale(at, columns, mean, eps)
            target = given.out + t * out_bytes
            bias, scales = weight + row_bytes, target + groups * GROUP * BYTES
            _write_groups(PROLOGUE, FORM, at, other, bias, scale, mean, target, scales, first_group, group_count)

    return activation_rows
