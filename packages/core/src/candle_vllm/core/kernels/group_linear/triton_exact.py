"""Linear layers with weights in groups whose codes meet x exactly: for few rows, and where a row's bits are its own.

Stands inside step 6 of a request's life, and does what `gguf_linear/triton_exact.py` does and explains: magic + code is
multiplied on the tensor cores, a scale meets the sums of its group in fp32, and K is cut into stretches by the matrix's
shape alone. Groups wider than 32 cost less: their sums stay on the tensor cores for a whole unit. Codes that are floats
are exact in x's dtype by themselves, and need no sums of x.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.launch import checked
from candle_vllm.core.kernels.gguf_linear.triton_codes import pair_tile
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, Numbers
from candle_vllm.core.kernels.group_linear.triton_codes import (
    build,
    constants_of,
    float_tile,
    inner_words,
    scale_and_zero,
    step_words,
    without_numbers,
)
from candle_vllm.core.kernels.linear.split import split_blocks
from candle_vllm.core.kernels.linear.triton_merge import merge
from candle_vllm.core.kernels.linear.triton_tiles import tile_of
from candle_vllm.core.kernels.triton_build import OPTIONS, WITH_TENSOR_CORES, Build, cdiv, stages


class Tile(NamedTuple):
    """A program's share: tokens, rows of the matrix; its warps and stages. No four warps with 64 rows: they would be
    given Hopper's own instruction, which rounds otherwise."""

    tokens: int
    rows: int
    warps: int
    stages: int


# Chosen by counting registers of the compiled code, not yet measured on a GPU.
TILES = (Tile(8, 32, 1, 4), Tile(16, 64, 2, 5), Tile(32, 64, 2, 4), Tile(64, 32, 4, 4), Tile(128, 32, 8, 3))
FEW = 64  # tokens for which stretches are always made side by side
PROGRAMS = 2048  # 16 warps for each SM of the largest GPUs: K is cut until there are so many
CUT_ROWS = 32  # of a program, where they are counted
LEAST_STEPS = 4  # of a stretch
ENOUGH = 264  # tiles from which a program makes all stretches
TOGETHER = 8  # row tiles that are taken with each other, so that their x stays in the cache


