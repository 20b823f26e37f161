# SPDX-License-Identifier: MIT
"""Mixture of experts: the reference against loops that are literal enough to check by eye."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from candle_vllm.core.kernels.gguf_linear import pack
from candle_vllm.core.kernels.gguf_linear import reference as gguf_reference
from candle_vllm.core.kernels.moe import MOST_EXPERTS, Activation, Scoring, is_gated
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType as GgmlType
from packages.core.tests.kernels.moe_layer import moe, route


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def chosen_by_hand(
    row: list[float], top_k: int, scoring: str, bias: list[float] | None, groups: int, top_groups: int
) -> tuple[list[int], list[float]]:
    """A token's experts and their scores."""
    count = len(row)
    if scoring == "sqrt_softplus":
        scores = [math.sqrt(math.log(1 + math.exp(x))) for x in row]
    elif scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in row]
    else:
        total = sum(math.exp(x) for x in row)
        scores = [math.exp(x) / total for x in row]
    choice = row if bias is None else [score + b for score, b in zip(scores, bias)]
    size = count // groups
    worth = [
        sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[: 1 if bias is None else 2]) for g in range(groups)
    ]
    best = sorted(range(groups), key=lambda g: (-worth[g], g))[:top_groups]
    candidates = [x for x in range(count) if x // size in best]
    experts = sorted(candidates, key=lambda x: (-choice[x], x))[:top_k]
    return experts, [scores[x] for x in experts]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "groups", "top_groups"), [(8, 2, 1, 1), (60, 6, 1, 1), (60, 6, 5, 2)])
def test_routing(scoring: Scoring, biased: bool, experts: int, top_k: int, groups: int, top_groups: int) -> None:
    logits, bias = random(33, experts), random(experts, seed=1) if biased else None
    options = {"scoring": scoring, "bias": bias, "groups": groups, "top_groups": top_groups}
    weights, found = route(logits, top_k, renormalise=False, scale=2.5, **options)
    shares, _ = route(logits, top_k, renormalise=True, **options)
    assert found.dtype == torch.int32
    assert weights.dtype == torch.float32
    for t, row in enumerate(logits.tolist()):
        by_hand = None if bias is None else bias.tolist()
        wanted, scores = chosen_by_hand(row, top_k, scoring, by_hand, groups, top_groups)
        assert found[t].tolist() == wanted
        assert weights[t].tolist() == pytest.approx([2.5 * score for score in scores], rel=1e-5)
        assert shares[t].tolist() == pytest.approx([score / sum(scores) for score in scores], rel=1e-5)


def test_the_lowest_number_comes_first_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, -0.0, 0.0, 1.0]], dtype=torch.bfloat16)
    assert route(logits, 5)[1].tolist() == [[1, 2, 4, 0, 3]]
    assert route(logits, 8)[1].tolist() == [[1, 2, 4, 0, 3, 7, 5, 6]]
    assert route(torch.zeros(1, 8), 3, groups=4, top_groups=2)[1].tolist() == [[0, 1, 2]]
    assert route(torch.zeros(1, 8), 3, groups=4, top_groups=2, bias=torch.zeros(8))[1].tolist() == [[0, 1, 2]]


def test_scores_that_round_to_the_same_number_do_not_hide_the_logits() -> None:
    logits = torch.tensor([[20.0, 30.0, 25.0]])
    assert float(torch.sigmoid(logits).min()) == 1.0
    assert route(logits, 2, scoring="sigmoid")[1].tolist() == [[1, 2]]


def test_a_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    weights, experts = route(logits, 1, scoring="sigmoid", renormalise=False, bias=torch.tensor([0.0, 0.0, 9.0]))
    assert experts.tolist() == [[2]]
    assert weights.tolist() == [[0.5]]


def test_weights_of_each_expert_are_scaled_at_the_end() -> None:
    logits, scales = random(5, 8), random(8, seed=1)
    plain, experts = route(logits, 3, scale=2.0)
    weights, same = route(logits, 3, scale=2.0, expert_scale=scales)
    assert same.tolist() == experts.tolist()
    assert torch.equal(weights, plain * scales[experts.long()])


def test_numbers_that_are_none_give_valid_experts() -> None:
    logits = torch.tensor([[math.nan] * 4, [1.0, math.nan, -math.inf, 2.0]])
    assert route(logits, 4)[1].tolist() == [[0, 1, 2, 3], [3, 0, 1, 2]]
    assert route(logits, 2, bias=torch.zeros(4))[1].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_sparsemixer_is_that_of_transformers(jitter: float) -> None:
    logits = random(200, 16)
    wanted, chosen = sparsemixer(logits, jitter, training=False)
    weights, experts = route(logits, 2, scoring="sparsemixer", renormalise=False, jitter=jitter)
    assert torch.equal(experts.long(), chosen)
    torch.testing.assert_close(weights, wanted)
    assert (weights < 1).any()


