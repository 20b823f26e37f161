# SPDX-License-Identifier: MIT
"""Learned positions of a square grid, which vision encoders interpolate to an image's grid of patches.

Shapes: n patches, E hidden, k neighbours of a patch along an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.weights import Parameter

Floats: TypeAlias = NDArray[np.float32]
Neighbours: TypeAlias = Callable[[NDArray[np.int64], int, int], tuple[Sequence[NDArray[np.int64]], Sequence[Floats]]]
"""Function of rows (or columns) [n] of patches, the number of rows of the image's grid, and that of the learned grid:
k arrays [n] of rows in the learned grid, and k arrays [n] of their weights."""


class GridPositions:
    """A table of positions [side * side, E]; `neighbours` is `linear`, `centred`, `smooth` or `cubic`."""

    def __init__(self, side: int, size: int, placement: Placement, neighbours: Neighbours) -> None:
        self.side, self.weight = side, placement.empty(side**2, size)
        self._neighbours = neighbours

    def __call__(self, places: NDArray[np.int64], grid: tuple[int, int]) -> Floats:
        """Interpolated vectors [n, E] of patches at rows and columns [n, 2] of an image's grid of size `grid`."""
        table = on_host(self.weight)
        found = np.zeros((len(places), table.shape[1]), np.float32)
        rows, columns = (zip(*self._neighbours(places[:, axis], grid[axis], self.side)) for axis in (0, 1))
        across = list(columns)
        for row, down in rows:
            for column, right in across:
                found += table[row * self.side + column] * (down * right)[:, None]
        return found

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)}


def linear(places: NDArray[np.int64], count: int, side: int) -> tuple[list[NDArray[np.int64]], list[Floats]]:
    """Two neighbours; the corners of both grids are at the same places."""
    at = places * (np.float32(side - 1) / max(count - 1, 1))
    below = at.astype(np.int64)
    share = (at - below).astype(np.float32)
    return [below, np.minimum(below + 1, side - 1)], [1 - share, share]


def centred(places: NDArray[np.int64], count: int, side: int) -> tuple[list[NDArray[np.int64]], list[Floats]]:
    """Two neighbours; both grids cover the same area, and beyond it the learned grid's edge is repeated."""
    at = (places + 0.5) / count * side - 0.5
    below = np.floor(at)
    share = (at - below).astype(np.float32)
    return [np.clip(below + step, 0, side - 1).astype(np.int64) for step in (0, 1)], [1 - share, share]


def smooth(places: NDArray[np.int64], count: int, side: int) -> tuple[list[NDArray[np.int64]], list[Floats]]:
    """As `centred`, but where the image's grid is coarser, a mean over what a patch covers (antialiasing).

    The weights are a triangle's, which is as wide as two patches of the image's grid, or of the learned grid if those
    are larger.
    """
    reach = max(side / count, 1.0)
    at = (places + 0.5) / count * side - 0.5
    first = np.floor(at - reach).astype(np.int64) + 1
    indices = [first + step for step in range(math.ceil(2 * reach))]
    shares = [np.maximum(1 - np.abs(each - at) / reach, 0) * ((each >= 0) & (each < side)) for each in indices]
    total = np.add.reduce(shares)
    return [np.clip(each, 0, side - 1) for each in indices], [(each / total).astype(np.float32) for each in shares]


def cubic(places: NDArray[np.int64], count: int, side: int) -> tuple[list[NDArray[np.int64]], list[Floats]]:
    """Four neighbours; both grids cover the same area, and beyond it the learned grid's edge is repeated.

    Source: Keys, 1981, doi:10.1109/TASSP.1981.1163711, with a = -0.75 as in torch's `grid_sample`.
    """
    at, a = (places + 0.5) / count * side - 0.5, -0.75
    below = np.floor(at)
    share = at - below
    near = [((a + 2) * x - (a + 3)) * x * x + 1 for x in (share, 1 - share)]
    far = [a * (((x - 5) * x + 8) * x - 4) for x in (share + 1, 2 - share)]
    indices = [np.clip(below + step, 0, side - 1).astype(np.int64) for step in (-1, 0, 1, 2)]
    return indices, [weight.astype(np.float32) for weight in (far[0], *near, far[1])]


def sharp(places: NDArray[np.int64], count: int, side: int) -> tuple[list[NDArray[np.int64]], list[Floats]]:
    """As `smooth` with the weights of `cubic`, a = -0.5, as torch's bicubic resizing with antialiasing."""
    if count == side:
        return [places], [np.ones(len(places), np.float32)]
    reach, a = max(side / count, 1.0), -0.5
    at = (places + 0.5) / count * side - 0.5
    first = np.floor(at - 2 * reach).astype(np.int64) + 1
    indices = [first + step for step in range(math.ceil(4 * reach))]
    shares = list[NDArray[np.float64]]()
    for each in indices:
        x = np.abs(each - at) / reach
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
        shares.append(np.where(x < 1, near, np.where(x < 2, far, 0)) * ((each >= 0) & (each < side)))
    total = np.add.reduce(shares)
    return [np.clip(each, 0, side - 1) for each in indices], [(each / total).astype(np.float32) for each in shares]
