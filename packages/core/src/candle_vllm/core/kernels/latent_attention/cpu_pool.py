# SPDX-License-Identifier: MIT
"""Pooled index keys on the CPU: the mean of the keys of G neighbouring positions, weighted by gates for each element.

A cached row of an indexer is [key | gate], D elements of bfloat16 each. The token at the last position of a group
replaces its own key, which nothing else reads, by the group's; the rows of the step are already written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from candle_vllm.core.kernels.attention.cpu_tiles import place_of
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_exp, emit_larger
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number
from candle_vllm.core.kernels.latent_attention.cpu_record import PoolArguments

_TOKENS = int(StepNumber.TOKENS)


@emitted
def _pool_rows(e: Emitter, rows: Int, places: Int, dim: int, pool: int) -> None:
    """Replace the last row's key by the pooled key of the `pool` rows."""
    b = e.b

    def wide(address: Any, offset: int) -> Any:
        bits = b.zext(e.load(address, vector(I16), offset), vector(I32))
        return b.bitcast(b.shl(bits, e.constant(I32, 16)), vector(F32))

    with e.each(e.int64(dim // LANES)) as index:
        at, place = b.add(rows, b.shl(index, e.int64(5))), b.add(places, b.shl(index, e.int64(6)))
        gates = [b.fadd(wide(at, 4 * dim * n + 2 * dim), e.load(place, vector(F32), 4 * dim * n)) for n in range(pool)]
        top = gates[0]
        for gate in gates[1:]:
            top = emit_larger(e, top, gate)
        total = mean = e.zeros(F32)
        for n, gate in enumerate(gates):
            weight = emit_exp(e, b.fsub(gate, top))
            total, mean = b.fadd(total, weight), e.fma(weight, wide(at, 4 * dim * n), mean)
        e.store(at, e.float_to_bf16(b.fdiv(mean, total)), 4 * dim * (pool - 1))


def make_pool(dim: int, pool: int) -> Callable[..., None]:
    """Return the operation for keys of `dim` elements and groups of `pool` positions, which no block divides."""

    def pool_keys(row, thread, threads):
        given, tokens = read(PoolArguments, row), step_number(row, _TOKENS)
        slots = int64_at(given.slots)
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            first = slots[t] - (pool - 1)
            if first % pool == 0:
                rows = given.cache + 4 * dim * place_of(first, 0, given.block_shift, given.stretch_step)
                _pool_rows(rows, given.places, dim, pool)

    return pool_keys
