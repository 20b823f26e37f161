"""Controls: the numbers of the sampling parameters for a batch of rows, as arrays (step 7 of ten)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.sampling.state import SamplingState


@dataclass(frozen=True)
class Controls:
    """How each of R rows is drawn, and the random number it is drawn with.

    Attributes:
        temperature: [R] float64, at least 1e-5.
        min_p: [R] float64, 0 where unused.
        top_k: [R] int64, 0 where unused, else below V.
        top_p: [R] float64, 1 where unused.
        uniform: [R] float64 in (0, 1).
    """

    temperature: NDArray[np.float64]
    min_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    uniform: NDArray[np.float64]

    @classmethod
    def of(cls, states: Sequence[SamplingState]) -> Controls:
        """The controls of these sequences at their present positions."""
        table = np.array([(s.params.temperature, s.params.min_p, s.top_k, s.params.top_p, s.uniform()) for s in states])
        return cls(table[:, 0], table[:, 1], table[:, 2].astype(np.int64), table[:, 3], table[:, 4])

    def rows(self, chosen: slice | NDArray[np.intp]) -> Controls:
        """The controls of some of the rows."""
        return Controls(
            self.temperature[chosen], self.min_p[chosen], self.top_k[chosen], self.top_p[chosen], self.uniform[chosen]
        )
