# SPDX-License-Identifier: MIT
"""Multiply each head by its own matrix on the CPU, by the linear operation of `plain_linear`.

A unit of work is some tiles of one head's matrix, for all tokens. The thread that computes queries in latent space also
converts them to the layout that `cpu_tiles.py` reads.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import call_operation, read, step_number
from candle_vllm.core.kernels.latent_attention.cpu_record import HeadsArguments
from candle_vllm.core.kernels.latent_attention.cpu_tiles import store_pairs

_UNITS_PER_THREAD = 4  # units per thread, if there are enough tiles, so that no thread waits long for another


@njit(inline="always")
def _arrange(x: int, stride: int, first: int, last: int, to: int, token_bytes: int, tokens: int, scale: float) -> None:
    """Write elements first .. last - 1 of a head's latent queries (float32 rows at x), scaled, to its lane at `to`."""
    for t in range(tokens):
        for i in range(first, last, LANES):
            store_pairs(x + 4 * (t * stride + i), scale, to + t * token_bytes + 2 * LANES * i)


def make_heads(arranges: int) -> Callable[..., None]:
    """Return the operation; if `arranges` is 1, it also converts the products to queries."""

    def latent_heads(row, thread, threads):
        given = read(HeadsArguments, row)
        heads, tiles = given.heads, given.tiles
        tokens = step_number(row, StepNumber.TOKENS.value)
        parts = min(tiles, (_UNITS_PER_THREAD * threads + heads - 1) // heads)
        units = heads * parts
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            h, part = unit // parts, unit % parts
            call_operation(given.function, given.rows + h * given.row_bytes, part, parts)
            if arranges == 1:
                first, last = tiles * part // parts * LANES, tiles * (part + 1) // parts * LANES
                groups = (heads + LANES - 1) // LANES
                to = given.queries + 2 * LANES * (h // LANES * given.width + given.rope) + 4 * (h % LANES)
                x, stride = given.latent_queries + 4 * h * tiles * LANES, heads * tiles * LANES
                _arrange(x, stride, first, last, to, 2 * LANES * given.width * groups, tokens, given.scale)

    return latent_heads