@triton.jit(do_not_specialize=["T"])
def exact_kernel(
    x,  # [T, K]
    codes,  # [steps, N, 16]
    scales,  # [groups, N]
    inner,  # [steps, N, 2]
    bias,  # [N]
    out,  # [T, N], rows contiguous, or partial sums fp32 [splits, T, N]
    T,
    N,
    K,
    group,
    x_stride,
    out_stride,
    steps,
    split_steps,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    FLOATS: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    MAGIC: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    OFFSET: tl.constexpr = MAGIC * 17 if BITS == 8 else MAGIC
    row_tile, token_tile = tile_of(tl.program_id(0), T, N, ROWS, TOKENS, TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    asked = (token < T)[None, :]
    element = tl.arange(0, 16)[None, :]
    column = tl.arange(0, 32)
    x_at = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    # Joined as the codes are: Triton 3.6 arranges K by that, and fetches x ahead only where one arrangement serves all.
    half = tl.full((ROWS, 16), 1.0, tl.float32).to(dtype)
    ones = tl.reshape(tl.join(half, half), (ROWS, 32))
    zeros = tl.zeros((ROWS, TOKENS), tl.float32)
    stretch = zeros  # the sums of one
    total = zeros  # of those before it
    first = tl.program_id(1) * split_steps
    last = steps if FOLD else tl.minimum(first + split_steps, steps)
    # Triton fetches ahead only what a dot product takes, so a step's scales are asked for during the one before.
    n0, n1, n2, n3 = step_words(scales, first, group, row64, inside, height, PARTS, UNIT)
    next_0, next_1 = inner_words(inner, first, row64, inside, height, FLOATS)
    for step in tl.range(first, last):
        w0, w1, w2, w3 = n0, n1, n2, n3
        i0, i1 = next_0, next_1
        after = tl.minimum(step + 1, last - 1)
        n0, n1, n2, n3 = step_words(scales, after, group, row64, inside, height, PARTS, UNIT)
        next_0, next_1 = inner_words(inner, after, row64, inside, height, FLOATS)
        place = (step * height + row64)[:, None] * 16 + element
        words = tl.load(codes + place, mask=inside[:, None], other=0)
        for unit in tl.static_range(PARTS // UNIT):
            scale, zero = scale_and_zero(w0, w1, w2, w3, unit, ZEROS, ZERO, SCALE_BF16, FLOATS)
            sums = zeros
            dots = zeros
            upper = zeros
            for part in tl.static_range(UNIT):
                k = step * (PARTS * 32) + (unit * UNIT + part) * 32
                wanted = asked
                if PADDED:
                    wanted = asked & (k + column < K)[:, None]
                tile = tl.load(x_at + k, mask=wanted, other=0.0)
                if FLOATS:
                    floats = float_tile(words, i0, i1, unit * UNIT + part, FLOATS, dtype, ROWS)
                    dots = tl.dot(floats, tile, dots)
                else:
                    sums = tl.dot(ones, tile, sums)
                    pairs = pair_tile(words, words, 0, unit * UNIT + part, BITS, 0, dtype, ROWS, 32)
                    dots = tl.dot(pairs, tile, dots)
                    if BITS == 8:  # the upper four bits
                        pairs = pair_tile(words, words, 4, unit * UNIT + part, BITS, 0, dtype, ROWS, 32)
                        upper = tl.dot(pairs, tile, upper)
            if not FLOATS:
                if BITS == 8:
                    dots += upper * 16.0
                shift = scale * (-OFFSET - zero)
                stretch = tl.fma(sums, tl.broadcast_to(shift[:, None], (ROWS, TOKENS)), stretch)
            stretch = tl.fma(dots, tl.broadcast_to(scale[:, None], (ROWS, TOKENS)), stretch)
        if FOLD:  # noqa: SIM102 - known when this is compiled
            if (step + 1) % split_steps == 0:
                total += stretch
                stretch = zeros
    if FOLD:
        stretch += total
    stored = inside[:, None] & asked
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * T * N
    elif BIAS:
        stretch += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = out + token[None, :].to(tl.int64) * out_stride + row64[:, None]
    tl.store(place, stretch.to(out.dtype.element_ty), mask=stored)


def linear(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Made for few rows, and right for any number; see the contract in the package."""
    checked(x, matrix, bias, out)
    tokens = len(x)
    if out is None:
        out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    tile = _tile(tokens)
    tiles = cdiv(matrix.rows, tile.rows) * cdiv(tokens, tile.tokens)
    split_steps = split_blocks(matrix.steps, cdiv(matrix.rows, CUT_ROWS), PROGRAMS, LEAST_STEPS)
    splits = cdiv(matrix.steps, split_steps)
    fold = splits > 1 and tiles >= ENOUGH and tokens > FEW
    side_by_side = splits > 1 and not fold
    target = out
    if side_by_side:
        target = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device)
    exact_kernel[(tiles, splits if side_by_side else 1)](
        x,
        matrix.codes,
        matrix.scales,
        matrix.inner,
        bias,
        target,
        tokens,
        matrix.rows,
        matrix.columns,
        matrix.group,
        x.stride(0),
        target.stride(-2),
        matrix.steps,
        split_steps,
        **_constants(tile, matrix, side_by_side, fold, bias is not None),
        num_warps=tile.warps,
        num_stages=stages(tile.stages),
        **OPTIONS,
    )
    if side_by_side:
        merge(target, bias, out)
    return out


def _tile(tokens: int) -> Tile:
    return next((tile for tile in TILES if tokens <= tile.tokens), TILES[-1])


def _constants(tile: Tile, matrix: GroupMatrix, split: bool, fold: bool, bias: bool) -> dict[str, Any]:
    found = constants_of(matrix) | {"SPLIT": split, "FOLD": fold, "BIAS": bias and not split}
    return {**found, "ROWS": tile.rows, "TOKENS": tile.tokens, "TOGETHER": TOGETHER}


def _build(
    bits: int,
    group: int,
    zeros: bool,
    tokens: int,
    capabilities: tuple[int, ...] = (90,),
    *,
    dtype: str = "bf16",
    columns: int = 4096,
    form: str = "split",
    numbers: Numbers = "int",
) -> Build:
    tile, matrix = _tile(tokens), without_numbers(bits, group, zeros, columns, numbers)
    constants = _constants(tile, matrix, form == "split", form == "fold", form == "whole")
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "capabilities": capabilities}
    return build(exact_kernel, matrix, dtype, constants, form, **options)


AOT = (
    *(_build(bits, group, zeros, 16) for bits in (4, 8) for group in (32, 64, 128) for zeros in (False, True)),
    *(_build(4, 128, zeros, tokens, WITH_TENSOR_CORES) for zeros in (False, True) for tokens in (1, 64)),
    *(_build(bits, group, True, 128, form="fold") for bits in (4, 8) for group in (32, 128)),
    _build(8, 4128, False, 32, dtype="fp16", columns=4128, form="whole"),
    _build(4, 32, True, 16, WITH_TENSOR_CORES, dtype="fp16", columns=4128, form="whole"),
    _build(8, 128, False, 16, WITH_TENSOR_CORES, numbers="e4m3"),
    _build(8, 128, False, 128, numbers="e4m3", form="fold"),
    _build(8, 4128, False, 64, numbers="e5m2", dtype="fp16", columns=4128, form="whole"),
    _build(4, 4096, False, 16, WITH_TENSOR_CORES, numbers="e2m1"),
    _build(4, 4096, False, 128, numbers="e2m1", form="fold"),
)
