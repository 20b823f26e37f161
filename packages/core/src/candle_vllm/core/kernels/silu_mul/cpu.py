# SPDX-License-Identifier: MIT
"""Multiply rows by act(gate) in place on the CPU, or apply xIELU to them (step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Int, emitted
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


@emitted
def _gate_columns(e: Emitter, x: Int, gate: Int, count: Int, kind: int, spread: bool) -> None:
    """Multiply `count` floats by act(gate), or apply xIELU; `spread`: one gate for all."""
    b = e.b

    def body(place: Any, mask: Any, state: list[Any]) -> list[Any]:
        at = b.add(x, place)
        value = load_columns(e, at, mask)
        if kind == _XIELU:
            store_columns(e, at, _emit_xielu(e, value, gate), mask)
            return state
        gates = e.splat(e.load(gate, F32)) if spread else load_columns(e, b.add(gate, place), mask)
        act = _ACTS[kind]
        made = emit_sigmoid_times(e, value, gates) if act is None else b.fmul(value, act(e, gates))
        store_columns(e, at, made, mask)
        return state

    emit_columns(e, count, [], body)


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
