# SPDX-License-Identifier: MIT
"""Linear layers and embedding rows with GGUF's quantised weights on a GPU (step 6 of a request's life).

Terms (group, step, plane): see `layout.py`. `linear_exact` multiplies codes by x exactly, for few rows (decoding), and
for any number of rows with `invariant`. With many rows, rounding weights first is faster, because applying the scales
in `linear_exact` takes about as long as the tensor cores' products. With few rows, rounding would be slower: it takes
about three slow instructions for each weight, and an H200 loads a weight in the time of two. The results are invariant
because every tile of `linear_exact` is too small for wgmma, so that all use the instruction m16n8k16, on Hopper too.

`linear` rounds a tile of weights first, for many rows (prefill). On a GPU whose tensor cores, if any, Triton does not
use, parts of the matrix are decoded, and torch multiplies.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix
from candle_vllm.core.kernels.gguf_linear.triton_codes import float_code, operand, scale_of
from candle_vllm.core.kernels.linear import linear as plain_linear
from candle_vllm.core.kernels.linear.triton import CODED_CUT, Tile, launch, tile_for
from candle_vllm.core.kernels.linear.triton_products import exact, rounded
from candle_vllm.core.kernels.packed_linear.layout import LAYOUTS, PackedKind
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability

# Tiles by the number of weights that share a scale. The first tile that has at least as many tokens as x is used,
# otherwise the last. Chosen by counting instructions and registers of the compiled code, not yet measured on a GPU. One
# warp needs no barriers. With more tokens, warps share x; with the most tokens, a step along K takes so long that
# prefetching one step hides the latency.
TILES = MappingProxyType(
    {
        16: (Tile(8, 32, 1, 4), Tile(16, 32, 1, 4), Tile(32, 64, 2, 4), Tile(64, 32, 2, 4), Tile(128, 32, 8, 2)),
        32: (Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 64, 2, 4), Tile(64, 32, 4, 4), Tile(128, 32, 8, 2)),
    }
)
PLAIN_TILES = MappingProxyType(  # without tensor cores: the largest tiles that do not spill
    {16: (Tile(8, 32, 4, 1),), 32: (Tile(8, 32, 4, 1), Tile(16, 32, 8, 1))}
)
# For codes that are looked up in a table, which takes registers: the largest tiles that do not spill.
TABLE_TILES = (Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 32, 2, 4), Tile(64, 32, 8, 4))
PLAIN_TABLE_TILES = MappingProxyType(
    {16: (Tile(8, 16, 4, 1), Tile(16, 32, 8, 1)), 32: (Tile(8, 32, 8, 1), Tile(16, 32, 8, 1))}
)
ROUNDED_TILES = (Tile(32, 128, 8, 3), Tile(64, 128, 8, 3), Tile(128, 128, 8, 3))
PIECE = 1 << 24  # weights that are decoded at a time for torch's product


@triton.jit
def embedding_kernel(
    token_ids,  # [T]
    low,
    high,
    scales,
    supers,
    out,  # [T, K]
    N,
    K,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Decode `parts` groups of 32 weights of one token's row in a program."""
    G: tl.constexpr = FORM.parts
    LOW: tl.constexpr = FORM.low
    HIGH: tl.constexpr = FORM.high
    WIDTH: tl.constexpr = FORM.width
    step = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids + token + tl.arange(0, 1)).to(tl.int64)
    inside = (row >= 0) & (row < N)
    height = tl.cast(N, tl.int64)
    planes = (low, high, scales, supers)
    words = FORM.words(planes, step, row, inside, height, None, FORM)
    element = tl.arange(0, 16)
    lows, highs = FORM.codes(planes, step, element[None, :], row, inside, height, FORM, False)
    for g in tl.static_range(G):
        scale, minimum = scale_of(words, g, 0, FORM)
        if WIDTH == 16:
            scale_2, minimum_2 = scale_of(words, g, 1, FORM)
            scale = tl.where(element >= 8, scale_2, scale)
            minimum = tl.where(element >= 8, minimum_2, minimum)
        even = (float_code(lows, highs, g, 0, G, LOW, HIGH) - 2048.0) * scale + minimum
        odd = (float_code(lows, highs, g, 1, G, LOW, HIGH) - 2048.0) * scale + minimum
        k = (step * G + g) * 32 + tl.arange(0, 32)
        values = tl.reshape(tl.join(even, odd), (32,)).to(out.dtype.element_ty)
        tl.store(out + token * K + k, values, mask=(k < K) if PADDED else None)


def linear_exact(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply exactly: made for few rows, valid for any number; see the contract in the package."""
    tile = _tile(len(x), matrix.kind, capability(x.device))
    return launch(x, operand(matrix), bias, out, exact, tile, CODED_CUT)


def linear(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply any number of rows by weights that are rounded first; see the contract in the package."""
    if capability(x.device) >= TENSOR_CORES or not len(x):
        return launch(x, operand(matrix), bias, out, rounded, tile_for(len(x), ROUNDED_TILES))
    if out is None:
        out = torch.empty((len(x), matrix.rows), dtype=x.dtype, device=x.device)
    height = max(1, PIECE // matrix.columns)
    for first in range(0, matrix.rows, height):
        last = min(first + height, matrix.rows)
        weights = embedding(torch.arange(first, last, device=x.device), matrix, x.dtype)
        plain_linear(x, weights, None if bias is None else bias[first:last], out=out[:, first:last])
    return out


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """See the contract in the package."""
    assert token_ids.dim() == 1
    assert token_ids.is_contiguous()
    assert token_ids.dtype in (torch.int32, torch.int64)
    assert token_ids.device == matrix.device
    out = torch.empty((len(token_ids), matrix.columns), dtype=dtype, device=matrix.device)
    if len(token_ids):
        given = operand(matrix)
        embedding_kernel[(len(token_ids), given.steps)](
            token_ids,
            *given.planes,
            out,
            matrix.rows,
            matrix.columns,
            FORM=given.form,
            PADDED=given.padded,
            num_warps=1,
            **OPTIONS,
        )
    return out


def _tile(tokens: int, kind: PackedKind, capability: int) -> Tile:
    if PLANES[kind].layout.values is not None:
        return tile_for(tokens, TABLE_TILES if capability >= TENSOR_CORES else PLAIN_TABLE_TILES[LAYOUTS[kind].width])
    return tile_for(tokens, (TILES if capability >= TENSOR_CORES else PLAIN_TILES)[LAYOUTS[kind].width])
