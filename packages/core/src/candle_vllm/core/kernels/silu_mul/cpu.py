# SPDX-License-Identifier: MIT
"""Multiply rows by act(gate) in place on the CPU, or apply xIELU to them (step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter
from candle_vllm.core.kernels.cpu_runtime.emit_columns import emit_columns, load_columns, store_columns
from candle_vllm.core.kernels.cpu_runtime.emit_functions import (
    emit_gelu_tanh,
    emit_relu,
    emit_sigmoid_times,
    emit_silu,
    emit_softplus,
    emit_tanh,
)
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number
from candle_vllm.core.kernels.silu_mul import GatedRowsArguments

_ACTS = (None, emit_silu, emit_gelu_tanh, emit_softplus)  # None is the sigmoid
_XIELU = 4


def _emit_xielu(e: Emitter, x: Any, numbers: Any) -> Any:
    """Return beta x + p max(x, 0)^2 + n (expm1(z) - z), z = min(x, 0); `numbers` is the address of p, n and beta.

    With t = tanh(z / 2), expm1(z) is 2 t / (1 - t).
    """
    b, (p, n, beta) = e.b, (e.splat(e.load(numbers, F32, 4 * index)) for index in range(3))
    above = emit_relu(e, x)
    below = b.fsub(x, above)
    t = emit_tanh(e, b.fmul(below, e.constant(F32, 0.5)))
    grown = b.fdiv(b.fadd(t, t), b.fsub(e.constant(F32, 1.0), t))
    return e.fma(e.fma(p, above, beta), above, e.fma(n, b.fsub(grown, below), b.fmul(beta, below)))


@intrinsic(prefer_literal=True)
def _gate_columns(_: Any, x: Any, gate: Any, count: Any, kind: Any, spread: Any) -> Any:
    """Multiply `count` floats by act(gate), or apply xIELU; `kind` and `spread` (one gate for all) are constants."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e, number = Emitter(b), kind.literal_value

        def body(place: Any, mask: Any, state: list[Any]) -> list[Any]:
            at = b.add(args[0], place)
            value = load_columns(e, at, mask)
            if number == _XIELU:
                store_columns(e, at, _emit_xielu(e, value, args[1]), mask)
                return state
            one = bool(spread.literal_value)
            gates = e.splat(e.load(args[1], F32)) if one else load_columns(e, b.add(args[1], place), mask)
            act = _ACTS[number]
            made = emit_sigmoid_times(e, value, gates) if act is None else b.fmul(value, act(e, gates))
            store_columns(e, at, made, mask)
            return state

        emit_columns(e, args[2], [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, kind, spread), code


def make_gated_rows(KIND: int, SPREAD: int) -> Callable[..., None]:
    def gated_rows(row, thread, threads):
        given = read(GatedRowsArguments, row)
        columns, picked = given.columns, int64_at(given.picked)
        size = given.span if SPREAD == 1 else LANES  # columns of a unit of work
        parts = (columns + size - 1) // size
        units = step_number(row, given.rows_from) * parts
        unit, last = units * thread // threads, units * (thread + 1) // threads
        while unit < last:
            t, part = unit // parts, unit % parts
            count = 1 if SPREAD == 1 else min(parts - part, last - unit)
            first = size * part
            of_gate = t if given.picked == 0 else picked[t]
            at, gate = given.x + 4 * (t * given.stride + first), given.gate + 4 * of_gate * given.gate_stride
            if SPREAD == 1:
                gate += 4 * part
            elif KIND != _XIELU:
                gate += 4 * first
            _gate_columns(at, gate, min(size * count, columns - first), KIND, SPREAD)
            unit += count

    return gated_rows
