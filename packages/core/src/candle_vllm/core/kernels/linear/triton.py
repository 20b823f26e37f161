# SPDX-License-Identifier: MIT
"""Linear layers on a GPU, with the same bits for any number of rows (step 6 of a request's life).

One kernel serves any number of tokens and every storage format of a matrix; `triton_products.py` has the functions that
compute a product, and defines **steps** of K. A **tile** is some rows of the matrix and some tokens; a **stretch** is
some consecutive steps. The matrix's rows are the M dimension of the product and tokens the N dimension, so that a
decoding batch fills the tensor cores' instruction as well as possible, and the matrix is read once. The matrix's shape
alone determines the stretches, whose sums are added to 0 in order, in fp32. One program computes and adds all stretches
of a tile (FOLD) if there are enough tokens to fill the GPU; otherwise programs share them, and a second launch adds
them in the same way. Without `invariant`, a product may be a single stretch.

So a result's bits are the same for every number of tokens, provided that an instruction gives an element the same bits
at every position of the tile and for every width of the tile. The kernels rely on that for instructions of one family
and one depth (16 products) on each GPU: m64nXk16 of `wgmma` on Hopper, `tcgen05` on server Blackwell, m16n8k16 of
`mma.sync` on other GPUs. The product `exact` uses the last on every GPU. Tests search the compiled code for these
instructions and compare bits on a GPU. Therefore no tile of a plain matrix is smaller than they need (on Hopper 64 rows
for each four warps), and every tile of `exact` is smaller. float32 is multiplied without tensor cores, in the order of
K; so is float16 on GPUs where Triton uses no tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.linear.reference import check_out
from candle_vllm.core.kernels.linear.triton_products import Operand, plain, plain_operand
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability, cdiv, stages


class Tile(NamedTuple):
    """Tile of a program: tokens, rows of the matrix, warps, stages, and columns of a plain matrix at a time."""

    tokens: int
    rows: int
    warps: int
    stages: int
    columns: int = 64


class Cut(NamedTuple):
    """Division of K into stretches, by the matrix's shape, and among programs.

    Attributes:
        rows: rows of a tile that the division assumes, whatever tile a launch uses.
        programs: desired number of programs with few tokens.
        least: minimum steps of a stretch; for a plain matrix in units of `BLOCK` columns.
        enough: number of tiles from which on a program computes all stretches, if there are more than `few` tokens.
    """

    rows: int
    programs: int
    least: int
    enough: int
    few: int = 0


# The first tile with enough tokens is used, else the last. Chosen by counting bytes in flight and registers of the
# compiled code, not yet measured on a GPU.
FEW_TILES = (Tile(16, 64, 4, 6), Tile(32, 64, 4, 5), Tile(64, 64, 4, 4))
SERVER_TILES = (*FEW_TILES, Tile(128, 128, 8, 4))  # Hopper, and server Blackwell
OTHER_TILES = (*FEW_TILES, Tile(128, 128, 8, 4, 32))
ODD_TILES = FEW_TILES  # rows that are not aligned to 16 bytes are copied through registers
FLOAT_TILES = (Tile(16, 32, 4, 3, 32), Tile(64, 64, 8, 3, 32))  # without tensor cores
BLOCK = 64  # granularity of stretches in columns: a multiple of every tile's columns
CUT = Cut(rows=64, programs=264, least=4, enough=96)  # two programs for each SM of the largest GPUs
CODED_CUT = Cut(rows=32, programs=2048, least=4, enough=264, few=64)  # 16 warps for each SM of the largest GPUs
TOGETHER = 8  # tiles of rows whose programs run together, so that their x stays in the cache


@triton.jit
def tile_of(program, row_tiles, token_tiles, TOGETHER: tl.constexpr):
    """Return a program's indices (of rows, of tokens). Programs that run at the same time share rows and tokens."""
    bunch = program // (TOGETHER * token_tiles)
    inner = program % (TOGETHER * token_tiles)
    bunch_tiles = tl.minimum(row_tiles - bunch * TOGETHER, TOGETHER)
    return bunch * TOGETHER + inner % bunch_tiles, inner // bunch_tiles


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x,  # [T, K]
    low,  # planes of the matrix [N, K], see `Operand`
    high,
    scales,
    supers,
    bias,  # [N]
    out,  # [T, N], rows contiguous, or partial sums fp32 [splits, T, N]
    T,
    N,
    K,
    pitch,
    x_stride,
    out_stride,
    steps,
    split_steps,
    PRODUCT: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tile, token_tile = tile_of(tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(T, TOKENS), TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    asked = token < T
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    x_at = x + token[None, :].to(tl.int64) * x_stride
    first = 0
    last = steps
    if SPLIT:
        first = tl.program_id(1) * split_steps
        last = tl.minimum(first + split_steps, steps)
    tile = x_at, (low, high, scales, supers), row64, inside, asked, height, K, pitch
    total = PRODUCT(tile, first, last, split_steps, FORM, PADDED, FOLD)
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * T * N
    elif BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = out + token[None, :].to(tl.int64) * out_stride + row64[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & asked[None, :])


_MERGED = 256  # outputs of a program that merges; not measured yet


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    partial,  # [SPLITS, T, N] fp32
    bias,  # [N]
    out,  # [T, N], rows contiguous
    T,
    N,
    out_stride,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1).to(tl.int64)
    inside = column < N
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (token + tl.cast(split, tl.int64) * T) * N + column, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)


