# SPDX-License-Identifier: MIT
"""The convolution with a state in plain torch, one sequence at a time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from candle_vllm.core.kernels.states import StateCache, StateRows


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: StateCache,
    rows: StateRows,
    *,
    silu: bool = False,
    gates: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """See the contract in the package."""
    if gates is not None:
        x = gates[0] * x
    y, before, taps = torch.empty_like(x), weight.shape[1] - 1, weight.float().unbind(1)
    sequences = zip(
        itertools.pairwise(rows.query_start.tolist()), rows.slots.tolist(), rows.sources.tolist(), rows.replays.tolist()
    )
    stores, keeps = rows.stores.tolist(), rows.keeps.tolist()
    for (start, end), slot, source, replays in sequences:
        state = torch.zeros_like(cache.states[0]) if source < 0 else cache.states[source]
        taken = torch.cat([state, cache.kept[slot, :replays].to(x.dtype), x[start:end]])  # ends with this step's rows
        count = end - start
        first = len(taken) - count - before
        total = torch.zeros(count, x.shape[1]) if bias is None else bias.float().repeat(count, 1)
        for place, factor in enumerate(taps):
            total += factor * taken[first + place : first + place + count].float()
        total = torch.nn.functional.silu(total) if silu else total
        y[start:end] = total if gates is None else total * gates[1][start:end].float()
        for t in range(start, end):
            if stores[t] >= 0:
                cache.states[stores[t]] = taken[first + t - start + 1 : first + t - start + 1 + before]
            if keeps[t] >= 0:
                cache.kept[slot, keeps[t]] = x[t]
    return y
