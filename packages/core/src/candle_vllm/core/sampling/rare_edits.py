# SPDX-License-Identifier: MIT
"""What few requests ask to be done to their rows of logits: processors of their own, DRY and the chain (step 7 of ten).

Shapes: V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.sampling.chain import narrow
from candle_vllm.core.sampling.params import installed_processors
from candle_vllm.core.sampling.state import SamplingState


def is_rare(state: SamplingState) -> bool:
    """Whether a sequence asks for any of it."""
    return state.chain is not None or state.dry is not None or bool(state.params.logits_processors)


def process_row(row: NDArray[np.float32], state: SamplingState) -> None:
    """Calls the request's own processors, in place; the state has a `failure` where one of them fails."""
    try:
        for process in state.params.logits_processors or ():
            function = installed_processors()[process] if isinstance(process, str) else process
            result = function(tuple(state.tokens), row)
            if not isinstance(result, np.ndarray) or result.shape != row.shape or result.dtype != np.float32:
                raise TypeError(f"a processor must return a float32 array of {len(row)} logits")
            row[:] = result
    except Exception as error:  # it is the caller's code, and must not hurt the neighbours
        state.failure = f"{type(error).__name__}: {error!s:.400}"


def narrow_row(row: NDArray[np.float32], state: SamplingState) -> None:
    """DRY and the chain, in place, where the request asks for them."""
    if state.dry is not None:
        ids, taken = state.dry.penalties()
        row[ids] = np.maximum(row[ids].astype(np.float64) - taken, np.where(row[ids] > -np.inf, _LOWEST, -np.inf))
    if state.chain is not None:
        narrow(row, state.links())


_LOWEST = float(np.finfo(np.float32).min)