def merge(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write the sum of partial [S, T, N] over S, plus bias, to out [T, N], rounded once. T is at most 65,535."""
    splits, tokens, width = partial.shape
    merge_kernel[(cdiv(width, _MERGED), tokens)](
        partial,
        bias,
        out,
        tokens,
        width,
        out.stride(0),
        SPLITS=splits,
        BIAS=bias is not None,
        COLUMNS=_MERGED,
        num_warps=4,
        **OPTIONS,
    )


MOST_SPLITS = 32


def split_blocks(blocks: int, tiles: int, programs: int, least: int) -> int:
    """Return the number of blocks of a stretch; a block is a step, or for a plain matrix `BLOCK` columns.

    Args:
        blocks: number of blocks of K.
        tiles: number of tiles of the matrix's rows.
        programs: desired number of programs if all tokens are in one tile.
        least: minimum number of blocks of a stretch.
    """
    splits = min(max(programs // tiles, 1), MOST_SPLITS)
    return min(max(-(-blocks // splits), least), blocks)


def launch(
    x: torch.Tensor,
    operand: Operand,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    product: Any,
    tile: Tile,
    cut: Cut | None = None,
) -> torch.Tensor:
    """Return x [T, K] times the transpose of the matrix, plus bias; in `out` if it is given, else in new memory.

    Args:
        product: the function `plain`, `exact` or `rounded` of `triton_products.py`.
        cut: division of K; None for a single stretch.
    """
    tokens, rows = len(x), operand.rows
    _check(x, operand, bias, out)
    if out is None:
        out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tiles = cdiv(rows, tile.rows) * cdiv(tokens, tile.tokens)
    split_steps = operand.steps
    if cut is not None:
        grain = BLOCK if product is plain else 1
        split_steps = split_blocks(cdiv(operand.steps, grain), cdiv(rows, cut.rows), cut.programs, cut.least) * grain
    splits = cdiv(operand.steps, split_steps)
    fold = cut is not None and splits > 1 and tiles >= cut.enough and tokens > cut.few
    side_by_side = splits > 1 and not fold
    target = out
    if side_by_side:
        target = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    linear_kernel[(tiles, splits if side_by_side else 1)](
        x,
        *operand.planes,
        bias,
        target,
        tokens,
        rows,
        operand.columns,
        operand.pitch,
        x.stride(0),
        target.stride(-2),
        operand.steps,
        split_steps,
        **_constants(operand, product, tile, side_by_side, fold, bias is not None),
        num_warps=tile.warps,
        num_stages=stages(tile.stages),
        **OPTIONS,
    )
    if side_by_side:
        merge(target, bias, out)
    return out


def tile_for(tokens: int, tiles: Sequence[Tile]) -> Tile:
    """Return the first tile with at least `tokens` tokens, otherwise the last."""
    return next((tile for tile in tiles if tokens <= tile.tokens), tiles[-1])


def _check(x: torch.Tensor, operand: Operand, bias: torch.Tensor | None, out: torch.Tensor | None) -> None:
    device = operand.planes[0].device
    assert x.dim() == 2
    assert x.shape[1] == operand.columns > 0
    assert x.stride(1) == 1 or operand.columns == 1, "the elements of a row must be contiguous"
    assert x.device == device
    assert x.dtype in (torch.bfloat16, torch.float16) or x.dtype == operand.planes[0].dtype == torch.float32
    if bias is not None:
        assert bias.shape == (operand.rows,)
        assert bias.is_contiguous()
        assert bias.device == device
    check_out(out, x, operand.rows)
    assert out is None or out.device == device


def _constants(operand: Operand, product: Any, tile: Tile, split: bool, fold: bool, bias: bool) -> dict[str, Any]:
    return {
        "PRODUCT": product,
        "FORM": operand.form,
        "PADDED": operand.padded,
        "SPLIT": split,
        "FOLD": fold,
        "BIAS": bias and not split,
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "TOGETHER": TOGETHER,
    }


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    invariant: bool = True,
) -> torch.Tensor:
    """See the contract in the package. Without `invariant`, K is one stretch if tiles fill the GPU: a little faster."""
    assert weight.dim() == 2
    assert weight.stride(1) == 1
    assert weight.dtype == x.dtype
    assert bias is None or bias.dtype == x.dtype
    # Whether every row begins at a multiple of 16 bytes, so that rows can be copied without registers.
    aligned = all(each.data_ptr() % 16 == 0 and each.stride(0) * each.itemsize % 16 == 0 for each in (x, weight))
    tile = _tile(len(x), x.dtype, capability(x.device), aligned)
    many = cdiv(len(weight), tile.rows) * cdiv(len(x), tile.tokens) >= CUT.enough
    operand = plain_operand(weight, *weight.shape, pitch=weight.stride(0), at_a_time=tile.columns)
    return launch(x, operand, bias, out, plain, tile, CUT if invariant or not many else None)


def _tile(tokens: int, dtype: torch.dtype, capability: int, aligned: bool) -> Tile:
    if dtype == torch.float32 or capability < TENSOR_CORES:
        return tile_for(tokens, FLOAT_TILES)
    if not aligned:
        return tile_for(tokens, ODD_TILES)
    return tile_for(tokens, SERVER_TILES if capability // 10 in (9, 10) else OTHER_TILES)
