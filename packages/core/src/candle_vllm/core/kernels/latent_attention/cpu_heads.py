# pyright: reportCallIssue=false, reportArgumentType=false
"""A matrix for every head on the CPU, by the operation of plain matrices.

A unit of work is a part of one head's rows of weights, for all tokens. Queries in latent space go on into the form that
`cpu_tiles.py` reads, by the thread that has just made them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, float_bits
from candle_vllm.core.kernels.cpu_runtime.primitives import call_operation, float_from_bits, int64_at
from candle_vllm.core.kernels.latent_attention.cpu_tiles import store_pairs

_TOKENS = int(StepNumber.TOKENS)
_UNITS_PER_THREAD = 4  # at least, so that no thread waits long for another


@njit(inline="always")
def _arrange(x: int, stride: int, first: int, last: int, to: int, token_bytes: int, tokens: int, scale: float) -> None:
    """Numbers first .. last - 1 of a head's latent queries, float32 rows, into its lane."""
    for t in range(tokens):
        for i in range(first, last, LANES):
            store_pairs(x + 4 * (t * stride + i), scale, to + t * token_bytes + 2 * LANES * i)


def make_heads(arranges: int) -> Callable[..., None]:
    """The operation. Arguments: see `heads_row`."""

    def latent_heads(a, thread, threads):
        function, rows, row_bytes, heads, tiles = a[3], a[4], a[5], a[6], a[7]
        tokens = int64_at(a[2])[_TOKENS]
        parts = min(tiles, (_UNITS_PER_THREAD * threads + heads - 1) // heads)
        units = heads * parts
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            h, part = unit // parts, unit % parts
            call_operation(function, rows + h * row_bytes, part, parts)
            if arranges == 1:
                first, last = tiles * part // parts * LANES, tiles * (part + 1) // parts * LANES
                groups = (heads + LANES - 1) // LANES
                width = a[10]
                to = a[9] + 2 * LANES * (h // LANES * width + a[11]) + 4 * (h % LANES)
                x = a[8] + 4 * h * tiles * LANES
                stride, scale = heads * tiles * LANES, float_from_bits(a[12])
                _arrange(x, stride, first, last, to, 2 * LANES * width * groups, tokens, scale)

    return latent_heads


@cache
def heads_operation(*, arranges: bool) -> int:
    """Address of the compiled operation; one that `arranges` makes queries."""
    return compile_operation(make_heads(int(arranges)))


def head_rows(numbers: int, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The arguments of each head's matrix, as `linear_row` of its kind gives them, int64 [H, ...]; to be kept alive.

    `numbers` is the address of the step's numbers.
    """
    return np.array([[0, 0, numbers, *row] for row in rows], np.int64)


def heads_row(
    *,
    function: int,
    rows: np.ndarray,
    outputs: int,
    latent_queries: int = 0,
    queries: int = 0,
    rope: int = 0,
    scale: float = 0.0,
) -> list[int]:
    """The operation's arguments.

    Args:
        function: address of the operation that multiplies a matrix.
        rows: its arguments for every head, see `head_rows`.
        outputs: rows of a head's matrix.
        latent_queries: where it arranges: address of the products, float32 [T, H, L] with L a multiple of 16.
        queries, rope, scale: address of [T, P, D / 2, 16, 2] bfloat16, R, and the factor that goes into it.
    """
    tiles = -(-outputs // LANES)
    made = [function, rows.ctypes.data, rows.strides[0], len(rows), tiles]
    return [*made, latent_queries, queries, rope + outputs, rope, float_bits(scale)]
