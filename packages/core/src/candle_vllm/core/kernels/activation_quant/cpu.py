# pyright: reportCallIssue=false, reportArgumentType=false
"""Quantising activations on the CPU, the prologue fused into the same pass.

With at least as many rows as threads each thread takes whole rows, else every thread takes a share of each row's groups
(the sum of squares of a norm is then computed by each). Either way every number is made by the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.activation_quant import GROUP, Prologue
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I32, LANES, SHIFTER, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, float_bits
from candle_vllm.core.kernels.cpu_runtime.primitives import float_from_bits, int64_at

_LOG2E = 1.4426950216293335  # log2(e) as float32 has it
_SHIFTER_BITS = 0x4B400000  # of `SHIFTER`

# ---- emitted code ----------------------------------------------------------------------------------------------------


def emit_exp(e: Emitter, x: Any) -> Any:
    """exp of 16 floats, relative error below 3e-7; inputs are held to [-87, 88]."""
    b = e.b
    low, high = e.constant(F32, -87.0), e.constant(F32, 88.0)
    x = b.select(b.fcmp_ordered("<", x, high), x, high)
    x = b.select(b.fcmp_ordered(">", x, low), x, low)
    shifted = e.fma(x, e.constant(F32, _LOG2E), e.constant(F32, SHIFTER))
    whole = b.fsub(shifted, e.constant(F32, SHIFTER))
    rest = e.fma(x, e.constant(F32, _LOG2E), b.fneg(whole))
    rest = e.fma(x, e.constant(F32, math.log2(math.e) - _LOG2E), rest)
    return e.power_of_two(shifted, rest)


def _fold(e: Emitter, vectors: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """One, or four, vectors of 16 combined across their lanes: lane i of the <4> result is vector i's."""

    def pick(x: Any, y: Any, order: list[int]) -> Any:
        return e.b.shuffle_vector(x, y, ir.Constant(vector(I32, len(order)), order))

    def both(x: Any, y: Any, step: int) -> Any:
        """Neighbours `step` lanes apart combined, those of x and y in turns."""
        quarters = [[4 * part + lane + 16 * side for lane in range(4)] for part in range(4) for side in (0, 1)]
        low = [lane for x, y in zip(quarters[::2], quarters[1::2]) for lane in _turns(x[:2], y[:2], step)]
        high = [lane for x, y in zip(quarters[::2], quarters[1::2]) for lane in _turns(x[2:], y[2:], step)]
        return combine(pick(x, y, low), pick(x, y, high))

    if len(vectors) == 1:
        vectors = vectors * 4
    x, y, z, w = vectors
    folded = both(both(x, y, 1), both(z, w, 1), 2)
    folded = combine(pick(folded, folded, list(range(8))), pick(folded, folded, list(range(8, 16))))
    return combine(pick(folded, folded, list(range(4))), pick(folded, folded, list(range(4, 8))))


def _turns(x: list[int], y: list[int], step: int) -> list[int]:
    return [x[0], y[0], x[1], y[1]] if step == 1 else [*x, *y]


def _emit_groups(e: Emitter, groups: list[list[Any]], q: Any, scales: Any, sums: Any) -> None:
    """Quantises one group or four, of two vectors of floats each; stores bytes, scales and scaled sums."""
    b, count = e.b, len(groups)

    def larger(x: Any, y: Any) -> Any:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    largest = [larger(*(e.call("llvm.fabs.v16f32", vector(F32), [half]) for half in halves)) for halves in groups]
    s = b.fdiv(_fold(e, largest, larger), e.constant(F32, 127.0, 4))
    some = b.fcmp_ordered(">", s, e.zeros(F32, 4))
    inverse = b.select(some, b.fdiv(e.constant(F32, 1.0, 4), s), e.zeros(F32, 4))
    totals = []
    for index, halves in enumerate(groups):
        factor = b.shuffle_vector(inverse, inverse, ir.Constant(vector(I32), [index] * LANES))
        # Adding the shifter rounds to nearest even and leaves the number in the low bits.
        rounded = [b.fadd(b.fmul(half, factor), e.constant(F32, SHIFTER)) for half in halves]
        whole = [b.bitcast(half, vector(I32)) for half in rounded]
        for part, numbers in enumerate(whole):
            e.store(q, b.trunc(numbers, vector(I8)), GROUP * index + LANES * part)
        totals.append(b.add(*whole))
    total = b.sub(_fold(e, totals, b.add), e.constant(I32, GROUP * _SHIFTER_BITS & 0xFFFFFFFF, 4))
    total = b.fmul(s, b.sitofp(total, vector(F32, 4)))
    for address, value in ((scales, s), (sums, total)):
        e.store(address, value if count == 4 else b.extract_element(value, ir.Constant(I32, 0)))


