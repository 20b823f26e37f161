# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false, reportArgumentType=false
"""What the linear operations of all weight formats share: arguments, memory on the stack, writing a tile of results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at

if TYPE_CHECKING:
    pass

ROWS = LANES
"""Rows of weights in a tile."""


@intrinsic
def stack_bytes(_: Any, count: Any) -> Any:
    """Address of `count` bytes of the operation's own stack, at a multiple of 64; to be called once, not in a loop."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory = b.alloca(I8, size=args[0])
        memory.align = 64
        return b.ptrtoint(memory, ir.IntType(64))

    return types.int64(types.int64), code


@intrinsic
def _add_16(_: Any, target: Any, source: Any) -> Any:
    """target[0:16] += source[0:16], floats."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        e.store(args[0], b.fadd(e.load(args[0], vector(F32)), e.load(args[1], vector(F32))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _copy_16(_: Any, target: Any, source: Any) -> Any:
    """target[0:16] = source[0:16], floats."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        e.store(args[0], e.load(args[1], vector(F32)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@njit
def write_tile(sums: int, rows: int, lanes: int, out: int, row_bytes: int, bias: int, accumulate: int) -> None:
    """Writes the sums float32 [rows, 16] of a tile to `out`: the first `lanes` of each row, plus bias, plus `out`."""
    for row in range(rows):
        source, target = sums + row * 4 * ROWS, out + row * row_bytes
        if lanes == ROWS:
            if bias:
                _add_16(source, bias)
            if accumulate:
                _add_16(source, target)
            _copy_16(target, source)
            continue
        values, old, added = float32_at(source), float32_at(target), float32_at(bias)
        for lane in range(lanes):
            value = values[lane]
            if bias:
                value += added[lane]
            if accumulate:
                value += old[lane]
            old[lane] = value