def test_routing_that_cannot_be_is_refused() -> None:
    for arguments in (
        {"top_k": 9},
        {"top_k": 3, "groups": 4},
        {"top_k": 1, "groups": 3},
        {"top_k": 1, "groups": 2, "top_groups": 3},
        {"top_k": 1, "bias": torch.zeros(7)},
        {"top_k": 1, "bias": torch.zeros(8), "groups": 8},
    ):
        with pytest.raises(AssertionError):
            route(torch.zeros(2, 8), **arguments)
    with pytest.raises(AssertionError, match="513 experts; at most 512"):
        route(torch.zeros(1, MOST_EXPERTS + 1), 1)


def gated_by_hand(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """What comes of an expert's first products; an activation without a gate has the second alone."""
    if activation == "relu2":
        return up.clamp(min=0) ** 2
    if activation == "gelu":
        return 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
    if activation.startswith("silu"):
        limit = float(activation[5:] or math.inf)
        gate = gate.clamp(max=limit) if activation == "silu_10" else gate
        return (gate / (1 + torch.exp(-gate))).clamp(max=limit) * up.clamp(-limit, limit)
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    pairs = [(min(g, 7.0), min(max(u, -7.0), 7.0)) for g, u in zip(gate.tolist(), up.tolist())]
    return torch.tensor([(u + 1) * g / (1 + math.exp(-1.702 * g)) for g, u in pairs], dtype=gate.dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(activation: Activation, dtype: torch.dtype, biased: bool) -> None:
    large = 4 if activation in ("swiglu_oai", "silu_7", "silu_16", "silu_10") else 1  # some gates are beyond the limits
    x, gate_up = random(9, 40, dtype=dtype) * large, random(5, 2 * 33, 40, dtype=dtype, seed=1) / 8 * large
    first = 0 if is_gated(activation) else 33
    down = random(5, 40, 33, dtype=dtype, seed=2) / 8
    biases = random(5, 66, dtype=dtype, seed=4) * biased, random(5, 40, dtype=dtype, seed=5) * biased
    weights, experts = route(random(9, 5, seed=3), 3)
    experts[4, 1], experts[5, :] = -1, 5  # none
    wanted = torch.zeros(9, 40, dtype=torch.float64)
    for t in range(9):
        for weight, e in zip(weights[t].tolist(), experts[t].tolist()):
            if e not in (-1, 5):
                gate, up = (gate_up[e].double() @ x[t].double() + biases[0][e].double()).chunk(2)
                inner = gated_by_hand(gate, up, activation)
                wanted[t] += weight * (down[e].double() @ inner + biases[1][e].double())
    stored, own = gate_up[:, first:].contiguous(), (biases[0][:, first:].contiguous(), biases[1])
    got = moe(x, stored, down, weights, experts, activation=activation, biases=own if biased else None)
    assert got.dtype == dtype
    assert error(got, wanted) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert torch.equal(got[5], torch.zeros(40, dtype=dtype))


def test_quantised_experts_are_their_numbers() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (3 * 2 * 64 * 2, 34), dtype=np.uint8)
    raw[:, :2] = np.array([0.01], np.float16).view(np.uint8)
    gate_up = pack(raw.reshape(-1), GgmlType.Q8_0, 3 * 2 * 64, 64, "cpu")
    down = pack(raw[: 3 * 64 * 2].reshape(-1), GgmlType.Q8_0, 3 * 64, 64, "cpu")
    x = random(4, 64)
    weights, experts = route(random(4, 3, seed=3), 2)
    plain = [gguf_reference.dequantise(matrix).unflatten(0, (3, -1)) for matrix in (gate_up, down)]
    got = moe(x, gate_up, down, weights, experts)
    assert error(got, moe(x, *plain, weights, experts)) < 1e-6
    assert error(got, moe(x, plain[0], down, weights, experts)) < 1e-6


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, gate_up, down = torch.zeros(2, 8), torch.zeros(3, 12, 8), torch.zeros(3, 8, 6)
    weights, experts = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    assert moe(x, gate_up, down, weights, experts).shape == (2, 8)
    for wrong in (
        (x[:1], gate_up, down, weights, experts),
        (x, gate_up[:2], down, weights, experts),
        (x, gate_up, down.transpose(1, 2), weights, experts),
        (x, gate_up, down, weights.double(), experts),
        (x, gate_up, down, weights, experts.long()),
    ):
        with pytest.raises(AssertionError):
            moe(*wrong)
    with pytest.raises(AssertionError):
        moe(x, gate_up, down, weights, experts, biases=(torch.zeros(3, 12), torch.zeros(3, 7)))
