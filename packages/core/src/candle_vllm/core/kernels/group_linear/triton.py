# SPDX-License-Identifier: MIT
"""Linear layers with weights in groups on a GPU (step 6 of a request's life).

`linear_exact` is for few rows, and for any number of rows with `invariant`. Groups wider than 32 cost less, because
scales are applied once for a whole unit (`GroupMatrix.unit`). Codes that are floats are exact in x's dtype and need no
sums of x. `linear` is for many rows: weights are rounded first.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.group_linear.layout import GroupMatrix
from candle_vllm.core.kernels.group_linear.triton_codes import operand
from candle_vllm.core.kernels.linear.triton import CODED_CUT, Tile, launch, tile_for
from candle_vllm.core.kernels.linear.triton_products import exact, rounded

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
