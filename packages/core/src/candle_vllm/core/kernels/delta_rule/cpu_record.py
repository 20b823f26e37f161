# SPDX-License-Identifier: MIT
"""Record a layer's delta rule on the CPU: the operations of `cpu.py`, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.delta_rule import layout

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder
    from candle_vllm.core.kernels.states import StateCache


class Rows(NamedTuple):
    """Float32 rows: address, row stride in floats, columns, and size of a head (None without heads)."""

    address: int
    stride: int
    width: int
    head_dim: int | None


def record_delta_rule(
    recorder: Recorder,
    given: Sequence[Rows],
    out: Rows,
    gates: layout.DeltaGates,
    cache: StateCache,
    *,
    scale: float,
    normed: bool,
) -> None:
    """Record `prepare` (not for Mamba 1, whose dt `scan` computes), `scan`, and `keep` if a step can have draft tokens.

    Args:
        given: q, k, v, a and b.
        gates, cache, scale, normed: see `delta_rule` in the package.
    """
    q, k, v, a, b = given
    key_dim, value_dim = q.head_dim, v.head_dim
    assert key_dim is not None
    assert value_dim is not None
    assert (k.width, k.head_dim) == (q.width, key_dim)
    key_heads, heads = q.width // key_dim, v.width // value_dim
    assert heads % key_heads == 0
    decays, strengths = layout.gate_sizes(gates, heads)
    assert b.width == strengths
    assert a.width == max(decays, strengths) == gates.bias.size
    assert cache.states.shape[1:] == layout.state_shape(heads, key_dim, value_dim)
    by_element = not decays
    assert gates.least == 0 or decays == heads * key_dim
    assert decays in (heads, heads * key_dim) or (
        scale == 1 and not normed and gates.decay.shape == cache.states.shape[1:]
    )
    made, stride = (
        (a.address, a.stride) if by_element else (address_of(recorder.memory(decays + heads)), decays + heads)
    )
    arguments = layout.DeltaArguments(
        *(number for rows in given for number in (rows.address, rows.stride)),
        decay=recorder.keep(gates.decay),
        bias=recorder.keep(gates.bias),
        strength=gates.strength,
        least=gates.least,
        skip=0 if gates.skip is None else recorder.keep(gates.skip),
        normed=normed,
        scale=scale,
        key_heads=key_heads,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decays=decays,
        strengths=strengths,
        gates=made,
        gates_stride=stride,
        out=out.address,
        out_stride=out.stride,
        **recorder.state_arguments(cache),
    )
    if not by_element:
        recorder.add(operation("delta_rule.cpu:prepare"), arguments)
    grain = 2 if by_element else decays > heads
    recorder.add(operation("delta_rule.cpu:make_scan", gates.skip is None, grain), arguments)
    if cache.kept.shape[1]:
        count = (decays + strengths) // heads
        assert cache.kept.shape[2] == layout.kept_inputs(key_heads, heads, key_dim, value_dim, gates=count)
        recorder.add(operation("delta_rule.cpu:keep"), arguments)
