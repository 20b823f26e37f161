# SPDX-License-Identifier: MIT
"""Linear layers with weights in groups on a GPU (step 6 of a request's life).

`linear_exact` is for few rows, and for any number of rows with `invariant`. Groups wider than 32 cost less, because
scales are applied once for a whole unit (`GroupMatrix.unit`). Codes that are floats are exact in x's dtype and need no
sums of x. `linear` is for many rows: weights are rounded first.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.group_linear.layout import GroupMatrix, Numbers
from candle_vllm.core.kernels.group_linear.triton_codes import operand, planned
from candle_vllm.core.kernels.linear.triton import CODED_CUT, Tile, build, launch, tile_for
from candle_vllm.core.kernels.linear.triton_products import exact, rounded
from candle_vllm.core.kernels.triton_build import WITH_TENSOR_CORES, Build

# The first tile with enough tokens is used, else the last. Chosen by counting registers of the compiled code, not yet
# measured on a GPU. No tile of `exact` has 64 rows for four warps: Hopper would use wgmma, which rounds differently.
TILES = (Tile(8, 32, 1, 4), Tile(16, 64, 2, 5), Tile(32, 64, 2, 4), Tile(64, 32, 4, 4), Tile(128, 32, 8, 3))
ROUNDED_TILES = (Tile(32, 128, 4, 3), Tile(64, 128, 8, 3), Tile(128, 128, 8, 3))


def linear_exact(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply exactly: made for few rows, valid for any number; see the contract in the package."""
    return launch(x, operand(matrix), bias, out, exact, tile_for(len(x), TILES), CODED_CUT)


def linear(
    x: torch.Tensor, matrix: GroupMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply many rows by weights that are rounded first; see the contract in the package."""
    return launch(x, operand(matrix), bias, out, rounded, tile_for(len(x), ROUNDED_TILES))


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
    given = planned(bits, group, zeros, columns, numbers)
    label = f"{f'{bits}bits' if numbers == 'int' else numbers}-{group // 32}parts{'-zeros' if zeros else ''}"
    if form == "many":
        tile = tile_for(tokens, ROUNDED_TILES)
        return build(given, rounded, tile, dtype, label, capabilities, form=form, bias=zeros)
    return build(given, exact, tile_for(tokens, TILES), dtype, label, capabilities, form=form, bias=form == "whole")


_FORMS = [(bits, group, zeros) for bits in (4, 8) for group in (32, 64, 128) for zeros in (False, True)]

AOT = (
    *(_build(*form, 16) for form in _FORMS),
    *(_build(4, 128, zeros, tokens, WITH_TENSOR_CORES) for zeros in (False, True) for tokens in (1, 64)),
    *(_build(bits, group, True, 128, form="fold") for bits in (4, 8) for group in (32, 128)),
    _build(8, 4128, False, 32, dtype="fp16", columns=4128, form="whole"),
    _build(4, 32, True, 16, WITH_TENSOR_CORES, dtype="fp16", columns=4128, form="whole"),
    _build(8, 128, False, 16, WITH_TENSOR_CORES, numbers="e4m3"),
    _build(8, 128, False, 128, numbers="e4m3", form="fold"),
    _build(8, 4128, False, 64, numbers="e5m2", dtype="fp16", columns=4128, form="whole"),
    _build(4, 4096, False, 16, WITH_TENSOR_CORES, numbers="e2m1"),
    _build(4, 4096, False, 128, numbers="e2m1", form="fold"),
    *(_build(*form, 128, form="many") for form in _FORMS),
    *(_build(4, 128, True, tile.tokens, WITH_TENSOR_CORES, form="many") for tile in ROUNDED_TILES),
    _build(8, 4128, False, 128, WITH_TENSOR_CORES, dtype="fp16", columns=4128, form="many"),
    _build(8, 128, False, 128, numbers="e4m3", form="many"),
    _build(8, 4128, False, 128, dtype="fp16", columns=4128, numbers="e5m2", form="many"),
    _build(4, 4096, False, 128, numbers="e2m1", form="many"),
)
