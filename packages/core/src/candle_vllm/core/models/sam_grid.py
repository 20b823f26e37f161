# SPDX-License-Identifier: MIT
"""Row numbers by which SAM's vision encoder (`sam.py`) copies patches to windows, and reads the patches around one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.models.row_copies import RowNumbers, Starts
from candle_vllm.core.models.sam_config import SamConfig


class Grid:
    """Tables of row numbers of a tile's grid of patches; the encoder fills them for each tile.

    Attributes:
        windows, back: patches of each window, and the rows of windows for each patch.
        near: the 3 x 3 patches around each patch.
        halves: the 3 x 3 rows around every second row and column, for both convolutions with strides.
        whole, cut: places of queries and keys in the tile, and in their windows.
    """

    def __init__(self, config: SamConfig) -> None:
        most = config.patches
        self.config, self.side = config, 0
        self.windows, self.back, self.near = RowNumbers(most), RowNumbers(most), RowNumbers(most, 9)
        self.halves = RowNumbers(most, 9), RowNumbers(most, 9)
        self.whole, self.cut = Places(most), Places(most)

    def fill(self, side: int) -> None:
        """Fill the tables for a grid with this side, unless the last tile had it."""
        if side == self.side:
            return
        config, self.side = self.config, side
        window, across = config.window, -(-side // config.window)
        cell = config.cell
        # the number of the patch at each place; a cell's patches follow each other
        at = np.arange(side * side).reshape(side // cell, side // cell, cell, cell).swapaxes(1, 2).reshape(side, side)
        padded = np.full((across * window,) * 2, -1)
        padded[:side, :side] = at
        order = padded.reshape(across, window, across, window).swapaxes(1, 2).reshape(-1)
        self.windows.fill(order[None])
        back = np.empty(side * side, np.int64)
        back[order[order >= 0]] = np.flatnonzero(order >= 0)
        self.back.fill(back[None])
        place = np.empty(side * side, np.int64)
        place[at.reshape(-1)] = np.arange(side * side)
        self.near.fill(_around(at, 1)[:, place])
        self.halves[0].fill(_around(at, 2))
        half = side // 2
        self.halves[1].fill(_around(np.arange(half * half).reshape(half, half), 2))
        first = sum(map(config.run_width, config.tiles[: config.tiles.index(side)]))
        self.whole.fill(place // side, place % side, side, first, sum(map(config.run_width, config.tiles)))
        inner = np.tile(np.arange(window**2), across**2)
        self.cut.fill(inner // window, inner % window, window, 0, 2 * window - 1)


class Places:
    """Rows and columns of queries and keys, and where the runs of their relative positions begin."""

    def __init__(self, most: int) -> None:
        self.rows, self.columns = RowNumbers(most), RowNumbers(most)
        self.first_row, self.first_column = Starts(most), Starts(most)

    def fill(self, rows: NDArray[np.int64], columns: NDArray[np.int64], side: int, first: int, width: int) -> None:
        """Set the places; runs for rows begin in the `width` columns from `first` on, those for columns after these."""
        self.rows.fill(rows[None])
        self.columns.fill(columns[None])
        self.first_row.fill(first + side - 1 - rows)
        self.first_column.fill(width + first + side - 1 - columns)


def _around(at: NDArray[np.int64], stride: int) -> NDArray[np.int64]:
    """Numbers of the 3 x 3 places around every place, or every second one, row by row: [9, n]; -1 outside."""
    side = len(at)
    padded = np.full((side + 2,) * 2, -1)
    padded[1:-1, 1:-1] = at
    parts = [padded[y : y + side : stride, x : x + side : stride].reshape(-1) for y in range(3) for x in range(3)]
    return np.stack(parts)
