# SPDX-License-Identifier: MIT
"""The gated delta rule, Mamba 1 and 2 in plain torch, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from candle_vllm.core.kernels.delta_rule.layout import COLUMNS, EPS, DeltaGates, gate_sizes

if TYPE_CHECKING:
    from candle_vllm.core.kernels.states import StateCache, StateRows


def delta_rule(
    inputs: Sequence[torch.Tensor], gates: DeltaGates, cache: StateCache, rows: StateRows, *, scale: float, normed: bool
) -> torch.Tensor:
    """See the contract in the package; the inputs are q, k, v, a and b."""
    q, k, v, a, b = inputs
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    if normed:
        wide_q, wide_k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (wide_q, wide_k))
    wide_q = wide_q * scale
    shifted, corrects = a.float() + gates.bias, gates.skip is None
    time = functional.softplus(shifted)
    y, heads, group = torch.empty_like(v), v.shape[1], v.shape[1] // k.shape[1]
    decays, _ = gate_sizes(gates, heads)
    decay = torch.exp(gates.decay * time) if decays else time[:, :0]
    if gates.least:
        decay = torch.exp(gates.least * torch.sigmoid(-gates.decay * shifted))
    strength = gates.strength * torch.sigmoid(b.float()) if corrects else time
    taken_in = torch.cat([wide_k.flatten(1), wide_v.flatten(1), decay, strength], 1)
    first = k[0].numel() + v[0].numel() + decays
    by_element = None if decays else from_tiles(gates.decay, v.shape[2])

    def behind(state: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        """Return the state [Hv, Dk, Dv] after a token with the inputs `taken`, a kept row."""
        key, value, decay, strength = taken.split([k[0].numel(), v[0].numel(), decays, taken_in.shape[1] - first])
        key, strength = key.reshape(k.shape[1:]).repeat_interleave(group, 0), strength.reshape(heads, -1)
        decay = torch.exp(by_element * strength[:, None]) if by_element is not None else decay.reshape(heads, -1, 1)
        state, value = state * decay, value.reshape(v.shape[1:])
        added = strength * (value - (key.unsqueeze(2) * state).sum(1) if corrects else value)
        return state + key.unsqueeze(2) * added.unsqueeze(1)

    sequences = zip(
        itertools.pairwise(rows.query_start.tolist()), rows.slots.tolist(), rows.sources.tolist(), rows.replays.tolist()
    )
    stores, keeps = rows.stores.tolist(), rows.keeps.tolist()
    for (start, end), slot, source, replays in sequences:
        before = torch.zeros_like(cache.states[0]) if source < 0 else cache.states[source]
        state = from_tiles(before, v.shape[2])
        for taken in cache.kept[slot, :replays]:
            state = behind(state, taken)
        for t in range(start, end):
            state = behind(state, taken_in[t])
            read = (wide_q[t].repeat_interleave(group, 0).unsqueeze(2) * state).sum(1)
            y[t] = read if corrects else read + gates.skip.reshape(heads, -1) * wide_v[t]
            if stores[t] >= 0:
                cache.states[stores[t]] = to_tiles(state)
            if keeps[t] >= 0:
                cache.kept[slot, keeps[t]] = taken_in[t]
    return y


def to_tiles(state: torch.Tensor) -> torch.Tensor:
    """Return a state [Hv, Dk, Dv] in the cache's layout."""
    filled = functional.pad(state, (0, -state.shape[2] % COLUMNS))
    return filled.unflatten(2, (-1, COLUMNS)).transpose(1, 2)


def from_tiles(tiles: torch.Tensor, value_dim: int) -> torch.Tensor:
    """Return the state [Hv, Dk, Dv] of tiles from `to_tiles`, in new memory."""
    return tiles.transpose(1, 2).flatten(2)[..., :value_dim].clone()
