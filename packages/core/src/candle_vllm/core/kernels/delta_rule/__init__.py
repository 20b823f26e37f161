# SPDX-License-Identifier: MIT
"""The gated delta rule and Mamba 2: linear attention with a state of fixed size that each token decays and adds to.

Contract: q, k [T, Hk, Dk], v [T, Hv, Dv], a, b [T, Hv] of one float dtype; y [T, Hv, Dv] has it too, in new memory.
Value head h belongs to key head h // (Hv / Hk). Of a value head, S [Dk, Dv] being its state, zeros before the first
token:

    S = exp(decay[h] * softplus(a + bias[h])) * S
    S = S + k^T (strength * sigmoid(b) * (v - k S))
    y = q S

in fp32 throughout, and y is rounded once. Before that, k becomes k / sqrt(sum(k^2) + 1e-6), and q likewise, where they
are `normed`, and q is multiplied by `scale`. Recorded steps do so in place: what q and k stand in is changed.

Gates with a `skip` [Hv] are those of Mamba 2, where k is B, q is C, v is x and `skip` is D. With
dt = softplus(a + bias), and without a correction:

    S = exp(decay[h] * dt) * S + k^T (dt v)
    y = q S + skip[h] * v

Then b is not used: callers pass a in its place.

Gates with a decay of each channel are those of Kimi delta attention, where a, decay and bias are [.., Hv * Dk]: each
row of S has a decay of its own, and the rest is the delta rule.

The state is kept as `kernels/states.py` says: float32 [slots, Hv, ceil(Dv / 16), Dk, 16], 16 columns of S after the
other, on every backend; columns beyond Dv hold zeros. A kept row is k [Hk, Dk], v [Hv, Dv], decays and
strengths, in float32: as the rule takes them in, or, on a GPU, as they came; who wrote it reads it. A row's result
depends on its own sequence alone.

By the delta rule on a GPU with tensor cores, where q, k and v have 16 bits, whole chunks of 64 tokens between absolute
multiples of 64 are computed at once, as far as a step has all rows of a chunk and stores no state within it. For that
it must be told the `positions` [T] of rows: how many tokens of their sequence stand before each. Without them, as in
steps in which no sequence has 64 rows, tokens are taken in one by one, as everywhere else.

Source: Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464, with the gates of Qwen3-Next; Dao and Gu, 2024,
arXiv:2405.21060 (Mamba 2); Kimi Team, 2025, arXiv:2510.26692 (Kimi delta attention).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, kept_inputs, state_shape
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
    positions: torch.Tensor | None = None,
) -> Value:
    """What each token reads of the state behind it; the states and kept rows of `cache` are changed.

    Args:
        q, k, v, a, b: see above; the numbers of a row lie behind each other.
        gates: of the layer.
        cache: of the layer, float32.
        rows: what the step does with states; a recorded one has its own.
        scale: of q: Dk^-0.5.
        normed: q and k are.
        positions: see above.
    """
    if isinstance(q, Recorded):
        return q.delta_rule(k, v, a, b, gates=gates, cache=cache, scale=scale, normed=normed)
    assert rows is not None
    _check(q, k, v, a, b, gates, cache)
    if on_gpu(q):
        from candle_vllm.core.kernels.delta_rule import triton

        return triton.delta_rule(q, k, v, a, b, gates, cache, rows, scale=scale, normed=normed, positions=positions)
    from candle_vllm.core.kernels.delta_rule import reference

    return reference.delta_rule(q, k, v, a, b, gates, cache, rows, scale=scale, normed=normed)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    gates: DeltaGates,
    cache: StateCache,
) -> None:
    tokens, key_heads, key_dim = q.shape
    _, heads, value_dim = v.shape
    assert k.shape == q.shape
    assert heads % key_heads == 0
    assert v.shape[0] == tokens
    decays, channels = gates.decay.numel(), gates.decay.numel() > heads
    assert (a.shape, b.shape) == ((tokens, decays), (tokens, heads))
    assert gates.decay.shape == gates.bias.shape == ((heads * key_dim,) if channels else (heads,))
    assert gates.skip is None or gates.skip.shape == (heads,)
    assert cache.states.shape[1:] == state_shape(heads, key_dim, value_dim)
    assert cache.kept.shape[2:] == (kept_inputs(key_heads, heads, key_dim, value_dim, channels=channels),)
