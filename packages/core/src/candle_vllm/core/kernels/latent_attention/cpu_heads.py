# pyright: reportCallIssue=false, reportArgumentType=false
"""A matrix for every head on the CPU, by the operation of plain matrices.

A unit of work is a part of one head's rows of weights, for all tokens. Queries in latent space go on into the form that
`cpu_tiles.py` reads, by the thread that has just made them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, read, step_number
from candle_vllm.core.kernels.cpu_runtime.primitives import call_operation
from candle_vllm.core.kernels.latent_attention.cpu_tiles import store_pairs

_UNITS_PER_THREAD = 4  # at least, so that no thread waits long for another


@njit(inline="always")
def _arrange(x: int, stride: int, first: int, last: int, to: int, token_bytes: int, tokens: int, scale: float) -> None:
    """Numbers first .. last - 1 of a head's latent queries, float32 rows, into its lane."""
    for t in range(tokens):
        for i in range(first, last, LANES):
            store_pairs(x + 4 * (t * stride + i), scale, to + t * token_bytes + 2 * LANES * i)


class HeadsArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        function: address of the operation that multiplies a matrix.
        rows, row_bytes: rows of a plan for it, one for every head, and bytes from one to the next.
        heads, tiles: H, and tiles of a head's matrix.
        latent_queries: where it arranges: address of the products, float32 [T, H, L] with L a multiple of 16.
        queries, width, rope, scale: address of [T, P, D / 2, 16, 2] bfloat16, D, R, and the factor that goes into it.
    """

    function: int
    rows: int
    row_bytes: int
    heads: int
    tiles: int
    latent_queries: int = 0
    queries: int = 0
    width: int = 0
    rope: int = 0
    scale: float = 0.0


def make_heads(arranges: int) -> Callable[..., None]:
    """The operation."""

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


@cache
def heads_operation(*, arranges: bool) -> int:
    """Address of the compiled operation; one that `arranges` makes queries."""
    return compile_operation(make_heads(int(arranges)))
