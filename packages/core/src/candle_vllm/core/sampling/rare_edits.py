# SPDX-License-Identifier: MIT
"""Rarely used edits of logits (step 7 of a request's life): a request's logits processors, DRY, sampler chain.

Shapes: V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.sampling.chain import narrow
from candle_vllm.core.sampling.params import installed_processors
from candle_vllm.core.sampling.state import SamplingState


def process_row(row: NDArray[np.float32], state: SamplingState) -> None:
    """Apply the request's own logits processors in place; the first error becomes the state's `failure`."""
    if not row.max() < np.inf:  # the model is at fault, which the sampler reports
        return
    try:
        for process in state.params.logits_processors or ():
            function = installed_processors()[process] if isinstance(process, str) else process
            result = function(tuple(state.tokens), row)
            if not isinstance(result, np.ndarray) or result.shape != row.shape or result.dtype != np.float32:
                raise TypeError(f"a processor must return a float32 array of {len(row)} logits")
            row[:] = result
            if not row.max() < np.inf:
                raise ValueError("a processor must return logits without NaN and infinity, except -inf")
    except Exception as error:  # the caller's code must not affect other requests
        state.failure = f"{type(error).__name__}: {error!s:.400}"


def narrow_row(row: NDArray[np.float32], state: SamplingState) -> None:
    """Apply DRY and the sampler chain of a request, in place."""
    if state.dry is not None:
        ids, taken = state.dry.penalties()
        row[ids] = np.maximum(row[ids].astype(np.float64) - taken, np.where(row[ids] > -np.inf, _LOWEST, -np.inf))
    if state.chain is not None:
        narrow(row, state.links())


_LOWEST = float(np.finfo(np.float32).min)
