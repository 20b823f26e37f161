# SPDX-License-Identifier: MIT
"""Search the scales of 16 groups at a time: each lane of a vector is one group.

The arithmetic is that of `reference.py`, in the same order on every CPU, because no sum goes across lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I32, I64, SHIFTER, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.weight_quant import searches
from candle_vllm.core.quantization.ggml_types import CONTENTS, IQ4_VALUES, Fields, GGMLQuantizationType


@emitted
def bits_of(e: Emitter, value: Float) -> Int:
    """Return the bits of a float32 as the low half of an int64, whose high half is 0."""
    return e.b.zext(e.b.bitcast(value, I32), I64)


@emitted
def ends_of_32(e: Emitter, x: Int) -> Int:
    """Return the bits of the largest (high half) and of the smallest (low half) of the 32 float32 at an address."""
    b = e.b
    magnitude, sign = e.constant(I32, 0x7FFFFFFF), e.constant(I32, 31)

    def ordered(value: Any) -> Any:
        """Convert the bits of floats to integers of the same order, and back."""
        return b.xor(value, b.and_(b.ashr(value, sign), magnitude))

    x, y = (ordered(e.load(x, vector(I32), at)) for at in (0, 4 * LANES))
    found = []
    for name, relation in (("smax", ">"), ("smin", "<")):
        both = b.select(b.icmp_signed(relation, x, y), x, y)
        found.append(e.call(f"llvm.vector.reduce.{name}.v{LANES}i32", I32, [both]))
    high, low = (b.extract_element(ordered(e.splat(value)), ir.Constant(I32, 0)) for value in found)
    return b.or_(b.shl(b.zext(high, I64), e.int64(32)), b.zext(low, I64))


@emitted
def store_codes(e: Emitter, width: int, x: Int, low: Float, inverse: Float, add: Float, to: Int) -> None:
    """Store (x - low) * inverse + add of 32 elements, truncated to integers of `width` bits, 4 or 5.

    The fifth bits come first, bit i of 32 for element i; then byte i has the low nibble for element i, the high nibble
    for element i + 16.
    """
    b = e.b
    most, codes = e.constant(I32, (1 << width) - 1), []
    for start in (0, 4 * LANES):
        value = b.fmul(b.fsub(e.load(x, vector(F32), start), e.splat(low)), e.splat(inverse))
        whole = b.fptosi(b.fadd(value, e.splat(add)), vector(I32))
        codes.append(b.select(b.icmp_signed("<", whole, most), whole, most))
    four, mask = e.constant(I32, 4), e.constant(I32, 15)
    nibbles = b.or_(b.and_(codes[0], mask), b.shl(b.and_(codes[1], mask), four))
    e.store(to, b.trunc(nibbles, vector(I8)), 4 if width == 5 else 0)
    if width == 5:
        for part, whole in enumerate(codes):
            fifth = b.icmp_signed(">", whole, mask)
            e.store(to, b.bitcast(fifth, ir.IntType(LANES)), 2 * part)


@emitted
def store_block(e: Emitter, kind: GGMLQuantizationType, codes: Int, scales: Int, minima: Int, out: Int) -> None:
    """Store the codes and the small scales and minima of a block, without its floats; see `ggml_types.py`.

    Args:
        codes: address of the stored bits of the codes, uint8 [elements of a block].
        scales, minima: addresses of int32 [groups]; ignored if the type has no small scales, or no minima.
    """
    b, contents = e.b, CONTENTS[kind]

    def code(at: int, count: int) -> Any:
        return e.load(codes, vector(I8, count), at)

    def small(at: int, count: int) -> Any:
        """Load consecutive scales and minima, which alternate in turns."""
        turn = contents.turn or at + count
        parts = []
        for first in range(at, at + count, min(count, turn)):
            number, inside = divmod(first, turn)
            source, kind = (scales, minima)[number % 2], vector(I32, min(count, turn))
            parts.append(e.load(source, kind, 4 * (number // 2 * turn + inside)))
        return b.trunc(b.add(e.whole(parts), e.constant(I32, contents.small_zero, count)), vector(I8, count))

    def put(several: tuple[Fields, ...], numbers: Callable[[int, int], Any], first: int) -> None:
        for fields in several:
            at, width, mask = first, fields.width, (1 << fields.bits) - 1
            for start in range(fields.start, fields.stop, width):
                found = e.load(out, vector(I8, width), start) if fields.first else e.zeros(I8, width)
                for place in fields.places:
                    bits = b.lshr(numbers(at, width), e.constant(I8, fields.shift, width))
                    bits = b.shl(b.and_(bits, e.constant(I8, mask, width)), e.constant(I8, place, width))
                    found, at = b.or_(found, bits), at + width
                e.store(out, found, start)

    put(contents.codes, code, 0)
    for number, several in enumerate(contents.small):
        put(several, small, number * several[0].numbers)


@emitted
def weigh(e: Emitter, squared: bool, x: Int, count: Int, floor: Float, weights: Int) -> None:
    """Compute the weights of the elements of 16 groups without an importance matrix, see `reference.plain_weights`.

    Args:
        squared: 1 if weights grow with the square of elements, 0 if with the magnitude.
        x, weights: addresses of float32 [count, 16]: element i of all groups is contiguous.
        floor: as in `reference.plain_weights`.
    """
    b = e.b
    (total,) = _elements(e, x, x, count, [e.zeros(F32)], lambda v, _, s: [b.fadd(s[0], b.fmul(v, v))])
    base = b.fdiv(total, e.splat(b.sitofp(count, F32)))
    if not squared:
        base = e.call(f"llvm.sqrt.v{LANES}f32", vector(F32), [base])
    base = b.fmul(e.splat(floor), base)
    with e.each(count) as index:
        offset = b.mul(index, e.int64(4 * LANES))
        value = e.load(b.add(x, offset), vector(F32))
        e.store(b.add(weights, offset), b.fadd(base, b.fmul(value, value) if squared else _fabs(e, value)))


@emitted
def fit_offset(
    e: Emitter, x: Int, weights: Int, count: Int, most: Float, first: Float, tries: Int, scales: Int, mins: Int
) -> None:
    """Find scale and minimum of 16 groups, see `reference.fit_offset`.

    Args:
        x, weights: addresses of float32 [count, 16]: element i of all groups is contiguous.
        most, first, tries: as in `reference.fit_offset`; `most` and `first` are float32.
        scales, mins: addresses of float32 [16].
    """
    b, zero, highest = e.b, e.zeros(F32), e.splat(most)

    def extent(value: Any, weight: Any, state: list[Any]) -> list[Any]:
        """Update the minimum, at most 0, the maximum, and the sums of w and of w * x."""
        low, high, total, weighted = state
        low = b.select(b.fcmp_ordered("<", value, low), value, low)
        high = b.select(b.fcmp_ordered(">", value, high), value, high)
        return [low, high, b.fadd(total, weight), b.fadd(weighted, b.fmul(weight, value))]

    start = [zero, e.constant(F32, -searches.NOTHING), zero, zero]
    low, high, total, weighted = _elements(e, x, weights, count, start, extent)
    span = b.fsub(high, low)

    def codes(value: Any, low: Any, inverse: Any) -> Any:
        return _clamp(e, _rounded(e, b.fmul(inverse, b.fsub(value, low))), zero, highest)

    def attempt(index: Any, state: list[Any]) -> list[Any]:
        """Try one step size: codes, then the scale and minimum that fit them best, kept if the error is smaller."""
        steps = e.splat(b.fmul(b.sitofp(index, F32), ir.Constant(F32, searches.OFFSET_STEP)))
        inverse = b.fdiv(b.fadd(b.fadd(e.splat(first), steps), highest), span)

        def body(value: Any, weight: Any, sums: list[Any]) -> list[Any]:
            code = codes(value, low, inverse)
            part = b.fmul(weight, code)
            added = part, b.fmul(part, code), b.fmul(part, value)
            return [b.fadd(old, new) for old, new in zip(sums, added)]

        sum_l, sum_ll, sum_lx = _elements(e, x, weights, count, [zero] * 3, body)
        whole = b.fmul(total, sum_ll)
        spread = b.fsub(whole, b.fmul(sum_l, sum_l))
        usable = b.fcmp_ordered(">", spread, b.fmul(whole, e.constant(F32, searches.LEAST_SPREAD)))
        scale = b.fdiv(b.fsub(b.fmul(total, sum_lx), b.fmul(weighted, sum_l)), spread)
        fitted = b.fdiv(b.fsub(b.fmul(sum_ll, weighted), b.fmul(sum_l, sum_lx)), spread)
        above = b.fcmp_ordered(">", fitted, zero)  # a minimum above 0 cannot be stored
        scale = b.select(above, b.fdiv(sum_lx, sum_ll), scale)
        fitted = b.select(above, zero, fitted)
        # The squared error minus the sum of w * x^2, a sum that is equal for all tries.
        error = b.fsub(zero, b.fadd(b.fmul(scale, sum_lx), b.fmul(fitted, weighted)))
        better = b.and_(usable, b.fcmp_ordered("<", error, state[0]))
        return [b.select(better, new, old) for new, old in zip((error, scale, fitted), state)]

    scale = b.fdiv(span, highest)  # the plain scale: the span divided into `most` steps
    _, best_scale, best_low = e.loop(tries, [e.constant(F32, searches.NOTHING), scale, low], attempt)
    one = e.constant(F32, 1.0)
    fits = [(each, least, b.fdiv(one, each)) for each, least in ((scale, low), (best_scale, best_low))]

    def errors(value: Any, weight: Any, sums: list[Any]) -> list[Any]:
        """Add the squared errors of both scales and minima."""
        results = []
        for (each, least, inverse), sum_of in zip(fits, sums):
            off = b.fsub(b.fadd(b.fmul(each, codes(value, least, inverse)), least), value)
            results.append(b.fadd(sum_of, b.fmul(weight, b.fmul(off, off))))
        return results

    plain_error, best_error = _elements(e, x, weights, count, [zero] * 2, errors)
    better = b.fcmp_ordered("<", best_error, plain_error)
    flat = b.fcmp_ordered("==", span, zero)
    scale, low = b.select(better, best_scale, scale), b.select(better, best_low, low)
    e.store(scales, b.select(flat, zero, scale))
    e.store(mins, b.fsub(zero, low))


@emitted
def fit_scale(e: Emitter, x: Int, weights: Int, count: Int, half: Float, scales: Int) -> None:
    """Find the scales of 16 groups without an offset, see `reference.fit_scale`; arguments as for `fit_offset`."""
    b, zero = e.b, e.zeros(F32)
    low, high = e.splat(b.fsub(ir.Constant(F32, 0.0), half)), e.splat(b.fsub(half, ir.Constant(F32, 1.0)))

    size, extreme = _farthest(e, x, count)

    def attempt(index: Any, state: list[Any]) -> list[Any]:
        steps = b.fsub(b.sitofp(index, F32), ir.Constant(F32, float(searches.SCALE_STEPS)))
        wanted = b.fadd(half, b.fmul(steps, ir.Constant(F32, searches.SCALE_STEP)))
        inverse = b.fdiv(e.splat(b.fsub(ir.Constant(F32, 0.0), wanted)), extreme)

        def code(value: Any) -> Any:
            return _clamp(e, _rounded(e, b.fmul(inverse, value)), low, high)

        return _better_scale(e, x, weights, count, code, state)

    _, scale = e.loop(e.int64(2 * searches.SCALE_STEPS + 1), [zero, zero], attempt)
    e.store(scales, b.select(b.fcmp_ordered(">", size, zero), scale, zero))


@emitted
def fit_table(e: Emitter, x: Int, weights: Int, count: Int, scales: Int) -> None:
    """Find the scales of 16 groups with a table of values, see `reference.fit_table`; arguments as for `fit_offset`."""
    b, zero = e.b, e.zeros(F32)
    size, extreme = _farthest(e, x, count)

    def attempt(index: Any, state: list[Any]) -> list[Any]:
        low = b.icmp_signed("<", index, e.int64(searches.TABLE_STEPS))
        first, second = searches.TABLE_STARTS
        start, other = e.int64(first), e.int64(second - searches.TABLE_STEPS)
        wanted = b.sitofp(b.add(index, b.select(low, start, other)), F32)
        inverse = b.fdiv(e.splat(wanted), extreme)

        def number(value: Any) -> Any:
            place, found = b.fmul(inverse, value), e.constant(F32, float(IQ4_VALUES[0]))
            for middle, following in zip(searches.TABLE_MIDDLES, IQ4_VALUES[1:]):
                above = b.fcmp_ordered(">=", place, e.constant(F32, middle))
                found = b.select(above, e.constant(F32, float(following)), found)
            return found

        return _better_scale(e, x, weights, count, number, state)

    _, scale = e.loop(e.int64(2 * searches.TABLE_STEPS), [zero, zero], attempt)
    e.store(scales, b.select(b.fcmp_ordered(">", size, zero), scale, zero))


def _elements(
    e: Emitter, x: Any, weights: Any, count: Any, state: list[Any], body: Callable[[Any, Any, list[Any]], list[Any]]
) -> list[Any]:
    """Run body(element, weight, state) for element 0, 1, ... of all groups."""

    def step(index: Any, carried: list[Any]) -> list[Any]:
        offset = e.b.mul(index, e.int64(4 * LANES))
        value, weight = (e.load(e.b.add(at, offset), vector(F32)) for at in (x, weights))
        return body(value, weight, carried)

    return e.loop(count, state, step)


def _fabs(e: Emitter, value: Any) -> Any:
    return e.call(f"llvm.fabs.v{LANES}f32", vector(F32), [value])


def _clamp(e: Emitter, value: Any, low: Any, high: Any) -> Any:
    value = e.b.select(e.b.fcmp_ordered(">", value, low), value, low)
    return e.b.select(e.b.fcmp_ordered("<", value, high), value, high)


def _rounded(e: Emitter, value: Any) -> Any:
    """Round values below 2^22 to integers, ties to even."""
    shifter = e.constant(F32, SHIFTER)
    return e.b.fsub(e.b.fadd(value, shifter), shifter)


def _farthest(e: Emitter, x: Any, count: Any) -> list[Any]:
    """Return the largest magnitude of each group, and the first element that has it."""

    def body(value: Any, _: Any, state: list[Any]) -> list[Any]:
        size = _fabs(e, value)
        larger = e.b.fcmp_ordered(">", size, state[0])
        return [e.b.select(larger, size, state[0]), e.b.select(larger, value, state[1])]

    return _elements(e, x, x, count, [e.zeros(F32)] * 2, body)


def _better_scale(
    e: Emitter, x: Any, weights: Any, count: Any, code: Callable[[Any], Any], state: list[Any]
) -> list[Any]:
    """Fit a scale to the codes of a step size by weighted least squares; update `state` if the error is smaller."""
    b, zero = e.b, e.zeros(F32)

    def body(value: Any, weight: Any, sums: list[Any]) -> list[Any]:
        number = code(value)
        weighted = b.fmul(weight, number)
        return [b.fadd(sums[0], b.fmul(weighted, value)), b.fadd(sums[1], b.fmul(weighted, number))]

    sum_lx, sum_ll = _elements(e, x, weights, count, [zero, zero], body)
    scale = b.fdiv(sum_lx, sum_ll)
    gain = b.fmul(scale, sum_lx)
    better = b.and_(b.fcmp_ordered(">", sum_ll, zero), b.fcmp_ordered(">", gain, state[0]))
    return [b.select(better, gain, state[0]), b.select(better, scale, state[1])]
