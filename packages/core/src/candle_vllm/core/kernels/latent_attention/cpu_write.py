# SPDX-License-Identifier: MIT
"""Rotation, norm, cache write and input conversion before latent attention on the CPU, in one pass over a step.

The latent row of a token is the rotated part of its key and its normed latent vector, in bfloat16. Of each head's query
[nope | rope], rope is rotated, scaled and written to the queries of `cpu_tiles.py`, and nope becomes an input row of
`cpu_heads.py`. A unit of work is the latent row, or one head, of a token. For an indexer, keys are not normed here, and
nope is scaled and written to the queries too; its cached row, [rope | latent], may be longer than a query. The cache of
all layers is [stretches, layers, blocks, S, R + L] bfloat16, with the slots of `attention/cpu_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale
from candle_vllm.core.kernels.attention.cpu_tiles import place_of
from candle_vllm.core.kernels.cpu_runtime.emit import Emitter, Float, Int, emitted
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float_from_bits, int64_at, read, step_number
from candle_vllm.core.kernels.latent_attention.cpu_record import PrepareArguments
from candle_vllm.core.kernels.latent_attention.cpu_tiles import copy_numbers, scaled_to_bf16, store_pairs


@emitted
def store_bf16(e: Emitter, to: Int, value: Float) -> None:
    """Write one float as bfloat16."""
    e.store(to, e.float_to_bf16(value))


@njit(inline="always")
def _rotate(x: int, half: int, cos: int, sin: int, factor: float, to: int, pair_bytes: int) -> None:
    """Write R rotated elements, times `factor`, as pairs of neighbouring bfloat16, `pair_bytes` apart."""
    row, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        a, b, j = row[i], row[i + half], i + half
        store_bf16(to + (i >> 1) * pair_bytes + 2 * (i & 1), (a * c[i] - b * s[i]) * factor)
        store_bf16(to + (j >> 1) * pair_bytes + 2 * (j & 1), (b * c[i] + a * s[i]) * factor)


@njit(inline="always")
def _copy_row(x: int, to: int, count: int, padded: int, form: int) -> None:
    """Copy `count` floats to a row of `padded` elements; fill the rest with zeros."""
    for i in range(0, count, LANES):
        copy_numbers(x, to, i, form)
    for i in range(count, padded):
        if form == 0:
            store_bf16(to + 2 * i, float_from_bits(0))
        else:
            float32_at(to)[i] = float_from_bits(0)


def make_prepare(form: int) -> Callable[..., None]:
    """Return the operation; `form` as for `cpu_tiles.copy_numbers`, or 2 for an indexer."""

    def latent_prepare(row, thread, threads):
        given = read(PrepareArguments, row)
        tokens = step_number(row, StepNumber.TOKENS.value)
        heads, nope, rope, latent = given.heads, given.nope, given.rope, given.latent
        positions, slots, one = int64_at(given.positions), int64_at(given.slots), float_from_bits(0x3F800000)
        width, half = rope + latent, rope // 2
        lines = rope + nope if form == 2 else width  # elements of a query
        groups = (heads + LANES - 1) // LANES
        each = heads + 1
        number_bytes = 2 + 2 * form
        for unit in range(tokens * each * thread // threads, tokens * each * (thread + 1) // threads):
            t, h = unit // each, unit % each
            at = 4 * half * positions[t]
            if h == heads:
                x = given.kv + 4 * t * given.kv_stride
                to = given.cache + 2 * width * place_of(slots[t], 0, given.block_shift, given.stretch_step)
                _rotate(x + 4 * latent, half, given.cos + at, given.sin + at, one, to, 4)
                if form == 2:
                    for i in range(0, latent, LANES):
                        copy_numbers(x, to + 2 * rope, i, 0)
                    continue
                scaled_to_bf16(x, given.norm, rms_scale(0, x, latent, given.eps), to + 2 * rope, latent)
            else:
                x = given.q + 4 * (t * given.q_stride + h * (nope + rope))
                to = given.queries + 2 * LANES * lines * (t * groups + h // LANES) + 4 * (h % LANES)
                _rotate(x + 4 * nope, half, given.cos + at, given.sin + at, given.scale, to, 4 * LANES)
                if form == 2:
                    for i in range(0, nope, LANES):
                        store_pairs(x + 4 * i, given.scale, to + 2 * LANES * (rope + i))
                    continue
                to = given.inputs + h * given.head_bytes + t * given.row_numbers * number_bytes
                _copy_row(x, to, nope, given.row_numbers, form)

    return latent_prepare
