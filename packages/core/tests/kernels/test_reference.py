# SPDX-License-Identifier: MIT
"""The references against torch's own operators or a loop that is literal enough to check by eye."""

from __future__ import annotations

import math

import pytest
import torch

from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.attention import paged_attention
from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.kv_write import kv_write
from candle_vllm.core.kernels.layer_norm import layer_norm
from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.kernels.recorded import LIMITS
from candle_vllm.core.kernels.rms_norm import rms_norm
from candle_vllm.core.kernels.rotary import rotary
from candle_vllm.core.kernels.silu_mul import gate_mul, gated

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)
ROWS = [1, 63, 123]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 64, 4097])
def test_rms_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = random(rows, size, dtype=dtype), random(size, seed=1)
    wanted = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    assert error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 64, 4097])
def test_layer_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight, bias = random(rows, size, dtype=dtype) + 3, random(size, seed=1), random(size, seed=2)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for shift in (None, bias):
        got = layer_norm(x, weight, shift, 1e-5)
        assert got.dtype == dtype
        wanted = scaled * weight.double() + (0 if shift is None else shift.double())
        if size > 1 or shift is not None:
            assert error(got, wanted) < TOLERANCE[dtype]
        else:
            assert (got == 0).all(), "a row of one number is its mean"


def test_layer_norm_of_heads_with_weights_of_their_own() -> None:
    x, weight = random(5, 3, 18), random(3, 18, seed=1)
    got = layer_norm(x, weight, None, 1e-5)
    for head in range(3):
        wanted = layer_norm(x[:, head], weight[head], None, 1e-5)
        torch.testing.assert_close(got[:, head], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    x = random(63, 45, dtype=dtype) * 3
    wide = x.double()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    for kind, wanted in (
        ("gelu", 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))),
        ("gelu_tanh", 0.5 * wide * (1 + inner.tanh())),
        ("quick_gelu", wide * (1.702 * wide).sigmoid()),
        ("relu", wide * (wide > 0)),
        ("relu2", (wide * (wide > 0)) ** 2),
    ):
        got = activation(x, kind)  # type: ignore[arg-type]
        assert got.dtype == dtype
        assert error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gate_mul(dtype: torch.dtype, rows: int) -> None:
    x = random(rows, 2 * 123, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    assert error(gate_mul(x, "silu"), gate / (1 + (-gate).exp()) * up) < TOLERANCE[dtype]
    x *= 10  # some are beyond each limit
    gate, up = x.double().chunk(2, -1)
    cases = (("silu_7", 7.0), ("silu_16", 16.0), ("silu_10", 10.0))
    for kind, limit in cases:
        if kind == "silu_10":
            gate = gate.clamp(max=limit)
        act = (gate / (1 + (-gate).exp())).clamp(max=limit)
        assert error(gate_mul(x, kind), act * up.clamp(-limit, limit)) < TOLERANCE[dtype]  # type: ignore[arg-type]
    assert {kind for kind, _ in cases} == set(LIMITS)
    gate, up = x.double().chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    assert error(gate_mul(x, "swiglu_oai"), (up + 1) * gate / (1 + (-1.702 * gate).exp())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gates_apart(dtype: torch.dtype, rows: int) -> None:
    x, gate = random(rows, 123, dtype=dtype), random(rows, 150, dtype=dtype)[:, :123]
    open_by = 1 / (1 + (-gate.double()).exp())
    assert error(gated(x, gate, "sigmoid"), x.double() * open_by) < TOLERANCE[dtype]
    assert error(gated(x, gate, "silu"), x.double() * gate.double() * open_by) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, rows: int, bias: bool) -> None:
    x, weight = random(rows, 63, dtype=dtype), random(123, 63, dtype=dtype, seed=1)
    b = random(123, dtype=dtype, seed=2) if bias else None
    wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
    assert error(linear(x, weight, b), wanted) < TOLERANCE[dtype]


def test_embedding_copies_rows() -> None:
    table = random(10, 7)
    assert torch.equal(embedding(torch.tensor([3, 3, 9]), table), table[[3, 3, 9]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [16, 10])
def test_rotary_turns_each_pair_by_its_angle(dtype: torch.dtype, rotated: int) -> None:
    x = random(5, 3, 16, dtype=dtype)
    positions = torch.tensor([0, 1, 7, 2, 30])
    angles = torch.arange(31).unsqueeze(1) * torch.logspace(0, -2, rotated // 2)
    wanted = x.double().clone()
    for token, position in enumerate(positions.tolist()):
        for pair in range(rotated // 2):
            turn = complex(math.cos(angles[position, pair]), math.sin(angles[position, pair]))
            for head in range(3):
                z = complex(x[token, head, pair], x[token, head, pair + rotated // 2]) * turn
                wanted[token, head, pair], wanted[token, head, pair + rotated // 2] = z.real, z.imag
    got = rotary(x, positions, angles.cos(), angles.sin())
    assert error(got, wanted) < TOLERANCE[dtype]
    assert torch.equal(got[0], x[0]), "position 0 does not turn"
    assert torch.equal(got[..., rotated:], x[..., rotated:])


def test_kv_write_touches_its_slots_only() -> None:
    key_cache, value_cache = (torch.full((4, 8, 2, 5), math.nan) for _ in range(2))
    key, value = random(3, 2, 5), random(3, 2, 5, seed=1)
    slots = torch.tensor([0, 13, 31])
    kv_write(key, value, key_cache, value_cache, slots)
    for cache, new in ((key_cache, key), (value_cache, value)):
        assert torch.equal(cache[[0, 1, 3], [0, 5, 7]], new)
        assert int(cache.isnan().all(-1).all(-1).sum()) == 4 * 8 - 3


@pytest.mark.one_of_each(16)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 5, 64, -1, -7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_attention_sees_what_it_may_and_nothing_else(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int
) -> None:
    """Several sequences in one step, scattered over pages; every slot that must not be read is NaN."""
    dim, size = 16, 8
    contexts, queries = (1, 21, 300, 40), (1, 4, 300, 1)
    total = sum(-(-context // size) for context in contexts)
    order = torch.randperm(total + 3, generator=torch.Generator().manual_seed(1))
    key_cache, value_cache = (torch.full((total + 3, size, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2))
    tables = torch.full((len(contexts), -(-max(contexts) // size)), 10**6)
    keys, values, used = [], [], 0
    for row, context in enumerate(contexts):
        count = -(-context // size)
        tables[row, :count] = order[used : used + count]
        used += count
        k, v = (random(context, kv_heads, dim, dtype=dtype, seed=10 * row + i) for i in (1, 2))
        at = torch.arange(context)
        slots = tables[row, at // size] * size + at % size
        kv_write(k, v, key_cache, value_cache, slots)
        keys.append(k)
        values.append(v)
    starts = [0]
    for count in queries:
        starts.append(starts[-1] + count)
    q = random(starts[-1], heads, dim, dtype=dtype, seed=99)
    rows = AttentionRows(tuple(starts), contexts, tables)
    got = paged_attention(q, key_cache, value_cache, rows, scale=0.3, window=window)
    wanted = torch.full(q.shape, math.nan, dtype=torch.float64)
    for row, context in enumerate(contexts):
        for i in range(queries[row]):
            position = context - queries[row] + i
            first = 0 if window is None else max(0, position - window + 1)
            first = position - position % -window if window is not None and window < 0 else first
            for head in range(heads):
                k = keys[row][first : position + 1, head // (heads // kv_heads)].double()
                v = values[row][first : position + 1, head // (heads // kv_heads)].double()
                weights = (k @ q[starts[row] + i, head].double() * 0.3).softmax(0)
                wanted[starts[row] + i, head] = weights @ v
    assert got.dtype == dtype
    assert error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 1, 3, 64])
def test_tokens_of_a_picture_see_each_other(window: int | None) -> None:
    heads, kv_heads, dim, context = 4, 2, 8, 21
    key_cache, value_cache = random(3, 8, kv_heads, dim), random(3, 8, kv_heads, dim, seed=1)
    q, tables = random(14, heads, dim, seed=2), torch.tensor([[2, 0, 1]] * 3)
    last = [9, 15, 15, 15, 15, 15, 15, 17, 17, 18, 19, 20]  # of what each token from position 9 on sees
    ahead = torch.tensor([0, *(end - position for position, end in enumerate(last, 9)), 0])
    got = paged_attention(
        q,
        key_cache,
        value_cache,
        AttentionRows((0, 1, 13, 14), (5, context, 9), tables, ahead),
        scale=0.3,
        window=window,
    )
    keys, values = (cache[[2, 0, 1]].flatten(0, 1).double() for cache in (key_cache, value_cache))
    for row, (position, end) in enumerate([(4, 4), *enumerate(last, 9), (8, 8)]):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            weights = (keys[first : end + 1, head // 2] @ q[row, head].double() * 0.3).softmax(0)
            assert error(got[row, head], weights @ values[first : end + 1, head // 2]) < 1e-5


def test_scores_fall_with_the_distance_of_query_and_key() -> None:
    heads, kv_heads, dim, context = 4, 2, 8, 21
    key_cache, value_cache = random(3, 8, kv_heads, dim), random(3, 8, kv_heads, dim, seed=1)
    q, slopes = random(5, heads, dim, seed=2), torch.tensor([0.0, 0.5, 0.1, 2.0])
    rows = AttentionRows((0, 5), (context,), torch.tensor([[2, 0, 1]]))
    got = paged_attention(q, key_cache, value_cache, rows, scale=0.3, slopes=slopes)
    keys, values = (cache[[2, 0, 1]].flatten(0, 1).double() for cache in (key_cache, value_cache))
    for token in range(5):
        position = context - 5 + token
        for head in range(heads):
            scores = keys[: position + 1, head // 2] @ q[token, head].double() * 0.3
            for key in range(position + 1):
                scores[key] -= float(slopes[head]) * (position - key)
            assert error(got[token, head], scores.softmax(0) @ values[: position + 1, head // 2]) < 1e-5


def test_relative_logits_are_mixed_from_profiles_over_the_distance() -> None:
    heads, kv_heads, dim, context = 4, 2, 8, 21
    key_cache, value_cache = random(3, 8, kv_heads, dim), random(3, 8, kv_heads, dim, seed=1)
    q, states, profiles = random(5, heads, dim, seed=2), random(5, heads, 3, seed=3), random(3, 12, seed=4)
    rows = AttentionRows((0, 5), (context,), torch.tensor([[2, 0, 1]]))
    got = paged_attention(q, key_cache, value_cache, rows, scale=0.3, relative=(states, profiles))
    keys, values = (cache[[2, 0, 1]].flatten(0, 1).double() for cache in (key_cache, value_cache))
    for token in range(5):
        position = context - 5 + token
        for head in range(heads):
            scores = keys[: position + 1, head // 2] @ q[token, head].double() * 0.3
            for key in range(max(0, position - 11), position + 1):
                scores[key] += float(states[token, head] @ profiles[:, position - key])
            assert error(got[token, head], scores.softmax(0) @ values[: position + 1, head // 2]) < 1e-5


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_sinks_take_their_share_of_every_softmax(softcap: float | None) -> None:
    heads, kv_heads, dim, context = 4, 2, 8, 21
    key_cache, value_cache = random(3, 8, kv_heads, dim), random(3, 8, kv_heads, dim, seed=1)
    q, sinks = random(5, heads, dim, seed=2), torch.tensor([-3.0, 0.0, 1.5, 40.0])
    rows = AttentionRows((0, 5), (context,), torch.tensor([[2, 0, 1]]))
    got = paged_attention(q, key_cache, value_cache, rows, scale=0.3, softcap=softcap, sinks=sinks)
    keys, values = (cache[[2, 0, 1]].flatten(0, 1).double() for cache in (key_cache, value_cache))
    for token in range(5):
        seen = context - 4 + token
        for head in range(heads):
            scores = keys[:seen, head // 2] @ q[token, head].double() * 0.3
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            shares = scores.exp() / (scores.exp().sum() + sinks[head].double().exp())
            assert error(got[token, head], shares @ values[:seen, head // 2]) < 1e-5
