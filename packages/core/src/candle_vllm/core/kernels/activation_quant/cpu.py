# SPDX-License-Identifier: MIT
"""Quantise activations on the CPU, and apply the prologue in the same pass.

If there are at least as many rows as threads, each thread processes whole rows; otherwise each thread processes some
groups of every row, and computes a norm's sums over the whole row itself. The results have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.activation_quant import GROUP, Prologue, QuantiseArguments
from candle_vllm.core.kernels.cpu_runtime import emit_functions
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I32, SHIFTER, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number
from candle_vllm.core.kernels.recorded import LIMITS

SHIFTER_BITS = 0x4B400000  # bits of the float32 `SHIFTER`

# ---- emitted code ----------------------------------------------------------------------------------------------------


def fold(e: Emitter, vectors: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the 16 lanes of each of one or four vectors; lane i of the <4> result is for vector i or the only one."""

    def both(x: Any, y: Any, step: int) -> Any:
        """In each 4 lanes of x, and of y, combine lanes i and i + 2; with step 1 results of x and y alternate."""
        turns = (0, 16, 1, 17) if step == 1 else (0, 1, 16, 17)
        low = [4 * part + lane for part in range(4) for lane in turns]
        return combine(e.pick(low, x, y), e.pick([lane + 2 for lane in low], x, y))

    if len(vectors) == 1:
        vectors = vectors * 4
    x, y, z, w = vectors
    folded = both(both(x, y, 1), both(z, w, 1), 2)
    folded = combine(e.pick(range(8), folded), e.pick(range(8, 16), folded))
    return combine(e.pick(range(4), folded), e.pick(range(4, 8), folded))


def emit_scales(e: Emitter, groups: list[list[Any]], most: float) -> tuple[Any, Any]:
    """Return <4> scales, max|x| / `most` of one or four groups of two vectors each, and 1 / scale (0 for scale 0)."""
    b, larger = e.b, partial(emit_functions.emit_larger_size, e)
    largest = [larger(*(e.call("llvm.fabs.v16f32", vector(F32), [half]) for half in halves)) for halves in groups]
    s = b.fdiv(fold(e, largest, larger), e.constant(F32, most, 4))
    some = b.fcmp_ordered(">", s, e.zeros(F32, 4))
    return s, b.select(some, b.fdiv(e.constant(F32, 1.0, 4), s), e.zeros(F32, 4))


def emit_rounded(e: Emitter, halves: list[Any], factor: Any) -> list[Any]:
    """Return a group's vectors times `factor`, rounded: integers plus `SHIFTER_BITS`, <16 x i32>."""
    # Adding the shifter rounds to nearest even and leaves the integer in the low bits.
    rounded = [e.b.fadd(e.b.fmul(half, factor), e.constant(F32, SHIFTER)) for half in halves]
    return [e.b.bitcast(half, vector(I32)) for half in rounded]


def emit_quantised(e: Emitter, groups: list[list[Any]]) -> tuple[list[list[Any]], Any, Any]:
    """Quantise one or four groups of two vectors each; return each group's bytes, and <4> scales and scaled sums."""
    b = e.b
    s, inverse = emit_scales(e, groups, 127.0)
    totals, numbers = [], []
    for index, halves in enumerate(groups):
        whole = emit_rounded(e, halves, e.pick([index] * LANES, inverse))
        numbers.append([b.trunc(half, vector(I8)) for half in whole])
        totals.append(b.add(*whole))
    total = b.sub(fold(e, totals, b.add), e.constant(I32, GROUP * SHIFTER_BITS & 0xFFFFFFFF, 4))
    return numbers, s, b.fmul(s, b.sitofp(total, vector(F32, 4)))


def two_vectors(e: Emitter, base: Any, group: Any) -> list[Any]:
    """Load a group of 32 floats of a row."""
    at = e.b.add(base, e.b.mul(group, e.int64(4 * GROUP)))
    return [e.load(at, vector(F32), 4 * LANES * part) for part in range(2)]


_ACTIVATIONS = MappingProxyType(
    {
        **dict.fromkeys((Prologue.SILU, Prologue.SILU_7, Prologue.SILU_16, Prologue.SILU_10), emit_functions.emit_silu),
        Prologue.GELU_GATE: emit_functions.emit_gelu_tanh,
        Prologue.GELU_ERF_GATE: emit_functions.emit_gelu,
        Prologue.GELU_TANH: emit_functions.emit_gelu_tanh,
        Prologue.GELU: emit_functions.emit_gelu,
        Prologue.RELU: emit_functions.emit_relu,
        Prologue.TANH: emit_functions.emit_tanh,
        Prologue.QUICK_GELU: emit_functions.emit_quick_gelu,
        Prologue.RELU2: emit_functions.emit_relu2,
    }
)


