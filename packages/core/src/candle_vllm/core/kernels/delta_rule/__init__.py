# SPDX-License-Identifier: MIT
"""The gated delta rule, Mamba 1 and 2: linear attention whose state of fixed size each token decays and adds to.

Contract: q, k [T, Hk, Dk], v [T, Hv, Dv], a, b [T, Hv] of one float dtype; y [T, Hv, Dv] of the same dtype, in new
memory. Value head h uses key head h // (Hv / Hk). The state S [Dk, Dv] of a value head is zeros before the first token.
Each token computes

    S = exp(decay[h] * softplus(a + bias[h])) * S
    S = S + k^T (strength * sigmoid(b) * (v - k S))
    y = q S

in fp32 throughout, and y is rounded once. With `normed`, k is first replaced by k / sqrt(sum(k^2) + 1e-6), and q
likewise; then q is multiplied by `scale`. Recorded steps change q and k in place.

`gates` with a `skip` [Hv] select Mamba 2, whose B, C, x and D are k, q, v and `skip`. With dt = softplus(a + bias):

    S = exp(decay[h] * dt) * S + k^T (dt v)
    y = q S + skip[h] * v

b has no effect: callers pass a in its place.

`gates` with a decay of each element, in the state's layout, select Mamba 1, where a, bias and `skip` are [.., Hv * Dv]:
a column of S is a channel with its own dt, and each element of the column decays by exp(decay * dt). q and k are not
normed, and `scale` is 1. All channels share B and C, so Mamba 1 models have one value head.

`gates` with a decay [Hv * Dk] select Kimi delta attention, where a and bias are [.., Hv * Dk] too: the delta rule, but
each row of S has its own decay. With a lower bound `least` the decay is, as in GLM-5.3-Flash,

    exp(least * sigmoid(-decay[h] * (a + bias[h])))

States are stored as float32 [slots, Hv, ceil(Dv / 16), Dk, 16] on every backend (slots: see `kernels/states.py`). A
**tile** is [Dk, 16], 16 columns of S; columns beyond Dv are zeros. A **kept row** has the inputs of a draft token in
float32: k [Hk, Dk], v [Hv, Dv], then decays and strengths, or on a GPU a and b unchanged; in Mamba 1 a alone (in the
reference dt). k is normed, except on a GPU. Only the backend that wrote a kept row reads it.

On a GPU with tensor cores, the delta rules for 16-bit q, k and v, and Mamba 2 in bfloat16, compute whole **chunks** of
64 tokens at once, if `StateRows.positions` is set. A chunk begins at a position that is a multiple of 64; the step must
have all tokens of the chunk and store no state within it. Other tokens are processed one by one. A token's result
depends on its own sequence alone, with chunks also on the sequence's division into steps.

Source: Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464, with the gates of Qwen3-Next; Gu and Dao, 2023,
arXiv:2312.00752 (Mamba 1); Dao and Gu, 2024, arXiv:2405.21060 (Mamba 2); Kimi Team, 2025, arXiv:2510.26692 (Kimi delta
attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, gate_sizes, kept_inputs, state_shape
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch

    from candle_vllm.core.kernels.states import StateCache, StateRows


def delta_rule(
    q: Value,
    k: Value,
    v: Value,
    a: Value,
    b: Value,
    gates: DeltaGates,
    cache: StateCache,
    rows: StateRows | None,
    *,
    scale: float,
    normed: bool = True,
) -> Value:
    """Return each token's result; the states and kept rows of `cache` are changed.

    Args:
        q, k, v, a, b: see above; the elements of a token are contiguous.
        gates: the layer's parameters of decays and strengths, and its skip.
        cache: the layer's states and kept rows, float32.
        rows: the states that the step reads and writes; None in recorded steps, which use `StepArrays.states`.
        scale: factor of q: Dk^-0.5 for the delta rules, 1 for Mamba.
        normed: whether q and k are divided by their norms.
    """
    if isinstance(q, Recorded):
        return q.delta_rule(k, v, a, b, gates=gates, cache=cache, scale=scale, normed=normed)
    assert rows is not None
    inputs = (q, k, v, a, b)
    _check(inputs, gates, cache)
    if on_gpu(q):
        from candle_vllm.core.kernels.delta_rule import triton

        return triton.delta_rule(inputs, gates, cache, rows, scale=scale, normed=normed)
    from candle_vllm.core.kernels.delta_rule import reference

    return reference.delta_rule(inputs, gates, cache, rows, scale=scale, normed=normed)


def _check(inputs: Sequence[torch.Tensor], gates: DeltaGates, cache: StateCache) -> None:
    q, k, v, a, b = inputs
    tokens, key_heads, key_dim = q.shape
    _, heads, value_dim = v.shape
    assert k.shape == q.shape
    assert heads % key_heads == 0
    assert v.shape[0] == tokens
    decays, strengths = gate_sizes(gates, heads)
    count, state = max(decays, strengths), state_shape(heads, key_dim, value_dim)
    assert (a.shape, b.shape) == ((tokens, count), (tokens, strengths))
    assert gates.least == 0 or decays == heads * key_dim
    assert decays in (heads, heads * key_dim) or (strengths == heads * value_dim and gates.skip is not None)
    assert gates.bias.shape == (count,)
    assert gates.decay.shape == ((count,) if decays else state)
    assert gates.skip is None or gates.skip.shape == (strengths,)
    assert cache.states.shape[1:] == state
    each = (decays + strengths) // heads
    assert cache.kept.shape[2:] == (kept_inputs(key_heads, heads, key_dim, value_dim, gates=each),)
