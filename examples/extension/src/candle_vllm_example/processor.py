# SPDX-License-Identifier: MIT
"""Logits processor for `SamplingParams(logits_processors=["no_repeat"])`: no token follows itself."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def no_repeat(tokens: Sequence[int], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits [V: size of the vocabulary] with the last token excluded."""
    row[tokens[-1]] = -np.inf
    return row
