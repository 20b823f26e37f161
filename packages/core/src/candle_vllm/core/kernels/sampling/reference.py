# SPDX-License-Identifier: MIT
"""Sampling in plain torch: the reference, and the sampler of a CPU without compiled functions.

Weights, masses and penalties are float64, over the whole vocabulary, so that they can be checked by eye. `draw` runs on
any device.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.sampling.contract import Control


def draw(logits: torch.Tensor, controls: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """See the contract in `kernels/sampling/__init__.py`."""
    ids = logits.argmax(1)
    rows = np.flatnonzero(controls[:, Control.TEMPERATURE]).tolist()
    if rows:
        ids[rows] = draw_at_random(logits[rows], controls[rows])
    both = torch.stack((ids.double(), logits.amax(1).double())).cpu().numpy()
    return both[0].astype(np.int64), both[1].astype(np.float32)


def draw_at_random(logits: torch.Tensor, controls: NDArray[np.float64]) -> torch.Tensor:
    """Sample rows whose temperature is above 0; return [R] int64 ids."""
    temperature, min_p, place, top_p, uniform = torch.as_tensor(controls, device=logits.device).T.unsqueeze(2)  # [R, 1]
    largest = logits.amax(1, keepdim=True).double()
    weights = ((logits.double() - largest) / temperature).exp()  # [R, V]
    weights = weights.masked_fill(weights < min_p, 0.0)
    top_k = int(controls[:, Control.TOP_K].max())
    if top_k:
        smallest = logits.topk(top_k, dim=1).values.gather(1, (place.long() - 1).clamp(min=0))
        weights = weights.masked_fill((logits < smallest) & (place > 0), 0.0)
    if (controls[:, Control.TOP_P] < 1).any():
        falling, order = weights.sort(dim=1, descending=True, stable=True)
        before = falling.cumsum(1)
        dropped = (before - falling >= top_p * before[:, -1:]) & (top_p < 1)
        dropped[:, 0] = False
        weights = weights.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
    cumulated = weights.cumsum(1)
    # Rounding may make uniform * total equal to the total; then the last token with a weight above 0 is sampled.
    last = (cumulated < cumulated[:, -1:]).sum(1)
    return torch.minimum((cumulated <= uniform * cumulated[:, -1:]).sum(1), last)


def stand(
    logits: torch.Tensor, token_ids: NDArray[np.int64], tops: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return offsets, ranks and top ids, see `Standing` in `contract.py`."""
    most = min(int(tops.max(initial=0)), logits.shape[1])
    falling, order = logits.sort(dim=1, descending=True, stable=True)
    ranks = 1 + (order == torch.from_numpy(token_ids).unsqueeze(1)).int().argmax(1)
    asked = torch.arange(most) < torch.from_numpy(tops).unsqueeze(1)
    top_ids = order[:, :most].masked_fill(~asked | falling[:, :most].isneginf(), -1)
    return logits.double().logsumexp(1).numpy(), ranks.numpy(), top_ids.numpy()


def add_bias(logits: torch.Tensor, bias_ids: torch.Tensor, bias: torch.Tensor) -> None:
    """Add the bias of `DeviceEdits` to the logits; see `edit_tensors` in `kernels/sampling`."""
    rows, at = (bias_ids >= 0).nonzero(as_tuple=True)
    logits[rows, bias_ids[rows, at].long()] += bias[rows, at]


def mask(logits: torch.Tensor, mask_rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Set logits of tokens with mask bit 0 to -inf, or to NaN if they are NaN or +inf."""
    token = torch.arange(logits.shape[1], device=logits.device)
    for row, number in enumerate(mask_rows.tolist()):
        if number >= 0:
            allowed = (masks[number, token // 32] >> (token % 32)) & 1 == 1
            hidden = torch.where(logits[row] < torch.inf, -torch.inf, torch.nan)
            logits[row] = torch.where(allowed, logits[row], hidden)


def penalise(logits: torch.Tensor, count_rows: torch.Tensor, counts: torch.Tensor, penalties: torch.Tensor) -> None:
    """Apply the three penalties to the logits of tokens that occurred."""
    for row, number in enumerate(count_rows.tolist()):
        if number >= 0:
            repetition, frequency, presence = penalties[row]
            wide, occurrences = logits[row].double(), (counts[number] - 1).clamp(min=0).double()
            scaled = torch.where(wide > 0, wide / repetition, wide * repetition)
            result = scaled - frequency * occurrences - presence * (occurrences > 0)
            result = result.clamp(max=torch.finfo(torch.float32).max).float()
            logits[row] = torch.where((counts[number] > 0) & (wide < torch.inf), result, logits[row])


def note(counts: torch.Tensor, count_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Add one occurrence of each row's token to the counts."""
    there = (count_rows >= 0) & (token_ids >= 0) & (token_ids < counts.shape[1])
    rows, tokens = count_rows[there].long(), token_ids[there]
    counts[rows, tokens] = counts[rows, tokens].clamp(min=1) + 1
