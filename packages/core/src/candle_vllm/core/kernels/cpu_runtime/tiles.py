# pyright: reportCallIssue=false, reportArgumentType=false
"""What the linear operations of all weight formats share: arguments, memory on the stack, writing a tile of results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, LANES, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at

if TYPE_CHECKING:
    from candle_vllm.core.kernels.recorded import Matrix

ROWS = LANES
"""Rows of weights in a tile."""


class LinearArguments(NamedTuple):
    """The arguments of a linear operation.

    Attributes:
        rows_from: which of the step's numbers is T.
        weights, tile_bytes: address of the tiles, and bytes from one to the next.
        outputs: N.
        length: of a tile along K, in what the kind counts.
        out, row_bytes: address of the first column of the result that is written, bytes from one row to the next.
        bias: address of float32 [N], or 0.
        accumulate: add to what stands in the result.
        picked: address of int64 row numbers of the activations; 0 takes rows 0, 1, 2, ...
        x: address of the activations, in the form that the kind multiplies.
        x_bytes: from one of their rows to the next, where they are plain: a multiple of 64, and zero behind K.
        scales, sums: addresses of these of quantised activations.
        span: turns of a span, of small floats.
    """

    rows_from: int
    weights: int
    tile_bytes: int
    outputs: int
    length: int
    out: int
    row_bytes: int
    bias: int
    accumulate: int
    picked: int
    x: int
    x_bytes: int
    scales: int
    sums: int
    span: int


def linear_arguments(
    matrix: Matrix,
    length: int,
    *,
    x: int,
    x_bytes: int = 0,
    scales: int = 0,
    sums: int = 0,
    span: int = 0,
    out: int,
    out_stride: int,
    column: int = 0,
    bias: int = 0,
    accumulate: bool = False,
    picked: int = 0,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> LinearArguments:
    """For a matrix; the caller keeps all of the memory alive. As in `LinearArguments`, but for

    Args:
        out, column: address of the result, and its first column that is written.
        out_stride: floats from one row of the result to the next.
    """
    assert out_stride >= column + matrix.rows
    return LinearArguments(
        rows_from=rows_from,
        weights=address_of(matrix.data),
        tile_bytes=matrix.tile_bytes,
        outputs=matrix.rows,
        length=length,
        out=out + 4 * column,
        row_bytes=4 * out_stride,
        bias=bias,
        accumulate=accumulate,
        picked=picked,
        x=x,
        x_bytes=x_bytes,
        scales=scales,
        sums=sums,
        span=span,
    )


class EmbeddingArguments(NamedTuple):
    """The arguments of an operation that reads rows of a table.

    Attributes:
        rows_from: which of the step's numbers is T.
        weights, tile_bytes: address of the tiles, and bytes from one to the next.
        rows, columns: V and E.
        token_ids: address of int64 [T]; the row of an id that is not within 0 .. V - 1 becomes NaN.
        out, row_bytes: address of the result, float32 [T, E], and bytes from one row to the next.
    """

    rows_from: int
    weights: int
    tile_bytes: int
    rows: int
    columns: int
    token_ids: int
    out: int
    row_bytes: int


def embedding_arguments(
    matrix: Matrix, *, token_ids: int, out: int, out_stride: int, rows_from: StepNumber = StepNumber.TOKENS
) -> EmbeddingArguments:
    """For a table; `out_stride` is in floats."""
    assert out_stride >= matrix.columns
    weights = address_of(matrix.data)
    return EmbeddingArguments(
        rows_from, weights, matrix.tile_bytes, matrix.rows, matrix.columns, token_ids, out, 4 * out_stride
    )


@intrinsic
def stack_bytes(_: Any, count: Any) -> Any:
    """Address of `count` bytes of the operation's own stack, at a multiple of 64; to be called once, not in a loop."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory = b.alloca(I8, size=args[0])
        memory.align = 64
        return b.ptrtoint(memory, ir.IntType(64))

    return types.int64(types.int64), code


@intrinsic
def _add_16(_: Any, target: Any, source: Any) -> Any:
    """target[0:16] += source[0:16], floats."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        e.store(args[0], b.fadd(e.load(args[0], vector(F32)), e.load(args[1], vector(F32))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _copy_16(_: Any, target: Any, source: Any) -> Any:
    """target[0:16] = source[0:16], floats."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        e.store(args[0], e.load(args[1], vector(F32)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@njit
def write_tile(sums: int, rows: int, lanes: int, out: int, row_bytes: int, bias: int, accumulate: int) -> None:
    """Writes the sums float32 [rows, 16] of a tile to `out`: the first `lanes` of each row, plus bias, plus `out`."""
    for row in range(rows):
        source, target = sums + row * 4 * ROWS, out + row * row_bytes
        if lanes == ROWS:
            if bias:
                _add_16(source, bias)
            if accumulate:
                _add_16(source, target)
            _copy_16(target, source)
            continue
        values, old, added = float32_at(source), float32_at(target), float32_at(bias)
        for lane in range(lanes):
            value = values[lane]
            if bias:
                value += added[lane]
            if accumulate:
                value += old[lane]
            old[lane] = value