def emit_gated(e: Emitter, prologue: Prologue, gate: Any, other: Any) -> Any:
    """Return the prologue's result for 16 elements of the gate and of the other half."""
    if prologue is Prologue.SWIGLU_OAI:
        return emit_functions.emit_swiglu_oai(e, gate, other)
    act = _ACTIVATIONS[prologue](e, gate)
    if (limits := LIMITS.get(prologue.name.lower())) is not None:
        act, other = emit_functions.emit_limited(e, act, other, *limits)
    return e.b.fmul(act, other)


def prologue_halves(
    e: Emitter, prologue: Prologue, x: Any, other: Any = None, scale: Any = None, *, mean: Any = None, bias: Any = None
) -> Callable[[Any], list[Any]]:
    """Return a function of a group's number, which emits y of the group: two vectors.

    Args:
        x: address of the row; its first half is the gate of a gated prologue.
        other: address of a norm's weight, or of the second half of a gated row.
        scale: for a norm, from `rms_scale` or `layer_scale`.
        mean, bias: for LAYER_NORM, from `row_mean`, and the address of the bias.
    """
    b, two = e.b, partial(two_vectors, e)
    if prologue is Prologue.NONE:
        return lambda group: two(x, group)
    if prologue is Prologue.NORM:
        factor = e.splat(scale)
        return lambda group: [b.fmul(b.fmul(v, factor), weight) for v, weight in zip(two(x, group), two(other, group))]
    if prologue is Prologue.LAYER_NORM:
        factor, centre = e.splat(scale), e.splat(mean)
        return lambda group: [
            e.fma(b.fmul(b.fsub(value, centre), factor), weight, shift)
            for value, weight, shift in zip(*(two(at, group) for at in (x, other, bias)))
        ]
    if prologue.gated:
        return lambda group: [emit_gated(e, prologue, g, up) for g, up in zip(two(x, group), two(other, group))]
    return lambda group: [_ACTIVATIONS[prologue](e, value) for value in two(x, group)]


@emitted
def quantise_groups(
    e: Emitter,
    prologue: Prologue,
    form: int,
    x: Int,
    other: Int,
    bias: Int,
    scale: Float,
    mean: Float,
    q: Int,
    scales: Int,
    sums: Int,
    rows: Int,
    first: Int,
    count: Int,
) -> None:
    """Apply the prologue to `count` groups of a row from `first` on, and quantise them, if possible four at a time; see
    `prologue_halves`.

    form, rows: y is also written to address `rows`, as bfloat16 if `form` is 2, as float32 if it is 4.
    """
    b = e.b
    made = prologue_halves(e, prologue, x, other, scale, mean=mean, bias=bias)

    def halves_of(group: Any) -> list[Any]:
        halves = made(group)
        if form:
            target = b.add(rows, b.mul(group, e.int64(GROUP * form)))
            for part, half in enumerate(halves):
                e.store(target, e.float_to_bf16(half) if form == 2 else half, part * LANES * form)
        return halves

    def quantise(group: Any, together: int) -> None:
        groups = [halves_of(b.add(group, e.int64(index))) for index in range(together)]
        four, to = b.shl(group, e.int64(2)), b.add(q, b.mul(group, e.int64(GROUP)))
        addresses = b.add(scales, four), b.add(sums, four)
        numbers, *floats = emit_quantised(e, groups)
        for index, halves in enumerate(numbers):
            for part, half in enumerate(halves):
                e.store(to, half, GROUP * index + LANES * part)
        for address, value in zip(addresses, floats):
            e.store(address, value if together == 4 else b.extract_element(value, ir.Constant(I32, 0)))

    with e.each_or_skip(b.lshr(count, e.int64(2))) as index:
        quantise(b.add(first, b.shl(index, e.int64(2))), 4)
    with e.each_or_skip(b.and_(count, e.int64(3))) as index:
        quantise(b.add(b.add(first, b.and_(count, e.int64(-4))), index), 1)


