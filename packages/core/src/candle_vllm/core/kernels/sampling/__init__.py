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

`reference.py` says the same in torch, for any device; `cpu.py` is compiled and used on the CPU where Numba is;
`triton.py` is used on GPUs.

The functions that end in `_tensors`, and `note_tokens`, have all arguments and results on the logits' device and never
wait for it, so that a captured step may hold them. Elsewhere than on a GPU the reference does their work.
"""

from __future__ import annotations

import enum
import importlib.util
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.dispatch import on_gpu
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
class DeviceStanding:
    """As `Standing`, in tensors on the logits' device. A row whose largest logit is not finite has no meaning.

    Attributes:
        offsets: [R] float64.
        ranks: [R] int64.
        logits: [R] float32, those of the tokens.
        top_ids: [R, most] int64.
        top_logits: [R, most] float32; -inf where there is no id.
    """

    offsets: torch.Tensor
    ranks: torch.Tensor
    logits: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor


@dataclass(frozen=True)
class DeviceEdits:
    """What `Adjustment` says, for all rows, in contiguous tensors on the logits' device. None where no row has it.

    Attributes:
        bias_ids: [R, N] int32, different within a row, -1 where unused.
        bias: [R, N] float32, added to the logits; -inf forbids a token.
        mask_rows: [R] int32, the row's mask, or -1 for none.
        masks: [M, ceil(V / 32)] int32, bit i % 32 of word i // 32 is 1 where token i is allowed.
        count_rows: [R] int32, the row's counts, or -1 for none.
        counts: [S, V] int32, 0 for a token that was not seen, else 1 and its occurrences in the output.
        penalties: [R, 3] float64: repetition, frequency, presence; read where a row has counts.
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
    if on_gpu(logits):
        ids, largest = draw_tensors(logits, torch.as_tensor(controls, device=logits.device), *asks(controls))
        both = torch.stack((ids.double(), largest.double())).cpu().numpy()
        return both[0].astype(np.int64), both[1].astype(np.float32)
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


def asks(controls: NDArray[np.float64]) -> tuple[bool, bool]:
    """Whether any row draws at random, and whether any has top_k or top_p: the last arguments of `draw_tensors`."""
    drawn = controls[controls[:, Control.TEMPERATURE] > 0]
    return bool(len(drawn)), bool((drawn[:, Control.TOP_K] > 0).any() or (drawn[:, Control.TOP_P] < 1).any())


def draw_tensors(
    logits: torch.Tensor, controls: torch.Tensor, random: bool = True, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `draw`, without waiting for the device.

    Args:
        logits: [R, V] float32, each row contiguous, V up to 524,288; not changed.
        controls: [R, 5] float64, contiguous.
        random: False promises that every temperature is 0, which saves launches.
        search: False promises that no row has top_k or top_p, which saves some.

    Returns:
        [R] int64 ids and [R] float32 largest logits, NaN for a row that holds one. The id of a row whose largest logit
        is not finite is 0.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton

        return triton.draw(logits, controls, random=random, search=search)
    ids, largest = reference.draw(logits, controls.numpy())
    peaks = torch.from_numpy(largest)
    return torch.from_numpy(ids).masked_fill(~peaks.isfinite(), 0), peaks


def stand_tensors(logits: torch.Tensor, token_ids: torch.Tensor, tops: torch.Tensor, most: int) -> DeviceStanding:
    """As `stand`, without waiting for the device.

    Args:
        logits: [R, V] float32, each row contiguous, V up to 524,288; not changed.
        token_ids: [R] int64 below V.
        tops: [R] int64, how many of the largest logits to name, at most `most`.
        most: the width of the result.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton

        return triton.stand(logits, token_ids, tops, most)
    offsets, ranks, named = (torch.from_numpy(x) for x in reference.stand(logits, token_ids.numpy(), tops.numpy()))
    top_ids = torch.nn.functional.pad(named, (0, most - named.shape[1]), value=-1)
    top_logits = logits.gather(1, top_ids.clamp(min=0)).masked_fill(top_ids < 0, -torch.inf)
    return DeviceStanding(offsets, ranks, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1), top_ids, top_logits)


def edit_tensors(logits: torch.Tensor, edits: DeviceEdits) -> None:
    """Edits [R, V] float32 logits in place, without waiting for the device.

    The order is: bias, masks, penalties. What is masked though it is NaN or +inf becomes NaN. The arithmetic of the
    penalties is float64; a finite logit stays finite or -inf.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton

        triton.edit(logits, edits)
        return
    if edits.bias_ids is not None and edits.bias is not None:
        reference.add_bias(logits, edits.bias_ids, edits.bias)
    if edits.mask_rows is not None and edits.masks is not None:
        reference.mask(logits, edits.mask_rows, edits.masks)
    if edits.count_rows is not None and edits.counts is not None and edits.penalties is not None:
        reference.penalise(logits, edits.count_rows, edits.counts, edits.penalties)


def note_tokens(counts: torch.Tensor, count_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Counts one more occurrence of each row's token in the output, in place.

    Args:
        counts: [S, V] int32, see `DeviceEdits`.
        count_rows: [R] int32, all different but for -1, which counts nothing.
        token_ids: [R] int64; what is below 0 or not below V is not counted.
    """
    if on_gpu(counts):
        from candle_vllm.core.kernels.sampling import triton

        triton.note(counts, count_rows, token_ids)
        return
    reference.note(counts, count_rows, token_ids)
