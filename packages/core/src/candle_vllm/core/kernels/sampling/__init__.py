"""Sampling: logits of a batch to one token per row, where a token stands among the others, and edits of logits.

Contract, with R rows of V logits in float32. The parameters of a row are five float64 numbers, in the order of
`Control`. The rules of `draw`:

  - the row's weights are exp((logit - largest logit) / temperature), so that the largest is 1; temperature 0 is greedy:
    the largest logit's id, the lowest among equals;
  - min_p keeps weights of at least `min_p`;
  - top_k keeps every logit that is at least the k-th largest, so ties at the k-th are all kept (as in vLLM);
  - top_p keeps, from the largest weight down and the lowest id first among equals, each token before which the kept
    mass is still below top_p of the whole (whole: what min_p and top_k left); the first is always kept;
  - the token is the first, in order of id, at which the cumulated kept weight exceeds uniform * kept mass. A token of
    weight 0 is never taken;
  - a row's result has the same bits whatever the other rows are.

`reference.py` says the same in torch, for any device; `cpu.py` is compiled and used on the CPU where Numba is.
"""

from __future__ import annotations

import enum
import importlib.util
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.sampling import reference


class Control(enum.IntEnum):
    """The columns of the rows' parameters, [R, 5] float64."""

    TEMPERATURE = 0  # 0, or at least 1e-5
    MIN_P = 1  # 0 where unused
    TOP_K = 2  # 0 where unused, else below V
    TOP_P = 3  # 1 where unused
    UNIFORM = 4  # the row's random number in (0, 1)


@dataclass(frozen=True)
class Standing:
    """Where one token of each row stands among the logits.

    Attributes:
        offsets: [R] float64; the logarithm of a token's probability is its logit less this.
        ranks: [R] int64, 1 for the largest logit; among equals the lower id comes first.
        top_ids: [R, most] int64, the ids of the largest logits, falling, the lower id first among equals; -1 behind the
            number that was asked for and for logits of -inf.
    """

    offsets: NDArray[np.float64]
    ranks: NDArray[np.int64]
    top_ids: NDArray[np.int64]


@dataclass(frozen=True)
class Adjustment:
    """What is done to a row of logits before a token is chosen, in this order. Ids are below V.

    Attributes:
        masked: whether `allowed` and `forbidden` are looked at. A row whose NaN or +inf is masked gets a NaN instead.
        allowed: rising ids, all others become -inf; None for all.
        forbidden: ids that become -inf.
        bias_ids, bias: ids, and float32 numbers that are added to their logits.
        seen_ids, counts: ids of the prompt or the output, and float32 occurrences in the output.
        penalties: repetition (divides positive logits, multiplies the others), frequency (subtracted per occurrence),
            presence (subtracted where there is one). The arithmetic is float64; a finite logit stays finite or -inf.
    """

    masked: bool
    allowed: NDArray[np.int64] | None
    forbidden: NDArray[np.int64]
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    seen_ids: NDArray[np.int64]
    counts: NDArray[np.float32]
    penalties: tuple[float, float, float]


@cache
def compiled() -> bool:
    """Whether the CPU has compiled functions."""
    return importlib.util.find_spec("numba") is not None


def prepare() -> None:
    """Compiles what the CPU needs, or loads it, so that the first request does not wait for it."""
    if compiled():
        from candle_vllm.core.kernels.sampling import cpu

        cpu.prepare()


def draw(logits: torch.Tensor, controls: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draws one token per row.

    Args:
        logits: [R, V] float32 on any device, each row contiguous; not changed.
        controls: [R, 5] float64, contiguous, see `Control`.

    Returns:
        [R] int64 ids and [R] float32 largest logits, NaN for a row that holds one. The id of a row whose largest logit
        is not finite means nothing.
    """
    assert logits.shape[0] == controls.shape[0]
    if logits.device.type == "cpu" and compiled():
        from candle_vllm.core.kernels.sampling import cpu

        return cpu.draw(logits, controls)
    return reference.draw(logits, controls)


def stand(logits: torch.Tensor, token_ids: NDArray[np.int64], tops: NDArray[np.int64]) -> Standing:
    """Where tokens stand among the logits of their rows.

    Args:
        logits: [R, V] float32 on the CPU, each row contiguous and with a finite largest value; not changed.
        token_ids: [R] below V.
        tops: [R] how many of the largest logits to name.
    """
    if compiled():
        from candle_vllm.core.kernels.sampling import cpu

        return cpu.stand(logits, token_ids, tops)
    return Standing(*reference.stand(logits, token_ids, tops))


def adjust(row: NDArray[np.float32], adjustment: Adjustment) -> None:
    """Edits one row of V logits in place; only where `compiled()`."""
    from candle_vllm.core.kernels.sampling import cpu

    cpu.adjust(row, adjustment)
