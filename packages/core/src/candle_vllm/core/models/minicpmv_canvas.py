# SPDX-License-Identifier: MIT
"""MiniCPM-V 4.7: the vision encoder of 4.6 (`minicpmv_tower.py`), and rotary positions on a canvas for a whole image.

The tiles of an image's grid lie side by side on the canvas, in rows and columns of embeddings. The tile of the whole
image is spread over it, and the tokens around tiles have the canvas's corners. All have the time of the first.
Source: transformers' MiniCPMV4_7Model.get_rope_index.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.models import minicpmv_tower
from candle_vllm.core.vision.preprocessing import Cut


def _spread(cells: int, size: int) -> NDArray[np.int64]:
    """Places [cells] from 0 to `size` - 1 at equal distances, rounded, as torch's `linspace` computes them in fp32."""
    number, last = np.arange(cells), np.float32(size - 1)
    step = last / np.float32(max(cells - 1, 1))
    before, behind = number.astype(np.float32) * step, last - (cells - 1 - number).astype(np.float32) * step
    return np.where(number < cells // 2 + (cells == 1), before, behind).round().astype(np.int64)


def turned(cut: Cut, grid: tuple[int, int]) -> tuple[int, int, NDArray[np.int64]]:
    """See `Turned`; the tokens are those of `words_around` from `<image>` on."""
    (high, wide), side = grid, cut.height // grid[0]
    rows, columns = (pixels // side for pixels in cut.last or (cut.height, cut.width))
    height, width = (cut.rows * high, cut.columns * wide) if cut.rows else (rows, columns)
    whole = np.meshgrid(_spread(rows, height), _spread(columns, width), indexing="ij")
    places = [np.array([(-1, -1)]), np.stack(whole, -1).reshape(-1, 2), np.array([(height, width)])]
    inner = np.indices(grid).reshape(2, -1).T
    for row in range(cut.rows):
        if row:
            places.append(np.array([(row * high - 1, width)]))
        for column in range(cut.columns):
            corner = np.array([(row * high, column * wide)])
            places += [corner, corner + inner, corner + np.array((high - 1, wide - 1))]
    both = np.concatenate(places)
    return -1, 3, np.pad(both, ((0, 0), (1, 1)))


FAMILY = dataclasses.replace(
    minicpmv_tower.FAMILY,
    name="minicpmv_canvas",
    hf={"MiniCPMV4_7ForConditionalGeneration": "minicpmv4_7"},
    gguf=(),
    config_from_gguf=None,
    completed=None,
    turned=turned,
    trailing=("<image>", "</image>", "<slice>", "</slice>", "\n"),
)
