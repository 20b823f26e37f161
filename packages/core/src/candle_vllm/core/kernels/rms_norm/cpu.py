# pyright: reportCallIssue=false, reportArgumentType=false
"""Norms on the CPU that stand by themselves: of every head of a value, in place, and of rows, added to a residual.

The norm of whole rows before a matrix is part of `kernels/activation_quant` and `kernels/activation_rows`. LAYER is 1
for LayerNorm (`kernels/layer_norm`), 0 for RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.activation_quant import GROUP
from candle_vllm.core.kernels.activation_quant.cpu import (
    layer_scale,
    rms_scale,
    rms_scale_within,
    row_mean,
    share,
)
from candle_vllm.core.kernels.activation_rows.cpu import padded_row
from candle_vllm.core.kernels.cpu_runtime.emit import F32, LANES, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, read, step_number
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes

# ---- heads -----------------------------------------------------------------------------------------------------------


@intrinsic
def scale_in_place(_: Any, x: Any, weight: Any, scale: Any, lines: Any) -> Any:
    """x <- x * scale * weight for 16 columns `lines` times."""
    signature = types.void(types.int64, types.int64, types.float32, types.int64)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        factor = e.splat(args[2])

        def body(index: Any, state: list[Any]) -> list[Any]:
            offset = b.mul(index, e.int64(4 * LANES))
            at = b.add(args[0], offset)
            weights = e.load(b.add(args[1], offset), vector(F32))
            e.store(at, b.fmul(b.fmul(e.load(at, vector(F32)), factor), weights))
            return state

        e.loop_or_skip(args[3], [], body)
        return context.get_dummy_value()

    return signature, code


@njit
def _layer_norm_head(x: int, dim: int, weight: int, eps: float) -> None:
    """LayerNorm of one head, in place, without a bias."""
    mean = row_mean(x, dim)
    scale = layer_scale(x, dim, mean, eps)
    values, weights = float32_at(x), float32_at(weight)
    for i in range(dim):
        values[i] = (values[i] - mean) * scale * weights[i]


class HeadNormArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of the first head of float32 rows, `stride` floats apart. Behind the last head, 31 floats may be
            read where head_dim is no multiple of 32.
        heads, head_dim: heads stand side by side.
        weight: address of head_dim floats.
        eps: of the norm.
        weight_step: bytes from one head's weights to the next; 0 where all heads have the same.
    """

    x: int
    stride: int
    heads: int
    head_dim: int
    weight: int
    eps: float
    weight_step: int = 0


def make_head_norm(LAYER: int) -> Callable[..., None]:
    """The operation."""

    def head_norm(row, thread, threads):
        given = read(HeadNormArguments, row)
        heads, head_dim, eps = given.heads, given.head_dim, given.eps
        total = step_number(row, StepNumber.TOKENS.value) * heads
        for unit in range(total * thread // threads, total * (thread + 1) // threads):
            token = unit // heads
            head = unit - token * heads
            at = given.x + (token * given.stride + head * head_dim) * 4
            own = given.weight + head * given.weight_step
            if LAYER == 1:
                _layer_norm_head(at, head_dim, own, eps)
            elif head_dim % GROUP == 0:
                scale_in_place(at, own, rms_scale(at, head_dim, eps), head_dim // LANES)
            else:
                scale = rms_scale_within(at, head_dim, eps)
                scale_in_place(at, own, scale, head_dim // LANES)
                values, weights = float32_at(at), float32_at(own)
                for i in range(head_dim // LANES * LANES, head_dim):
                    values[i] = values[i] * scale * weights[i]

    return head_norm


@cache
def head_norm_operation(layer: bool = False) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_head_norm(int(layer)))


# ---- onto a residual -------------------------------------------------------------------------------------------------


class NormOntoArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart, whose norms are taken; not part of `target`.
        columns: of a row.
        weight: address of as many floats, behind which LayerNorm has its bias.
        eps: of the norm.
        target, target_stride: the rows that are added to.
        accumulate: 0 where the norms are written there instead.
    """

    x: int
    stride: int
    columns: int
    weight: int
    eps: float
    target: int
    target_stride: int
    accumulate: int = 1


def make_norm_onto(LAYER: int) -> Callable[..., None]:
    """Adds the norms of rows to other rows."""

    def norm_onto(row, thread, threads):
        given = read(NormOntoArguments, row)
        columns, eps = given.columns, given.eps
        rows = step_number(row, StepNumber.TOKENS.value)
        groups = (columns + GROUP - 1) // GROUP
        first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
        if group_count == 0:
            return
        ragged = columns % GROUP != 0
        copy = stack_bytes(groups * GROUP * 4 if ragged else 64)
        first, last = first_group * GROUP, min((first_group + group_count) * GROUP, columns)
        weights, biases = float32_at(given.weight), float32_at(given.weight + 4 * columns)
        for t in range(first_row, first_row + row_count):
            at = given.x + t * given.stride * 4
            if ragged:
                at = padded_row(at, columns, copy)
            values, target = float32_at(at), float32_at(given.target + t * given.target_stride * 4)
            if given.accumulate == 0:
                for i in range(first, last):
                    target[i] = 0.0
            if LAYER == 1:
                mean = row_mean(at, columns)
                scale = layer_scale(at, columns, mean, eps)
                for i in range(first, last):
                    target[i] += (values[i] - mean) * scale * weights[i] + biases[i]
            else:
                scale = rms_scale(at, columns, eps)
                for i in range(first, last):
                    target[i] += values[i] * scale * weights[i]

    return norm_onto


@cache
def norm_onto_operation(layer: bool = False) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_norm_onto(int(layer)))


def norm_rows(x: np.ndarray, weight: np.ndarray, eps: float, *, layer: bool) -> np.ndarray:
    """The norm of a step's last rows, float32 [R, K], in numpy; the bias of a LayerNorm stands behind its weight."""
    columns = x.shape[1]
    if layer:
        x = x - x.mean(1, keepdims=True)
    scale = 1 / np.sqrt(np.square(x).mean(1, keepdims=True) + np.float32(eps))
    normed = x * scale * weight[:columns]
    return normed + weight[columns:] if layer else normed
