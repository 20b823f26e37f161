# SPDX-License-Identifier: MIT
"""Loops over a row's columns, 16 at a time; the last vector is masked, so that memory after the row is not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES


def emit_columns(e: Emitter, count: Any, state: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """Run body(bytes, mask, state) -> state over float32 columns 0 .. count - 1; return the last state.

    Args:
        count: number of columns, an int64.
        state: values with which the first iteration begins.
        body: called with the byte offset of 16 columns, and the mask of the valid ones, or None if all are valid.
    """
    b = e.b
    whole = b.ashr(count, e.int64(4))

    def full(index: Any, state: list[Any]) -> list[Any]:
        return body(b.shl(index, e.int64(6)), None, state)

    def rest(_: Any, state: list[Any]) -> list[Any]:
        return body(b.shl(whole, e.int64(6)), lanes_below(e, b.and_(count, e.int64(LANES - 1))), state)

    state = e.loop_or_skip(whole, state, full)
    return e.loop_or_skip(b.ashr(b.add(b.and_(count, e.int64(LANES - 1)), e.int64(LANES - 1)), e.int64(4)), state, rest)


def lanes_below(e: Emitter, count: Any) -> Any:
    """Return the mask of the lanes below `count`, an int64."""
    lanes = ir.Constant(vector(I32), list(range(LANES)))
    return e.b.icmp_signed("<", lanes, e.splat(e.b.trunc(count, I32)))


def load_columns(e: Emitter, address: Any, mask: Any) -> Any:
    """Load 16 floats; lanes outside `mask` are not read and become 0."""
    if mask is None:
        return e.load(address, vector(F32))
    at = e.b.inttoptr(address, vector(F32).as_pointer())
    name = f"llvm.masked.load.v{LANES}f32.p0"
    return e.call(name, vector(F32), [at, ir.Constant(I32, 1), mask, e.zeros(F32)])


def store_columns(e: Emitter, address: Any, value: Any, mask: Any) -> None:
    """Write 16 floats, or only the lanes of `mask`."""
    if mask is None:
        e.store(address, value)
        return
    e.store_masked(address, value, mask)
