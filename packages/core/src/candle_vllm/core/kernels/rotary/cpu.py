# SPDX-License-Identifier: MIT
"""Rotation of heads in place on the CPU: in halves as in the package, or in pairs of neighbours."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.rotary import TurnArguments

_TOKENS = StepNumber.TOKENS.value


@njit
def turn_pairs(x: int, cos: int, sin: int, half: int, sign: float) -> None:
    """Rotate 2 * half floats at x in pairs of neighbours, forwards or, with sign -1, backwards."""
    values, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        first, second, signed = values[2 * i], values[2 * i + 1], s[i] * sign
        values[2 * i], values[2 * i + 1] = first * c[i] - second * signed, second * c[i] + first * signed


@njit(inline="always")
def turn_halves(x: int, cos: int, sin: int, half: int) -> None:
    """Rotate elements i and i + half of 2 * half floats at x."""
    values, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        first, second = values[i], values[i + half]
        values[i], values[i + half] = first * c[i] - second * s[i], second * c[i] + first * s[i]


@njit
def table_row(positions: int, turns: int, t: int) -> int:
    return int64_at(positions)[t] + (int64_at(turns)[t] if turns != 0 else 0)


def make_turn(PAIRS: int) -> Callable[..., None]:
    """Return the rotation of heads: of pairs at their end, or of halves at their beginning."""

    def turn(row, thread, threads):
        given = read(TurnArguments, row)
        heads, half = given.heads, given.half
        total = step_number(row, _TOKENS) * heads
        first, last = total * thread // threads, total * (thread + 1) // threads
        for t in range(first // heads, (last + heads - 1) // heads):
            at = table_row(given.positions, given.turns, t) * half * 4
            for h in range(max(first - t * heads, 0), min(last - t * heads, heads)):
                x = given.x + (t * given.stride + h * given.size) * 4
                if PAIRS == 1:
                    turn_pairs(x + (given.size - 2 * half) * 4, given.cos + at, given.sin + at, half, 1.0)
                else:
                    turn_halves(x, given.cos + at, given.sin + at, half)

    return turn
