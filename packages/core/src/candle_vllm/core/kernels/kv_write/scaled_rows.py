# SPDX-License-Identifier: MIT
"""A cache of 8-bit codes with a scale for each row (the key or value of one token and head), stored in the block.

The cache has the shape [B, S, K, D + 4] and a type of one byte: int8, float8_e4m3fn, or uint8 for the bits of
float8_e4m3fn on GPUs without this type. A block is codes [S, K, D] followed by scales [K, S] float32, so code that
copies, offloads or moves blocks need not handle scales. An element is its code times its row's scale.

With the row's largest magnitude m and the largest code c (127, or 448), the scale is m / c, and a code is the element
divided by the scale, in fp32, rounded to nearest even. A row of zeros has scale 0; a row with NaN or infinity is NaN.
"""

from __future__ import annotations

import torch

SCALE = 4
"""Bytes of a row's scale."""

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 448.0}
"""Largest code, by the type of the cache."""


def has_row_scales(cache: torch.Tensor, dim: int) -> bool:
    """Return whether rows of a cache [B, S, K, D or D + 4] have scales; `dim` is D."""
    return cache.shape[3] != dim


def codes_and_scales(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of a cache's codes [B, S, K, D], int8 or uint8, and of its scales [B, K, S] fp32."""
    blocks, size, heads, width = cache.shape
    numbers = size * heads * (width - SCALE)
    whole = cache.view(blocks, size * heads * width)
    codes = whole if cache.dtype == torch.int8 else whole.view(torch.uint8)
    scales = whole[:, numbers:].view(torch.float32).unflatten(1, (heads, size))
    return codes[:, :numbers].unflatten(1, (size, heads, width - SCALE)), scales


def write_rows(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows [T, K, D] of any float type to a cache, at slots [T] int64; no slot is negative."""
    largest = LARGEST[cache.dtype]
    x = rows.float()
    tops = x.abs().amax(-1)  # [T, K]; NaN for a row with NaN
    row_scales = tops / largest
    x = (x / torch.where(row_scales == 0, 1.0, row_scales).unsqueeze(-1)).clamp(-largest, largest)
    if cache.dtype == torch.int8:
        x = x.nan_to_num(0).round().to(torch.int8)
    else:
        x = x.nan_to_num(0).to(torch.float8_e4m3fn).view(torch.uint8)
    codes, scales = codes_and_scales(cache)
    blocks, places = slots // cache.shape[1], slots % cache.shape[1]
    codes[blocks, places] = x
    scales[blocks, :, places] = row_scales


def read_blocks(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return the elements of blocks, [..., S, K, D] fp32; tables [...] are the block numbers."""
    codes, scales = codes_and_scales(cache)
    found = codes[tables]
    numbers = found.float() if cache.dtype == torch.int8 else found.view(torch.float8_e4m3fn).float()
    return numbers * scales[tables].transpose(-1, -2).unsqueeze(-1)
