"""Linear layers with quantised weights whose codes meet x exactly: for few rows, and where a row's bits are its own.

A program takes some rows of the matrix, reads their codes once through asynchronous copies, and multiplies them on the
tensor cores as exact numbers; scales are applied to the sums of a group, in fp32. magic + code is what is multiplied
(see `triton_codes.py`), so the sum of x over the group times magic is taken off again; that sum comes from the tensor
cores too, by a product with ones. K is cut into stretches by the matrix's shape alone, and stretches are added to 0 in
their order: by one program that makes them all (FOLD), where there are tokens enough to fill the GPU, else by
`linear/triton_merge.py`.

So a result's bits are the same for every number of tokens. This relies on `mma.sync` m16n8k16 giving an element the
same bits wherever it stands in a tile; every tile here gets that instruction, on Hopper too, because none gives four
warps 64 rows. Without tensor cores a sum runs over K in its order, in any tile. Products with a scale are explicit
fused operations, so that no form of the kernel rounds differently.

With many rows this is slower than rounding weights first: each group of 32 weights costs two fused operations for each
result, by count about as long as the tensor cores take. It serves them all the same where invariance is asked for: a
weight that is rounded costs about three slow instructions, and at the speed of an H200's memory there is time for two,
so the other arithmetic would slow decoding; and exact codes lose nothing.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.launch import build, checked, constants_of, planes_of
from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix, Planes
from candle_vllm.core.kernels.gguf_linear.triton_codes import high_words, pair_tile, scale_of, scale_words, spread
from candle_vllm.core.kernels.linear.split import split_blocks
from candle_vllm.core.kernels.linear.triton_merge import merge
from candle_vllm.core.kernels.linear.triton_tiles import tile_of
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.triton_build import (
    OPTIONS,
    TENSOR_CORES,
    WITH_TENSOR_CORES,
    Build,
    capability,
    cdiv,
    stages,
)


class Tile(NamedTuple):
    """A program's share: tokens, rows of the matrix; its warps and stages. No four warps with 64 rows."""

    tokens: int
    rows: int
    warps: int
    stages: int


# By how many weights share a scale: the first that is wide enough, else the last. Chosen by counting instructions and
# registers of the compiled code, not yet measured on a GPU. One warp needs no barriers; with more tokens x is worth
# sharing, and with the most a block takes long enough that fetching one ahead hides the way from the cache.
TILES = MappingProxyType(
    {
        16: (Tile(8, 32, 1, 4), Tile(16, 32, 1, 4), Tile(32, 64, 2, 4), Tile(64, 32, 2, 4), Tile(128, 32, 8, 2)),
        32: (Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 64, 2, 4), Tile(64, 32, 4, 4), Tile(128, 32, 8, 2)),
    }
)
PLAIN_TILES = MappingProxyType(  # without tensor cores: the largest that do not spill
    {16: (Tile(8, 32, 4, 1),), 32: (Tile(8, 32, 4, 1), Tile(16, 32, 8, 1))}
)
FEW = 64  # tokens for which stretches are always made side by side
PROGRAMS = 2048  # 16 warps for each SM of the largest GPUs: K is cut until there are so many
CUT_ROWS = 32  # of a program, where they are counted
LEAST_STEPS = 4  # of a stretch
ENOUGH = 264  # tiles from which a program makes all stretches
TOGETHER = 8  # row tiles that are taken with each other, so that their x stays in the cache


