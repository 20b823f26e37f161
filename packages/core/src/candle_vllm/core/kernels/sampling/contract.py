# SPDX-License-Identifier: MIT
"""Arguments and results of sampling: parameters of rows, ranks of tokens, edits of logits."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.level import LANES

if TYPE_CHECKING:
    import torch


class Control(enum.IntEnum):
    """The columns of the rows' parameters, [R, 5] float64."""

    TEMPERATURE = 0  # 0, or at least 1e-5
    MIN_P = 1  # 0 where unused
    TOP_K = 2  # 0 where unused, else below V
    TOP_P = 3  # 1 where unused
    UNIFORM = 4  # the row's random number in (0, 1)


class Link(enum.IntEnum):
    """The columns of the rows' parameters of llama.cpp's chain, float64; all but MU are at least 0.

    Attributes:
        neutral: value without effect; None for a parameter that only another column's sampler uses.
        parameter: field of `SamplingParams` with the value; "" if `SamplingState` computes the value.
    """

    neutral: float | None
    parameter: str
    TOP_N_SIGMA = 0.0, "top_n_sigma"
    TOP_K = 0.0
    TYPICAL_P = 1.0, "typical_p"
    TOP_P = 1.0
    MIN_P = 0.0
    XTC = 1.0  # the threshold; neutral if XTC's probability leaves it out for this token
    TEMPERATURE = None  # temperature for mirostat; 0 is greedy sampling, which ignores mirostat
    LOW = None  # lower bound of a dynamic temperature
    HIGH = 0.0  # upper bound of a dynamic temperature
    EXPONENT = None, "dynatemp_exponent"
    MIROSTAT = 0.0, "mirostat"
    MU = None  # bits

    def __new__(cls, neutral: float | None, parameter: str = "") -> Link:
        self = int.__new__(cls, column := len(cls.__members__))
        self._value_, self.neutral, self.parameter = column, neutral, parameter
        return self


LIKELIEST = 100  # number of tokens from which mirostat 1 estimates k


@dataclass(frozen=True)
class Standing:
    """Rank of one token per row, and the likeliest tokens of each row.

    Attributes:
        offsets: [R] float64; a token's log-probability is its logit minus this offset.
        ranks: [R] int64, 1 for the largest logit; among equals the lower id comes first.
        top_ids: [R, most] int64, the ids of the largest logits, in descending order, the lower id first among equals;
            -1 for each column from the row's requested number on, and for logits of -inf.
    """

    offsets: NDArray[np.float64]
    ranks: NDArray[np.int64]
    top_ids: NDArray[np.int64]


class DeviceStanding(NamedTuple):
    """`Standing` in tensors on the logits' device. Rows whose largest logit is not finite have undefined results.

    Attributes:
        logits: [R] float32, logits of the tokens.
        top_logits: [R, most] float32; -inf for an id of -1.
    """

    offsets: torch.Tensor
    ranks: torch.Tensor
    logits: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor


@dataclass(frozen=True)
class DeviceEdits:
    """The `Adjustment` of all rows, in contiguous tensors on the logits' device; None for an edit that no row needs.

    Attributes:
        bias_ids: [R, N] int32, distinct ids in each row; -1 where unused.
        bias: [R, N] float32, added to the logits; -inf forbids a token.
        mask_rows: [R] int32, index of the row's mask, or -1 without one.
        masks: [M, ceil(V / 32)] int32; bit i % 32 of word i // 32 is 1 if token i is allowed.
        count_rows: [R] int32, index of the row's counts, or -1 without counts.
        counts: [S, V] int32, 0 for a token that is in neither prompt nor output, else 1 plus its output occurrences.
        penalties: [R, 3] float64: repetition, frequency, presence; read for rows with counts.
    """

    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mask_rows: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    count_rows: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    penalties: torch.Tensor | None = None


@dataclass(frozen=True)
class Adjustment:
    """Edits of a row of logits before sampling, in the order in which they are applied. Ids are below V.

    Attributes:
        masked: whether `allowed` and `forbidden` apply. If they mask a NaN or +inf, the row gets a NaN.
        allowed: ascending ids; the logits of all other tokens become -inf. None if all tokens are allowed.
        forbidden: ids, allowed or not, whose logits become -inf.
        bias_ids, bias: ids, and float32 numbers that are added to their logits.
        seen_ids, counts: ids in the prompt or the output, and their numbers of occurrences in the output, float32.
        penalties: repetition (divides positive logits, multiplies the others), frequency (subtracted per occurrence),
            presence (subtracted once). The arithmetic is float64; a finite logit stays finite or becomes -inf.
    """

    masked: bool
    allowed: NDArray[np.int64] | None
    forbidden: NDArray[np.int64]
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    seen_ids: NDArray[np.int64]
    counts: NDArray[np.float32]
    penalties: tuple[float, float, float]


class DrawArguments(NamedTuple):
    """Arguments of the operation that samples; its number of rows is the step's `StepNumber.LOGIT_ROWS`.

    Attributes:
        logits, row_bytes: address of the first row, and bytes from a row to the next.
        vocabulary: V.
        controls: address of float64 [rows, 5], see `Control`.
        work, work_bytes: address of the threads' workspaces, and bytes from a workspace to the next.
        chosen, largest: addresses of the results, int64 and float32 [rows].
        positions, slots, context_lens: addresses of int64 [rows], which are incremented for the next step, whose input
            is the sampled tokens; 0 to increment nothing.
    """

    logits: int
    row_bytes: int
    vocabulary: int
    controls: int
    work: int
    work_bytes: int
    chosen: int
    largest: int
    positions: int
    slots: int
    context_lens: int


# ---- the workspace of the compiled functions -------------------------------------------------------------------------

CHUNK = 512  # logits of a chunk, see `cpu_chunks.py`
CHUNK_BYTES = 4 * CHUNK
MAXIMA_BYTES = 4 * LANES  # bytes of the maxima of one chunk
EDGES_AT, MASSES_AT, TAIL_AT, WEIGHTS_AT = 0, 64, 128, 128 + CHUNK_BYTES
MAXIMA_AT = WEIGHTS_AT + CHUNK_BYTES
SUMS_AT = MAXIMA_AT + CHUNK_BYTES  # plus chunks * MAXIMA_BYTES: offset of the chunks' sums, which follow the maxima


def workspace_bytes(vocabulary: int) -> int:
    """Return the size of the workspace of a row of `vocabulary` logits."""
    return SUMS_AT + -(-vocabulary // CHUNK) * (MAXIMA_BYTES + 8 + CHUNK_BYTES) + CHUNK_BYTES


BINS = 4096
BINS_AT = 0  # offset from the end of the row's workspace: float64 masses, then a chunk's float32 distances
DISTANCES_AT = 8 * BINS


def chain_bytes(vocabulary: int) -> int:
    """Return the size of the workspace of a row to which the chain is applied."""
    return workspace_bytes(vocabulary) + DISTANCES_AT + CHUNK_BYTES
