# SPDX-License-Identifier: MIT
"""RMSNorm, rotary embedding, gates and embedding rows against their references."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from candle_vllm.core.kernels import rms_norm as norm
from candle_vllm.core.kernels import rotary
from candle_vllm.core.kernels.embedding import triton as embedding_kernel
from candle_vllm.core.kernels.recorded import LIMITS
from candle_vllm.core.kernels.rms_norm import reference as norm_reference
from candle_vllm.core.kernels.rotary import reference as rotary_reference
from candle_vllm.core.kernels.silu_mul import reference as gate_reference
from candle_vllm.core.kernels.silu_mul import triton as gate

# NumPy, in which Triton's interpreter computes, warns where the kernels mean to get inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """RMS(error) / RMS(wanted) is small, and nothing is left unwritten."""
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert got.is_contiguous()
    error, scale = (got.double() - wanted.double()).square().mean().sqrt(), wanted.double().square().mean().sqrt()
    assert float(error) <= TOLERANCE[wanted.dtype] * float(scale)


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape[0] if isinstance(shape[0], tuple) else shape, math.nan, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 4097), (123, 64), (2, 20483), (7, 3, 80), (1, 2, 3, 128)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], weight_dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype).to(device)
    weight, eps = random(shape[-1], dtype=weight_dtype, seed=1).to(device), 1e-5
    check(norm.rms_norm(x, weight, eps), norm_reference.rms_norm(x, weight, eps))
    residual = random(*shape, dtype=dtype, seed=2).to(device)
    if (
        device.type == "cpu"
    ):  # Triton's interpreter cuts bfloat16 off instead of rounding: let there be nothing to round
        x, residual = ((part * 8).round() / 8 for part in (x, residual))
    got, wanted = (f(x, residual, weight, eps) for f in (norm.add_rms_norm, norm_reference.add_rms_norm))
    assert torch.equal(got[1], wanted[1]), "the sum is rounded once"
    check(got[0], wanted[0])


def test_rms_norm_reads_heads_where_they_lie(device: torch.device) -> None:
    fused = random(5, 9 * 64, dtype=torch.bfloat16).to(device)
    heads = fused[:, 64 : 7 * 64].unflatten(1, (6, 64))
    weight = random(64, seed=1).to(device)
    check(norm.rms_norm(heads, weight, 1e-6), norm_reference.rms_norm(heads, weight, 1e-6))
    check(norm.add_rms_norm(heads, heads, weight, 1.0)[0], norm_reference.rms_norm(2 * heads, weight, 1.0))
    for row in range(5):
        alone = norm.rms_norm(heads[row : row + 1], weight, 1e-6)
        assert torch.equal(alone[0], norm.rms_norm(heads, weight, 1e-6)[row]), "neighbours do not matter"


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotated"), [(1, 1, 2, 2), (9, 3, 64, 64), (5, 2, 80, 32), (20, 7, 96, 74)]
)
def test_rotary(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rotated: int) -> None:
    angles = torch.arange(50).unsqueeze(1) * torch.logspace(0, -2, rotated // 2)
    tables = angles.cos().to(device), angles.sin().to(device)
    fused = random(4, (heads + 2 * kv_heads) * dim, dtype=dtype).to(device)
    q = fused[:, : heads * dim].unflatten(1, (heads, dim))
    k = fused[:, heads * dim : (heads + kv_heads) * dim].unflatten(1, (kv_heads, dim))
    positions = torch.tensor([49, 0, 7, 7], device=device)
    wanted = [rotary_reference.rotary(x, positions, *tables) for x in (q, k)]
    for got, expected in zip(rotary.rotary_pair(q, k, positions, *tables), wanted):
        check(got, expected)
        assert torch.equal(got[..., rotated:], expected[..., rotated:])
    check(rotary.rotary(k, positions.int(), *tables), wanted[1])


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 63), (3, 123), (2, 4097)])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "silu_7", "silu_16", "silu_10", "swiglu_oai"])
def test_gates(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    size: int,
    kind: Literal["silu", "gelu_tanh", "silu_7", "silu_16", "silu_10", "swiglu_oai"],
) -> None:
    large = 10 if kind in (*LIMITS, "swiglu_oai") else 3  # some are beyond the limit
    x = (random(tokens, 2 * size + 16, dtype=dtype) * large).to(device)[:, : 2 * size]
    check(gate.gated(x[:, size:], x[:, :size], kind), gate_reference.gate_mul(x, kind))


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 63), (3, 123), (2, 4097)])
@pytest.mark.parametrize("kind", ["sigmoid", "silu", "softplus"])
@pytest.mark.parametrize("span", [1, 3])
def test_gates_apart(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    size: int,
    kind: Literal["sigmoid", "silu", "softplus"],
    span: int,
) -> None:
    x = random(tokens, span * size + 16, dtype=dtype).to(device)[:, 16:]
    gates = random(tokens, size + 48, dtype=dtype).to(device)[:, 48:]
    check(gate.gated(x, gates, kind), gate_reference.gated(x, gates, kind))


def test_softplus_of_closed_gates(device: torch.device) -> None:
    gates = torch.tensor([[-30.0, -20.0, -16.0, -12.0, -5.0, 0.0, 30.0]], device=device)
    x = torch.ones_like(gates)
    got, wanted = gate.gated(x, gates, "softplus"), gate_reference.gated(x, gates, "softplus")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "silu_7"])
def test_gates_at_large_numbers(device: torch.device, kind: Literal["silu", "gelu_tanh", "silu_7"]) -> None:
    x = torch.tensor([[1e30, -1e30, 90.0, -90.0, 0.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    got, wanted = gate.gated(x[:, 6:], x[:, :6], kind), gate_reference.gate_mul(x, kind)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 576, 4097])
def test_embedding(device: torch.device, dtype: torch.dtype, size: int) -> None:
    table = random(11, size, dtype=dtype).to(device)
    ids = torch.tensor([10, 0, 3, 3], device=device)
    for kind in (ids, ids.int()):
        assert torch.equal(embedding_kernel.embedding(kind, table), table[ids])


def test_no_tokens_are_no_work(device: torch.device) -> None:
    weight, none = torch.ones(8, device=device), torch.empty((0, 8), dtype=torch.float32, device=device)
    table = torch.ones(4, 4, device=device)
    assert norm.rms_norm(none, weight, 1e-5).shape == (0, 8)
    assert gate.gated(none, none, "silu").shape == (0, 8)
    assert embedding_kernel.embedding(torch.zeros(0, dtype=torch.int64, device=device), weight[None]).shape == (0, 8)
    positions = torch.zeros(0, dtype=torch.int64, device=device)
    assert rotary.rotary(none.unsqueeze(1), positions, table, table).shape == (0, 1, 8)
