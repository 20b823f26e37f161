"""Linear layers with plain weights on a GPU, whose results do not depend on the batch (step 6 of a request's life).

One kernel for any number of rows of x. The matrix's rows are the tall side of the product and tokens the wide side, so
that a decoding batch fills the tensor cores' instruction as well as it can be, and the matrix is read once. K is cut
into stretches by the matrix's shape alone; a stretch is one chain of tensor instructions from 0, and stretches are
added to 0 in their order, in fp32: by one program that makes them all (FOLD), where there are tokens enough to fill the
GPU, else by `triton_merge.py`.

So a result's bits are the same for every number of tokens, provided that an instruction gives an element the same bits
wherever it stands in the tile and however wide the tile is. That is relied upon, for instructions of one family and one
depth (16 products), which each GPU always gets here: m64nXk16 of `wgmma` on Hopper, `tcgen05` on the Blackwell of
servers, m16n8k16 of `mma.sync` on the others; tests look for them in the compiled code, and compare bits on a GPU. It
is why no tile is smaller than these take: on Hopper 64 rows for each four warps. float32 is multiplied without tensor
cores, in the order of K; so is float16 where Triton uses none.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.linear.split import split_blocks
from candle_vllm.core.kernels.linear.triton_merge import merge
from candle_vllm.core.kernels.linear.triton_tiles import tile_of
from candle_vllm.core.kernels.triton_build import CAPABILITIES, OPTIONS, TENSOR_CORES, Build, capability, cdiv, stages


class Tile(NamedTuple):
    """A program's share: rows of the matrix, tokens, weights of a row at a time; its warps and stages."""

    rows: int
    tokens: int
    block: int
    warps: int
    stages: int