def _row_sum(e: Emitter, x: Any, columns: Any, term: Callable[[Any, Any], Any], masked: bool) -> Any:
    """Sum a float32 row: term(values, sums so far) adds 16 elements to the sums of lanes, which are added at the end.

    masked: ignore elements after the row's end; otherwise they must be 0 up to a multiple of 32 columns.
    """
    b = e.b
    lanes = ir.Constant(vector(I32), list(range(LANES)))
    end = e.splat(b.trunc(columns, I32)) if masked else None

    def body(group: Any, totals: list[Any]) -> list[Any]:
        results = [term(value, total) for value, total in zip(two_vectors(e, x, group), totals)]
        if end is None:
            return results
        first = b.trunc(b.mul(group, e.int64(GROUP)), I32)
        for part in range(2):
            at = b.add(lanes, e.splat(b.add(first, ir.Constant(I32, LANES * part))))
            results[part] = b.select(b.icmp_signed("<", at, end), results[part], totals[part])
        return results

    groups = b.sdiv(b.add(columns, e.int64(GROUP - 1)), e.int64(GROUP))
    return e.sum_lanes(b.fadd(*e.loop(groups, [e.zeros(F32), e.zeros(F32)], body)))


def _one_over_root(e: Emitter, total: Any, columns: Any, eps: Any) -> Any:
    mean = e.b.fdiv(total, e.b.sitofp(columns, F32))
    return e.b.fdiv(ir.Constant(F32, 1.0), e.call("llvm.sqrt.f32", F32, [e.b.fadd(mean, eps)]))


@emitted
def rms_scale(e: Emitter, masked: bool, x: Int, columns: Int, eps: Float) -> Float:
    """Return 1 / sqrt(mean(x^2) + eps) of a row that is followed by zeros up to a multiple of 32 columns.

    With `masked` (1) any elements may follow the row; up to 31 of these are read and ignored.
    """
    return _one_over_root(e, _row_sum(e, x, columns, lambda v, total: e.fma(v, v, total), masked), columns, eps)


@emitted
def row_mean(e: Emitter, x: Int, columns: Int) -> Float:
    """Return the mean of a row; up to 31 elements after the row are read and ignored."""
    return e.b.fdiv(_row_sum(e, x, columns, e.b.fadd, True), e.b.sitofp(columns, F32))


@emitted
def layer_scale(e: Emitter, x: Int, columns: Int, mean: Float, eps: Float) -> Float:
    """Return 1 / sqrt(mean((x - mean)^2) + eps) of a row; up to 31 elements after the row are read and ignored."""
    centre = e.splat(mean)

    def squares(value: Any, total: Any) -> Any:
        distance = e.b.fsub(value, centre)
        return e.fma(distance, distance, total)

    return _one_over_root(e, _row_sum(e, x, columns, squares, True), columns, eps)


# ---- the operation ---------------------------------------------------------------------------------------------------


@njit(inline="always")
def share(rows: int, groups: int, thread: int, threads: int) -> tuple[int, int, int, int]:
    """Return a thread's share of `rows` rows of `groups` groups: first row and count, first group and count."""
    if rows >= threads:
        first = rows * thread // threads
        return first, rows * (thread + 1) // threads - first, 0, groups
    first = groups * thread // threads
    return 0, rows, first, groups * (thread + 1) // threads - first


def make_quantise(PROLOGUE: int, GATED: int, BYTES: int = 0) -> Callable[..., None]:
    """Return the operation for one prologue; with BYTES, the size of an element of y, it also writes y."""

    def quantise(row, thread, threads):
        given = read(QuantiseArguments, row)
        weight, columns, eps = given.weight, given.columns, given.eps
        rows = step_number(row, given.rows_from)
        groups = columns // GROUP
        first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
        if group_count == 0:
            return
        for t in range(first_row, first_row + row_count):
            source = int64_at(given.picked)[t] if given.picked != 0 else t
            at = given.x + source * given.stride * 4
            other, scale, mean = weight, eps, eps
            if GATED == 1:
                other = at + columns * 4
            if PROLOGUE == 1:
                scale = rms_scale(0, at, columns, eps)
            elif PROLOGUE == 3:
                mean = row_mean(at, columns)
                scale = layer_scale(at, columns, mean, eps)
            to, to_s, to_m = given.q + t * columns, given.scales + t * groups * 4, given.sums + t * groups * 4
            bias = weight + columns * 4
            rows_ = given.rows + t * columns * BYTES
            quantise_groups(
                PROLOGUE, BYTES, at, other, bias, scale, mean, to, to_s, to_m, rows_, first_group, group_count
            )

    return quantise
