# SPDX-License-Identifier: MIT
"""Add adapters to a product on a GPU (step 6 of a request's life): two launches for any mix of adapters in a step.

A **block** is up to `most` rows of one adapter, a **stretch** some consecutive columns of x; stretches depend on K
alone. `shrink` computes x A^T of a block for each stretch and stores the results separately. `expand` adds them in
order, and adds the contract's terms to y in place. The addresses of an adapter's matrices are read from a table, so a
captured step works for all ranks up to `Slots.rank`: a program that has no work because of a smaller rank ends at once.

The adapter's rows are the M dimension of a product and tokens the N dimension, as in `kernels/linear/triton.py`, so
that a token's bits do not depend on the other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.lora.layout import GPU_RANKS
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability, cdiv, stages

# Not measured yet.
_STEP = 64  # columns of x at a time
_STRETCH = 512  # maximum number of columns of a stretch, unless that makes more than `_MOST_STRETCHES`
_MOST_STRETCHES = 8
_OUT_ROWS = 64  # columns of y of a program
_WARPS = 4
_STAGES = 3


@dataclass(frozen=True, eq=False)
class Blocks:
    """A step's rows that have adapters, on the device; each row occurs once.

    Attributes:
        table: int32 [3, blocks]: the LoRA slot of a block, or -1 for an unused block; its first index in `rows`; its
            number of rows.
        rows: int32 [R] row numbers.
        weights: float32 [R], scale of the adapter for each row.
        most: maximum number of rows of a block: 16, or `wide_block`.
    """

    table: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    most: int


@dataclass(frozen=True, eq=False)
class Slots:
    """Adapters in all LoRA slots for the fused matrices of one layer, on the device.

    Attributes:
        addresses: int64 [slots, parts, GPU_FIELDS] of A [r, K'] and c * B [N, r'] in x's type, whose rows are padded
            to multiples of `GPU_COLUMNS` and `GPU_RANKS`, and of c - 1 [N] and bias [N] in fp32; 0 for an absent one.
        ranks: int32 [slots, parts], r.
        scales: float32 [slots, parts].
        columns: int32 [parts, 2], the first column of a part in y, and its N.
        widest: the largest N.
        rank: upper bound of r.
    """

    addresses: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    columns: torch.Tensor
    widest: int
    rank: int


@triton.jit(do_not_specialize=["count", "blocks"])
def shrink_kernel(
    x,  # [T, K], rows contiguous
    addresses,
    ranks,
    table,
    rows,
    hidden,  # [stretches, R, parts * RANK]
    K,
    x_stride,
    count,  # R
    steps,  # of a stretch
    blocks,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    slot = tl.load(table + block)
    if slot < 0:
        return
    part = tl.program_id(1) % PARTS
    first = tl.program_id(1) // PARTS * ROWS
    rank = tl.load(ranks + slot * PARTS + part)
    if first >= rank:
        return
    stretch = tl.program_id(2)
    address = tl.load(addresses + (slot * PARTS + part) * 4)
    a = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
    place = tl.load(table + blocks + block) + tl.arange(0, TOKENS)
    asked = tl.arange(0, TOKENS) < tl.load(table + 2 * blocks + block)
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    lane = first + tl.arange(0, ROWS)
    pitch = tl.multiple_of((K + 15) // 16 * 16, 16)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(stretch * steps, (stretch + 1) * steps):
        column = step * STEP + tl.arange(0, STEP)
        inside = column < K
        factor = tl.load(
            a + lane[:, None].to(tl.int64) * pitch + column[None, :],
            mask=(lane < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        value = tl.load(x + row[None, :] * x_stride + column[:, None], mask=inside[:, None] & asked[None, :], other=0.0)
        total = tl.dot(factor, value, total, input_precision=PRECISION)
    at = (tl.cast(stretch, tl.int64) * count + place[None, :]) * (PARTS * RANK) + part * RANK + lane[:, None]
    tl.store(hidden + at, total, mask=asked[None, :])


@triton.jit(do_not_specialize=["count", "blocks"])
def expand_kernel(
    y,  # [T, ..], rows contiguous; changed
    like,  # any pointer of the type of A and B
    bias,  # [..] bias of the layer, already included in y, or None
    addresses,
    ranks,
    scales,
    columns,
    table,
    rows,
    weights,
    hidden,
    y_stride,
    count,
    blocks,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    STRETCHES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    slot = tl.load(table + block)
    if slot < 0:
        return
    part = tl.program_id(2)
    begin = tl.load(columns + 2 * part)
    width = tl.load(columns + 2 * part + 1)
    line = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = line < width
    if tl.program_id(1) * ROWS >= width:
        return
    own = slot * PARTS + part
    addresses += own * 4
    scaling = tl.load(addresses + 2)
    adding = tl.load(addresses + 3)
    rank = tl.load(ranks + own)
    if (rank == 0) & (scaling == 0) & (adding == 0):
        return
    kind = like.dtype.element_ty
    b = tl.multiple_of(tl.load(addresses + 1).to(tl.pointer_type(kind)), 16)
    place = tl.load(table + blocks + block) + tl.arange(0, TOKENS)
    asked = tl.arange(0, TOKENS) < tl.load(table + 2 * blocks + block)
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    scale = tl.load(scales + own)
    pitch = tl.multiple_of((rank + 15) // 16 * 16, 16)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, rank, DEPTH):
        lane = start + tl.arange(0, DEPTH)
        at = place[None, :].to(tl.int64) * (PARTS * RANK) + part * RANK + lane[:, None]
        there = (lane < pitch)[:, None] & asked[None, :]
        h = tl.zeros((DEPTH, TOKENS), tl.float32)
        for stretch in tl.static_range(STRETCHES):
            h += tl.load(hidden + tl.cast(count, tl.int64) * (stretch * PARTS * RANK) + at, mask=there, other=0.0)
        factor = tl.load(
            b + line[:, None].to(tl.int64) * pitch + lane[None, :],
            mask=inside[:, None] & (lane < pitch)[None, :],
            other=0.0,
        )
        total = tl.dot(factor, (h * scale).to(kind), total, input_precision=PRECISION)
    out = y + row[None, :] * y_stride + begin + line[:, None]
    there = inside[:, None] & asked[None, :]
    value = tl.load(out, mask=there, other=0.0).to(tl.float32)
    if scaling != 0:
        numbers = scaling.to(tl.pointer_type(tl.float32))
        less = tl.load(numbers + line, mask=inside, other=0.0)
        product = value
        if bias is not None:
            product -= tl.load(bias + begin + line, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += product * less[:, None]
    if adding != 0:
        total += tl.load(adding.to(tl.pointer_type(tl.float32)) + line, mask=inside, other=0.0)[:, None]
    weight = tl.load(weights + place, mask=asked, other=0.0)
    tl.store(out, (value + total * weight[None, :]).to(y.dtype.element_ty), mask=there)


def add_deltas(
    y: torch.Tensor, x: torch.Tensor, slots: Slots, blocks: Blocks, bias: torch.Tensor | None = None
) -> None:
    """Add adapters to y; see the contract in the package. Two launches, without waiting.

    Args:
        y: [T, sum of N], rows contiguous; changed in place.
        x: [T, K] of the matrices' type, rows contiguous.
        slots, blocks: slots of this layer, and blocks of the step.
        bias: [sum of N] bias of the layer, already included in y.
    """
    assert x.stride(1) == 1
    assert y.stride(1) == 1
    assert blocks.most in _TOKENS
    parts, columns = slots.columns.shape[0], x.shape[1]
    count, number = len(blocks.rows), blocks.table.shape[1]
    rank = cdiv(slots.rank, GPU_RANKS) * GPU_RANKS
    stretches, steps = _stretches(columns)
    hidden = torch.empty(stretches, count, parts * rank, dtype=torch.float32, device=x.device)
    shape = {"PARTS": parts, "RANK": rank, "TOKENS": blocks.most}
    how = {**_PRECISE, "num_warps": _WARPS, "num_stages": stages(_STAGES), **OPTIONS}
    first = (blocks.table, blocks.rows)
    shrink_kernel[(number, parts * (rank // GPU_RANKS), stretches)](
        x, slots.addresses, slots.ranks, *first, hidden, columns, x.stride(0), count, steps, number,
        ROWS=GPU_RANKS, STEP=_STEP, **shape, **how,
    )  # fmt: skip
    expand_kernel[(number, cdiv(slots.widest, _OUT_ROWS), parts)](
        y, x, bias, slots.addresses, slots.ranks, slots.scales, slots.columns, *first, blocks.weights, hidden,
        y.stride(0), count, number, STRETCHES=stretches, ROWS=_OUT_ROWS, DEPTH=GPU_RANKS, **shape, **how,
    )  # fmt: skip


_PRECISE = {"PRECISION": "ieee"}  # for float32; other types have only one precision
_TOKENS = (16, 32, 64)


def wide_block(device: torch.device) -> int:
    """Return the rows of a block if adapters have many rows."""
    return 64 if capability(device) >= TENSOR_CORES else 32


def _stretches(columns: int) -> tuple[int, int]:
    """Return the number of stretches of K, and the steps of a stretch."""
    steps = cdiv(columns, _STEP)
    stretches = min(_MOST_STRETCHES, cdiv(columns, _STRETCH))
    return stretches, cdiv(steps, stretches)
