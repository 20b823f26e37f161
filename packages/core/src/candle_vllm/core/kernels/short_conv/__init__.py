# SPDX-License-Identifier: MIT
"""Causal depthwise convolution over the tokens of a sequence; its state is the last inputs.

Contract: x [T, C] of any float dtype, weight [C, taps], bias [C] or None; y [T, C] has x's dtype, in new memory. Token
n of a sequence, from 0 on, becomes

    y[n, c] = act(bias[c] + sum over j of weight[c, j] * x[n - taps + 1 + j, c])          x is 0 before the first token

The sum is fp32, from the oldest input to the newest; act is SiLU in fp32, or the identity; the result is rounded once.
The state (slots and kept rows: see `kernels/states.py`) is the last taps - 1 inputs, the oldest first: `states` [slots,
taps - 1, C] of x's dtype, float32 in recorded steps; channels are contiguous, as in x. A kept row is x[t] in float32,
[C]. A token's result depends on its own sequence alone.

With gates (g, h), each [T, C] of x's dtype, x is first replaced by g * x, rounded to x's dtype, and y is h * act(...),
still rounded once. A recorded step overwrites x with g * x; g and h are in the same buffer as x.
Source: Wu et al., 2019, arXiv:1901.10430 (depthwise); Gu and Dao, 2023, arXiv:2312.00752, section 3.4 (with a state);
Liquid AI, 2025, arXiv:2511.23404 (with gates).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch

    from candle_vllm.core.kernels.states import StateCache, StateRows


def state_shape(channels: int, taps: int) -> tuple[int, int]:
    """Return the shape of a sequence's state; a kept row has `channels` elements."""
    return taps - 1, channels


def short_conv(
    x: Value,
    weight: Value,
    bias: Value | None,
    cache: StateCache,
    rows: StateRows | None,
    *,
    silu: bool = False,
    gates: tuple[Value, Value] | None = None,
) -> Value:
    """Return the convolved rows; the states and kept rows of `cache` are changed.

    Args:
        x, weight, bias: see above; the elements of a row of x are contiguous.
        cache: the layer's states and kept rows.
        rows: the states that the step reads and writes; None in recorded steps, which have their own.
        silu: whether act is SiLU.
        gates: g and h [T, C], see above; None without gates.
    """
    if isinstance(x, Recorded):
        return x.short_conv(weight, bias, cache, silu=silu, gates=gates)
    assert rows is not None
    _check(x, weight, bias, cache)
    assert gates is None or all(gate.shape == x.shape and gate.dtype == x.dtype for gate in gates)
    if on_gpu(x):
        from candle_vllm.core.kernels.short_conv import triton

        return triton.short_conv(x, weight, bias, cache, rows, silu=silu, gates=gates)
    from candle_vllm.core.kernels.short_conv import reference

    return reference.short_conv(x, weight, bias, cache, rows, silu=silu, gates=gates)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cache: StateCache) -> None:
    channels, taps = weight.shape
    assert x.shape[1:] == (channels,)
    assert bias is None or bias.shape == (channels,)
    assert cache.states.shape[1:] == state_shape(channels, taps)
    assert cache.states.dtype == x.dtype
    assert cache.kept.shape[2:] == (channels,)


# ---- recorded -------------------------------------------------------------------------------------------------------


class ShortConvArguments(NamedTuple):
    """Arguments of the operation; `Recorder.state_arguments` returns the fields from `states` on.

    Attributes:
        x, stride: address of float32 rows, and row stride in floats.
        gate_in, gate_out: addresses of g and h, with the same row stride; 0 without gates.
        channels: C.
        weight: address of float32 [taps, C].
        bias: address of float32 [C].
        out, out_stride: address and row stride of the result, as for x.
    """

    x: int
    stride: int
    gate_in: int
    gate_out: int
    channels: int
    weight: int
    bias: int
    out: int
    out_stride: int
    states: int
    slot_bytes: int
    kept: int
    kept_bytes: int
    kept_row_bytes: int
    query_start: int
    slots: int
    sources: int
    replays: int
    stores: int
    keeps: int