def _groups_code(e: Emitter, args: Any, halves_of: Callable[[Any], list[Any]]) -> None:
    """Quantises groups first .. first + count, by fours where it can; args are q, scales, sums, first, count."""
    q, scales, sums, first, count = args
    b = e.b

    def quantise(group: Any, together: int) -> None:
        groups = [halves_of(b.add(group, e.int64(index))) for index in range(together)]
        four = b.shl(group, e.int64(2))
        _emit_groups(e, groups, b.add(q, b.mul(group, e.int64(GROUP))), b.add(scales, four), b.add(sums, four))

    def fours(index: Any, state: list[Any]) -> list[Any]:
        quantise(b.add(first, b.shl(index, e.int64(2))), 4)
        return state

    def ones(index: Any, state: list[Any]) -> list[Any]:
        quantise(b.add(b.add(first, b.and_(count, e.int64(-4))), index), 1)
        return state

    e.loop_or_skip(b.lshr(count, e.int64(2)), [], fours)
    e.loop_or_skip(b.and_(count, e.int64(3)), [], ones)


def _two(e: Emitter, base: Any, group: Any) -> list[Any]:
    at = e.b.add(base, e.b.mul(group, e.int64(4 * GROUP)))
    return [e.load(at, vector(F32), 4 * LANES * part) for part in range(2)]


def prologue_halves(
    e: Emitter, prologue: Prologue, x: Any, other: Any = None, scale: Any = None
) -> Callable[[Any], list[Any]]:
    """What gives the two vectors of a group of 32 neighbours behind the prologue.

    Args:
        e: where the code goes.
        prologue: what is computed.
        x: address of the row; with SILU of its gate.
        other: address of NORM's weight, or of SILU's second factor.
        scale: of NORM, from `rms_scale`.
    """
    if prologue is Prologue.NONE:
        return lambda group: _two(e, x, group)
    one, factor = e.constant(F32, 1.0), None if scale is None else e.splat(scale)

    def halves(group: Any) -> list[Any]:
        pairs = zip(_two(e, x, group), _two(e, other, group))
        if prologue is Prologue.NORM:
            return [e.b.fmul(e.b.fmul(value, factor), weight) for value, weight in pairs]
        return [e.b.fmul(e.b.fdiv(g, e.b.fadd(one, emit_exp(e, e.b.fneg(g)))), up) for g, up in pairs]

    return halves


@intrinsic
def quantise_plain(_: Any, x: Any, q: Any, scales: Any, sums: Any, first: Any, count: Any) -> Any:
    """Groups of a row as they are."""
    signature = types.void(*[types.int64] * 6)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        _groups_code(e, args[1:], prologue_halves(e, Prologue.NONE, args[0]))
        return context.get_dummy_value()

    return signature, code


@intrinsic
def quantise_scaled(
    _: Any, x: Any, weight: Any, scale: Any, q: Any, scales: Any, sums: Any, first: Any, count: Any
) -> Any:
    """Groups of a row times `scale`, times a weight for each column."""
    signature = types.void(types.int64, types.int64, types.float32, *[types.int64] * 5)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        halves = prologue_halves(e, Prologue.NORM, args[0], args[1], args[2])
        _groups_code(e, args[3:], halves)
        return context.get_dummy_value()

    return signature, code