# The first that is wide enough, else the last. Chosen by counting bytes in flight and registers of the compiled code,
# not yet measured on a GPU.
FEW_TILES = (Tile(64, 16, 64, 4, 6), Tile(64, 32, 64, 4, 5), Tile(64, 64, 64, 4, 4))
SERVER_TILES = (*FEW_TILES, Tile(128, 128, 64, 8, 4))  # Hopper, and the Blackwell of servers
OTHER_TILES = (*FEW_TILES, Tile(128, 128, 32, 8, 4))
ODD_TILES = FEW_TILES  # rows that are not aligned to 16 bytes take registers on their way
FLOAT_TILES = (Tile(32, 16, 32, 4, 3), Tile(64, 64, 32, 8, 3))  # without tensor cores
BLOCK = 64  # what stretches are made of: a multiple of every tile's block
CUT_ROWS = 64  # of a tile, where programs are counted to cut K
PROGRAMS = 264  # wanted with few tokens: two for each SM of the largest GPUs
LEAST_BLOCKS = 4  # of a stretch
ENOUGH = 96  # tiles from which a program makes all stretches
TOGETHER = 8  # row tiles that are taken with each other, so that their x stays in the cache


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x,  # [T, K]
    weight,  # [N, K]
    bias,  # [N]
    out,  # [T, N], or partial sums fp32 [splits, T, N]
    T,
    N,
    K,
    x_stride,
    weight_stride,
    out_stride,
    stretch,  # weights of a row, a multiple of BLOCK
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tile, token_tile = tile_of(tl.program_id(0), T, N, ROWS, TOKENS, TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = (row < N)[:, None]
    asked = (token < T)[None, :]
    column = tl.arange(0, BLOCK)
    weight_at = weight + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    x_at = x + token.to(tl.int64)[None, :] * x_stride + column[:, None]
    first = tl.program_id(1) * stretch
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    if FOLD:
        total = sums
        for start in tl.range(0, K, stretch):
            stop = tl.minimum(start + stretch, K)
            sums = _chain(weight_at, x_at, start, stop, K, inside, asked, column, PADDED, ROWS, TOKENS, BLOCK)
            total += sums
        sums = total
    else:
        stop = tl.minimum(first + stretch, K)
        sums = _chain(weight_at, x_at, first, stop, K, inside, asked, column, PADDED, ROWS, TOKENS, BLOCK)
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * T * N
    elif BIAS:
        sums += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    place = out + token.to(tl.int64)[None, :] * out_stride + row.to(tl.int64)[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside & asked)


@triton.jit
def _chain(
    weight_at,
    x_at,
    start,
    stop,
    K,
    inside,
    asked,
    column,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of one stretch: fp32 [ROWS, TOKENS]."""
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in tl.range(start, stop, BLOCK):
        weight_there, x_there = inside, asked
        if PADDED:
            weight_there = inside & (k + column < K)[None, :]
            x_there = asked & (k + column < K)[:, None]
        weights = tl.load(weight_at + k, mask=weight_there, other=0.0)
        numbers = tl.load(x_at + k, mask=x_there, other=0.0)
        sums = tl.dot(weights, numbers, sums, input_precision="ieee")
    return sums


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = True,
) -> torch.Tensor:
    """See the contract in the package. Without the promise, many rows are summed in one stretch: a little faster."""
    _check(x, weight, bias, out)
    tokens, width = len(x), len(weight)
    if out is None:
        out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    columns = x.shape[1]
    tile = _tile(tokens, x.dtype, capability(x.device), _aligned(x, weight))
    tiles = cdiv(width, tile.rows) * cdiv(tokens, tile.tokens)
    blocks = cdiv(columns, BLOCK)
    each = split_blocks(blocks, cdiv(width, CUT_ROWS), PROGRAMS, LEAST_BLOCKS)
    if tiles >= ENOUGH and not invariant:
        each = blocks
    splits = cdiv(blocks, each)
    fold = splits > 1 and tiles >= ENOUGH
    side_by_side = splits > 1 and not fold
    target = out
    if side_by_side:
        target = torch.empty((splits, tokens, width), dtype=torch.float32, device=x.device)
    linear_kernel[(tiles, splits if side_by_side else 1)](
        x,
        weight,
        bias,
        target,
        tokens,
        width,
        columns,
        x.stride(0),
        weight.stride(0),
        target.stride(-2),
        each * BLOCK,
        **_constants(tile, columns, side_by_side, fold, bias is not None),
        num_warps=tile.warps,
        num_stages=stages(tile.stages),
        **OPTIONS,
    )
    if side_by_side:
        merge(target, bias, out)
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> None:
    assert x.dim() == weight.dim() == 2
    assert x.shape[1] == weight.shape[1]
    assert x.shape[1] > 0
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert weight.dtype == x.dtype
    assert x.stride(1) == 1, "the numbers of a row lie behind each other"
    assert weight.stride(1) == 1
    assert x.device == weight.device
    if bias is not None:
        assert bias.shape == (len(weight),)
        assert bias.dtype == x.dtype
        assert bias.is_contiguous()
        assert bias.device == x.device
    if out is not None:
        assert out.shape == (len(x), len(weight))
        assert out.stride(1) == 1
        assert out.dtype == x.dtype
        assert out.device == x.device


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, so that it can be copied without registers."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)


def _tile(tokens: int, dtype: torch.dtype, capability: int, aligned: bool) -> Tile:
    if dtype == torch.float32 or capability < TENSOR_CORES:
        tiles = FLOAT_TILES
    elif not aligned:
        tiles = ODD_TILES
    else:
        tiles = SERVER_TILES if capability // 10 in (9, 10) else OTHER_TILES
    return next((tile for tile in tiles if tokens <= tile.tokens), tiles[-1])


def _constants(tile: Tile, columns: int, split: bool, fold: bool, bias: bool) -> dict[str, Any]:
    return {
        "PADDED": columns % tile.block != 0,
        "SPLIT": split,
        "FOLD": fold,
        "BIAS": bias and not split,
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "BLOCK": tile.block,
        "TOGETHER": TOGETHER,
    }


def _build(
    dtype: str,
    tokens: int,
    capability: int,
    *,
    columns: int = 4096,
    split: bool = False,
    fold: bool = False,
    bias: bool = False,
) -> Build:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    aligned = columns % 16 == 0
    tile = _tile(tokens, kind, capability, aligned)
    constants = _constants(tile, columns, split, fold, bias)
    sizes = ("N", "K", "x_stride", "weight_stride", "out_stride", "stretch")
    arguments = dict.fromkeys(("x", "weight", "out"), f"*{dtype}") | dict.fromkeys(("T", *sizes), "i32")
    arguments |= {"out": "*fp32"} if split else {}
    arguments |= {"bias": f"*{dtype}"} if bias else {}
    form = "split" if split else "fold" if fold else "whole"
    return Build(
        linear_kernel,
        arguments,
        constants if bias else {**constants, "bias": None},
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=sizes if aligned else ("out_stride", "stretch"),
        label=f"{dtype}-{tile.tokens}-{columns}-{form}",
        capabilities=(capability,),
    )


AOT = (
    *(_build("bf16", tokens, target, split=True) for tokens in (16, 32, 64, 128) for target in CAPABILITIES),
    *(_build("bf16", tokens, target, bias=True) for tokens in (16, 128) for target in CAPABILITIES),
    *(_build("bf16", 128, target, fold=True) for target in CAPABILITIES),
    *(_build("fp16", 64, target, fold=True, bias=True) for target in CAPABILITIES),
    *(_build("fp16", tokens, 90, columns=1023, fold=True) for tokens in (16, 128)),
    *(_build("fp32", tokens, target, fold=True, bias=True) for tokens in (16, 64) for target in CAPABILITIES),
    _build("fp32", 16, 90, split=True),
)
