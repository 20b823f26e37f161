# pyright: reportGeneralTypeIssues=false
"""Which tile of a product is a program's (step 6 of a request's life)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, T, N, ROWS: tl.constexpr, TOKENS: tl.constexpr, TOGETHER: tl.constexpr):
    """(tile of rows, tile of tokens). Programs that run at the same time share a few of each."""
    row_tiles = tl.cdiv(N, ROWS)
    token_tiles = tl.cdiv(T, TOKENS)
    bunch = program // (TOGETHER * token_tiles)
    inner = program % (TOGETHER * token_tiles)
    bunch_tiles = tl.minimum(row_tiles - bunch * TOGETHER, TOGETHER)
    return bunch * TOGETHER + inner % bunch_tiles, inner // bunch_tiles