@intrinsic
def quantise_silu(_: Any, gate: Any, up: Any, q: Any, scales: Any, sums: Any, first: Any, count: Any) -> Any:
    """Groups of silu(gate) * up."""
    signature = types.void(*[types.int64] * 7)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        halves = prologue_halves(e, Prologue.SILU, args[0], args[1])
        _groups_code(e, args[2:], halves)
        return context.get_dummy_value()

    return signature, code


@intrinsic
def rms_scale(_: Any, x: Any, columns: Any, eps: Any) -> Any:
    """1 / sqrt(mean(x^2) + eps) of a row; it is zero from its end to the next multiple of 32 columns."""
    signature = types.float32(types.int64, types.int64, types.float32)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)

        def body(group: Any, totals: list[Any]) -> list[Any]:
            return [e.fma(v, v, total) for v, total in zip(_two(e, args[0], group), totals)]

        groups = b.sdiv(b.add(args[1], e.int64(GROUP - 1)), e.int64(GROUP))
        totals = e.loop(groups, [e.zeros(F32), e.zeros(F32)], body)
        mean = b.fdiv(e.sum_lanes(b.fadd(*totals)), b.sitofp(args[1], F32))
        return b.fdiv(ir.Constant(F32, 1.0), e.call("llvm.sqrt.f32", F32, [b.fadd(mean, args[2])]))

    return signature, code


# ---- the operation ---------------------------------------------------------------------------------------------------


@njit(inline="always")
def share(rows: int, groups: int, thread: int, threads: int) -> tuple[int, int, int, int]:
    """A thread's part of `rows` of `groups`: first row and count, first group and count."""
    if rows >= threads:
        first = rows * thread // threads
        return first, rows * (thread + 1) // threads - first, 0, groups
    first = groups * thread // threads
    return 0, rows, first, groups * (thread + 1) // threads - first


def make_quantise(prologue: int) -> Callable[..., None]:
    """The operation for one prologue. Arguments: see `quantise_row`."""

    def quantise(a, thread, threads):
        numbers = int64_at(a[2])
        x, stride, weight, columns, q, scales, sums, picked = a[3], a[4], a[5], a[7], a[8], a[9], a[10], a[11]
        rows = numbers[a[12]]
        eps = float_from_bits(a[6])
        groups = columns // GROUP
        first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
        if group_count == 0:
            return
        for t in range(first_row, first_row + row_count):
            source = t
            if picked != 0:
                source = int64_at(picked)[t]
            at = x + source * stride * 4
            to, to_s, to_m = q + t * columns, scales + t * groups * 4, sums + t * groups * 4
            if prologue == 1:
                scale = rms_scale(at, columns, eps)
                quantise_scaled(at, weight, scale, to, to_s, to_m, first_group, group_count)
            elif prologue == 2:
                quantise_silu(at, at + columns * 4, to, to_s, to_m, first_group, group_count)
            else:
                quantise_plain(at, to, to_s, to_m, first_group, group_count)

    return quantise


@cache
def quantise_operation(prologue: Prologue) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_quantise(int(prologue)))


def quantise_row(
    *,
    x: int,
    stride: int,
    columns: int,
    q: int,
    scales: int,
    sums: int,
    weight: int = 0,
    eps: float = 0.0,
    picked: int = 0,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> list[int]:
    """The operation's arguments.

    Args:
        x: address of float32 rows, `stride` floats apart.
        columns: K, a multiple of 32.
        q, scales, sums: addresses of the results.
        weight, eps: of a norm.
        picked: address of int64 row numbers of x; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers counts the rows.
    """
    return [x, stride, weight, float_bits(eps), columns, q, scales, sums, picked, int(rows_from)]
