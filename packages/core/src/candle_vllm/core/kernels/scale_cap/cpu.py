# pyright: reportCallIssue=false, reportArgumentType=false
"""Scaling and soft-capping rows on the CPU, in place (part of step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, LANES, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_tanh
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, float_bits
from candle_vllm.core.kernels.cpu_runtime.primitives import float_from_bits, int64_at


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


def make_scale_cap(CAPPED: int) -> Callable[..., None]:
    """The operation. Arguments: see `scale_cap_row`."""

    def scale_cap(a, thread, threads):
        rows = int64_at(a[2])[a[8]]
        x, row_bytes, lines = a[3], 4 * a[4], a[5]
        factor, cap = float_from_bits(a[6]), float_from_bits(a[7])
        unit, last = rows * lines * thread // threads, rows * lines * (thread + 1) // threads
        while unit < last:
            row, line = unit // lines, unit % lines
            count = min(lines - line, last - unit)
            scale_cap_lines(x + row * row_bytes + 64 * line, count, factor, cap, CAPPED)
            unit += count

    return scale_cap


@cache
def scale_cap_operation(capped: bool) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_scale_cap(int(capped)))


def scale_cap_row(
    *,
    x: int,
    stride: int,
    columns: int,
    scale: float,
    cap: float | None,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> list[int]:
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
    return [x, stride, lines, float_bits(factor), float_bits(cap or 0.0), int(rows_from)]
