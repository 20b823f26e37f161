"""What a layer's part of latent attention consists of on the CPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from candle_vllm.core.kernels.plain_linear.layout import PlainMatrix
    from candle_vllm.core.loading.config import LatentSizes


@dataclasses.dataclass(frozen=True)
class LatentParts:
    """A layer's weights and tables.

    Attributes:
        sizes: the shapes.
        norm, eps: of the latent vector, [L] float32.
        cos, sin: tables of the rotation, [P, R / 2].
        keys: for every head the matrix [L, nope] that brings its queries to latent space.
        values: for every head the matrix [V, L] that makes its result of the mixed latent vector.
    """

    sizes: LatentSizes
    norm: NDArray[np.float32]
    eps: float
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    keys: tuple[PlainMatrix, ...]
    values: tuple[PlainMatrix, ...]