@triton.jit(do_not_specialize=["T"])
def exact_kernel(
    x,  # [T, K]
    low,  # [steps, N, 16]
    high,  # [steps, or half of them, N, 16]
    scales,  # [steps, WORDS, N]
    supers,  # [K / 256, N]
    bias,  # [N]
    out,  # [T, N], rows contiguous, or partial sums fp32 [splits, T, N]
    T,
    N,
    K,
    x_stride,
    out_stride,
    steps,
    split_steps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    G: tl.constexpr = 2 if LOW == 8 else 4
    STEP: tl.constexpr = G * 32
    E: tl.constexpr = WIDTH // 2  # elements that meet x at a time
    dtype: tl.constexpr = x.dtype.element_ty
    MAGIC: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    OFFSET: tl.constexpr = MAGIC * 17 if LOW == 8 else MAGIC
    row_tile, token_tile = tile_of(tl.program_id(0), T, N, ROWS, TOKENS, TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    asked = (token < T)[None, :]
    element = tl.arange(0, E)
    column = tl.arange(0, WIDTH)
    x_at = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    # Joined as the codes are: Triton 3.6 arranges K by that, and fetches x ahead only where one arrangement serves all.
    half = tl.full((ROWS, E), 1.0, tl.float32).to(dtype)
    ones = tl.reshape(tl.join(half, half), (ROWS, WIDTH))
    zeros = tl.zeros((ROWS, TOKENS), tl.float32)
    stretch = zeros  # the sums of one
    total = zeros  # of those before it
    first = tl.program_id(1) * split_steps
    last = steps if FOLD else tl.minimum(first + split_steps, steps)
    # Triton fetches ahead only what a dot product takes, so a step's scales are asked for during the one before.
    n0, n1, n2, n3, next_above = scale_words(scales, supers, first, row64, inside, height, NESTED, WORDS)
    for step in tl.range(first, last):
        w0, w1, w2, w3, above = n0, n1, n2, n3, next_above
        after = tl.minimum(step + 1, last - 1)
        n0, n1, n2, n3, next_above = scale_words(scales, supers, after, row64, inside, height, NESTED, WORDS)
        for part in tl.static_range(32 // WIDTH):
            elements = (part * E + element)[None, :]
            place = (step * height + row64)[:, None] * 16 + elements
            lows = spread(tl.load(low + place, mask=inside[:, None], other=0), LOW)
            highs = lows
            if HIGH > 0:
                highs = high_words(high, step, height, row64[:, None], elements, inside[:, None], HIGH)
                highs = spread(highs, HIGH)
            for g in tl.static_range(G):
                scale, minimum = scale_of(w0, w1, w2, w3, above, g, part, NESTED, MINIMUM, WIDTH, ZERO)
                k = step * STEP + g * 32 + part * WIDTH
                wanted = asked
                if PADDED:
                    wanted = asked & (k + column < K)[:, None]
                tile = tl.load(x_at + k, mask=wanted, other=0.0)
                sums = tl.dot(ones, tile, zeros)
                dots = tl.dot(pair_tile(lows, highs, 0, g, LOW, HIGH, dtype, ROWS, WIDTH), tile, zeros)
                if LOW == 8:  # the upper four bits
                    dots += tl.dot(pair_tile(lows, highs, 4, g, LOW, HIGH, dtype, ROWS, WIDTH), tile, zeros) * 16
                minimum -= scale * OFFSET
                stretch = tl.fma(sums, tl.broadcast_to(minimum[:, None], (ROWS, TOKENS)), stretch)
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


def linear_exact(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Made for few rows, and right for any number; see the contract in the package."""
    checked(x, matrix, bias, out)
    tokens = len(x)
    if out is None:
        out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    tile = _tile(tokens, matrix.planes, capability(x.device))
    tiles = cdiv(matrix.rows, tile.rows) * cdiv(tokens, tile.tokens)
    steps = matrix.planes.steps(matrix.columns)
    split_steps = split_blocks(steps, cdiv(matrix.rows, CUT_ROWS), PROGRAMS, LEAST_STEPS)
    splits = cdiv(steps, split_steps)
    fold = splits > 1 and tiles >= ENOUGH and tokens > FEW
    side_by_side = splits > 1 and not fold
    target = out
    if side_by_side:
        target = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device)
    exact_kernel[(tiles, splits if side_by_side else 1)](
        x,
        *planes_of(matrix),
        bias,
        target,
        tokens,
        matrix.rows,
        matrix.columns,
        x.stride(0),
        target.stride(-2),
        steps,
        split_steps,
        **_constants(tile, matrix.planes, matrix.columns, side_by_side, fold, bias is not None),
        num_warps=tile.warps,
        num_stages=stages(tile.stages),
        **OPTIONS,
    )
    if side_by_side:
        merge(target, bias, out)
    return out


def _tile(tokens: int, planes: Planes, capability: int) -> Tile:
    tiles = (TILES if capability >= TENSOR_CORES else PLAIN_TILES)[planes.layout.width]
    return next((tile for tile in tiles if tokens <= tile.tokens), tiles[-1])


def _constants(tile: Tile, planes: Planes, columns: int, split: bool, fold: bool, bias: bool) -> dict[str, Any]:
    found = constants_of(planes, columns)
    found |= {"SPLIT": split, "FOLD": fold, "BIAS": bias and not split}
    return {**found, "ROWS": tile.rows, "TOKENS": tile.tokens, "TOGETHER": TOGETHER}


def _build(
    kind: PackedKind,
    tokens: int,
    capabilities: tuple[int, ...] = (90,),
    *,
    dtype: str = "bf16",
    columns: int = 4096,
    form: str = "split",
) -> Build:
    tile = _tile(tokens, PLANES[kind], capabilities[0])
    constants = _constants(tile, PLANES[kind], columns, form == "split", form == "fold", form == "whole")
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "capabilities": capabilities}
    return build(exact_kernel, kind, dtype, constants, form, **options)


_USUAL = (PackedKind.Q4_K, PackedKind.Q6_K)

AOT = (
    *(_build(kind, 16) for kind in PackedKind),
    *(_build(kind, tokens, WITH_TENSOR_CORES) for kind in _USUAL for tokens in (1, 64)),
    *(_build(kind, 32) for kind in _USUAL),
    *(_build(kind, 128, form="fold") for kind in PackedKind),
    *(_build(kind, 128, (80, 100, 120), form="fold") for kind in _USUAL),
    _build(PackedKind.Q3_K, 8, WITH_TENSOR_CORES, dtype="fp16", form="whole"),
    _build(PackedKind.Q5_1, 16, WITH_TENSOR_CORES, columns=4128, form="whole"),
    *(_build(kind, tokens, (75,), dtype="fp16") for tokens in (8, 16) for kind in PackedKind),
    *(_build(kind, 128, (75,), dtype="fp16", form="fold") for kind in _USUAL),
    _build(PackedKind.Q5_1, 16, (75,), dtype="fp16", columns=4128, form="whole"),
)
