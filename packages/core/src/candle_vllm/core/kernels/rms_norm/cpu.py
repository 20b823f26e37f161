# SPDX-License-Identifier: MIT
"""Separate norm operations on the CPU: one norms heads in place, one adds normed rows to other rows or writes them.

The norm of whole rows before a matrix is part of `kernels/activation_quant` and `kernels/activation_rows`. LAYER is 1
for LayerNorm (`kernels/layer_norm`), 0 for RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from candle_vllm.core.kernels.activation_quant import GROUP
from candle_vllm.core.kernels.activation_quant.cpu import layer_scale, rms_scale, row_mean, share
from candle_vllm.core.kernels.activation_rows.cpu import padded_row
from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.rms_norm import HeadNormArguments, NormOntoArguments

# ---- heads -----------------------------------------------------------------------------------------------------------


@emitted
def scale_in_place(e: Emitter, x: Int, weight: Int, scale: Float, lines: Int) -> None:
    """Multiply 16 * `lines` floats at x by a scale and by weights, in place."""
    b = e.b
    factor = e.splat(scale)
    with e.each_or_skip(lines) as index:
        offset = b.mul(index, e.int64(4 * LANES))
        at = b.add(x, offset)
        weights = e.load(b.add(weight, offset), vector(F32))
        e.store(at, b.fmul(b.fmul(e.load(at, vector(F32)), factor), weights))


@njit
def _layer_norm_head(x: int, dim: int, weight: int, eps: float) -> None:
    """LayerNorm of one head, in place, without a bias."""
    mean = row_mean(x, dim)
    scale = layer_scale(x, dim, mean, eps)
    values, weights = float32_at(x), float32_at(weight)
    for i in range(dim):
        values[i] = (values[i] - mean) * scale * weights[i]


def make_head_norm(LAYER: int) -> Callable[..., None]:
    def head_norm(row, thread, threads):
        given = read(HeadNormArguments, row)
        heads, head_dim, eps = given.heads, given.head_dim, given.eps
        total = step_number(row, given.rows_from) * heads
        for unit in range(total * thread // threads, total * (thread + 1) // threads):
            token = unit // heads
            head = unit - token * heads
            at = given.x + (token * given.stride + head * head_dim) * 4
            own = given.weight + head * given.weight_step
            if LAYER == 1:
                _layer_norm_head(at, head_dim, own, eps)
            elif head_dim % GROUP == 0:
                scale_in_place(at, own, rms_scale(0, at, head_dim, eps), head_dim // LANES)
            else:
                scale = rms_scale(1, at, head_dim, eps)
                scale_in_place(at, own, scale, head_dim // LANES)
                values, weights = float32_at(at), float32_at(own)
                for i in range(head_dim // LANES * LANES, head_dim):
                    values[i] = values[i] * scale * weights[i]

    return head_norm


# ---- onto a residual -------------------------------------------------------------------------------------------------


def make_norm_onto(LAYER: int) -> Callable[..., None]:
    """Return the operation that writes the norms of rows to other rows, or adds them with `accumulate`."""

    def norm_onto(row, thread, threads):
        given = read(NormOntoArguments, row)
        columns, eps = given.columns, given.eps
        rows = step_number(row, given.rows_from)
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
                scale = rms_scale(0, at, columns, eps)
                for i in range(first, last):
                    target[i] += values[i] * scale * weights[i]

    return norm_onto
