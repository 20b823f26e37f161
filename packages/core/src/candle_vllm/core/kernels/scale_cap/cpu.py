# pyright: reportCallIssue=false, reportArgumentType=false
"""Scaling and soft-capping rows on the CPU, in place (part of step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, LANES, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_tanh
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, read, step_number


@intrinsic(prefer_literal=True)
def scale_cap_lines(_: Any, at: Any, lines: Any, factor: Any, cap: Any, capped: Any) -> Any:
    """16 floats `lines` times: x <- x * factor, or cap * tanh(x * factor) where the constant `capped` is 1."""
    signature = types.void(types.int64, types.int64, types.float32, types.float32, capped)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        factor, cap = e.splat(args[2]), e.splat(args[3])

        def body(index: Any, state: list[Any]) -> list[Any]:
            place = b.add(args[0], b.mul(index, e.int64(4 * LANES)))
            value = b.fmul(e.load(place, vector(F32)), factor)
            e.store(place, b.fmul(emit_tanh(e, value), cap) if capped.literal_value else value)
            return state

        e.loop_or_skip(args[1], [], body)
        return context.get_dummy_value()

    return signature, code


class ScaleCapArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        lines: of 16 numbers, of a row.
        factor, cap: x becomes x * factor, or cap * tanh(x * factor).
        rows_from: which of the step's numbers counts the rows.
    """

    x: int
    stride: int
    lines: int
    factor: float
    cap: float
    rows_from: int


def make_scale_cap(CAPPED: int) -> Callable[..., None]:
    """The operation."""

    def scale_cap(row, thread, threads):
        given = read(ScaleCapArguments, row)
        units = step_number(row, given.rows_from) * given.lines
        unit, last = units * thread // threads, units * (thread + 1) // threads
        while unit < last:
            t, line = unit // given.lines, unit % given.lines
            count = min(given.lines - line, last - unit)
            scale_cap_lines(given.x + t * given.stride * 4 + 64 * line, count, given.factor, given.cap, CAPPED)
            unit += count

    return scale_cap


@cache
def scale_cap_operation(capped: bool) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_scale_cap(int(capped)))


def scale_cap_arguments(
    *,
    x: int,
    stride: int,
    columns: int,
    scale: float,
    cap: float | None,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> ScaleCapArguments:
    """The operation's arguments.

    Args:
        x: address of float32 rows, `stride` floats apart; up to 15 numbers behind the end of a row change too.
        columns: N.
        scale, cap: see the contract in the package.
        rows_from: which of the step's numbers counts the rows.
    """
    lines = -(-columns // LANES)
    assert LANES * lines <= stride
    factor = scale if cap is None else scale / cap
    return ScaleCapArguments(x, stride, lines, factor, cap or 0.0, rows_from)
