# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false, reportArgumentType=false
"""Rows times act(gate) on the CPU, in place (part of step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import Emitter
from candle_vllm.core.kernels.cpu_runtime.emit_columns import emit_columns, load_columns, store_columns
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_gelu_tanh, emit_sigmoid_times, emit_silu
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number
from candle_vllm.core.kernels.silu_mul import GatedRowsArguments


@intrinsic(prefer_literal=True)
def _gate_columns(_: Any, x: Any, gate: Any, count: Any, kind: Any) -> Any:
    """x <- x * act(gate) for `count` floats; the constant `kind` numbers act: sigmoid, SiLU, GELU."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)

        def body(place: Any, mask: Any, state: list[Any]) -> list[Any]:
            at = b.add(args[0], place)
            value, gates = load_columns(e, at, mask), load_columns(e, b.add(args[1], place), mask)
            act = (None, emit_silu, emit_gelu_tanh)[kind.literal_value]
            made = emit_sigmoid_times(e, value, gates) if act is None else b.fmul(value, act(e, gates))
            store_columns(e, at, made, mask)
            return state

        emit_columns(e, args[2], [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, kind), code


def make_gated_rows(KIND: int) -> Callable[..., None]:
    """The operation."""

    def gated_rows(row, thread, threads):
        given = read(GatedRowsArguments, row)
        columns, picked = given.columns, int64_at(given.picked)
        lines = (columns + LANES - 1) // LANES
        units = step_number(row, given.rows_from) * lines
        unit, last = units * thread // threads, units * (thread + 1) // threads
        while unit < last:
            t, line = unit // lines, unit % lines
            count = min(lines - line, last - unit)
            first = LANES * line
            of_gate = t if given.picked == 0 else picked[t]
            at, gate = given.x + 4 * (t * given.stride + first), given.gate + 4 * (of_gate * given.gate_stride + first)
            _gate_columns(at, gate, min(LANES * count, columns - first), KIND)
            unit += count

    return gated_rows
