# SPDX-License-Identifier: MIT
"""Mixture of experts: the kernels give what the reference gives, and the pairs stand in the experts' order."""

from __future__ import annotations

import functools
import math
import types
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.gguf_linear import GgufMatrix, pack
from candle_vllm.core.kernels.gguf_linear.reference import dequantise
from candle_vllm.core.kernels.group_linear import GroupMatrix, pack_floats
from candle_vllm.core.kernels.matrices import TensorMatrix
from candle_vllm.core.kernels.moe import (
    Activation,
    Pairs,
    Routing,
    reference,
    triton_experts,
    triton_route,
    triton_sort,
)
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.ggml_types import CONTENTS
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType as GgmlType
from candle_vllm.core.quantization.scaled_codes import FLOAT_NAMES, Floats, ScaledCodes
from packages.core.tests.kernels.moe_layer import Biases, Experts, matrix_of, moe
from packages.core.tests.kernels.triton.forms.gguf_linear.triton import OWN_FORMS
from tests.common_run import few

TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def nothing_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels write is NaN, or -1, before they run."""

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype, device=device)

    stand_in = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if name[0] != "_"})
    stand_in.empty = empty
    for module in (triton_experts, triton_route, triton_sort):
        monkeypatch.setattr(module, "torch", stand_in)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    error = got.float() - wanted.float()
    return float(error.pow(2).mean().sqrt() / wanted.float().pow(2).mean().sqrt())


def assert_routed(logits: torch.Tensor, top_k: int, **changed: Any) -> None:
    changed["groups"], changed["top_groups"] = changed.pop("groups", (1, 1))
    weights, experts = triton_route.route(logits, Routing(top_k=top_k, **changed))
    wanted, chosen = reference.route(logits, Routing(top_k=top_k, **changed))
    assert torch.equal(experts, chosen)
    assert experts.dtype == torch.int32
    assert ratio(weights, wanted) < 1e-5


@pytest.mark.one_of_each
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups"),
    [(1, 1, (1, 1)), (8, 2, (1, 1)), (60, 5, (1, 1)), (512, 10, (1, 1)), (256, 8, (8, 4)), (160, 6, (8, 3))],
)
def test_routing(scoring: str, experts: int, top_k: int, groups: tuple[int, int], device: torch.device) -> None:
    wide = random(5, experts + 3).to(device)
    logits, bias = wide[:, :experts], random(experts, seed=1).to(device) / 4
    assert_routed(logits.to(torch.bfloat16), top_k, scoring=scoring, groups=groups)
    assert_routed(logits, top_k, scoring=scoring, groups=groups, renormalise=False, scale=2.5)
    assert_routed(logits, top_k, scoring=scoring, groups=groups, bias=bias)
    factors = random(experts, seed=2).abs().to(device)
    assert_routed(logits, top_k, scoring=scoring, groups=groups, scale=2.5, expert_scale=factors)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, under the interpreter
def test_routing_among_equals_and_without_numbers(device: torch.device) -> None:
    equal = random(7, 24).mul(2).round().div(2).to(device)
    assert_routed(equal, 9)
    assert_routed(equal, 9, groups=(6, 3))
    assert_routed(torch.zeros(2, 24, device=device), 5, bias=torch.zeros(24, device=device), groups=(6, 3))
    for bias in (None, torch.zeros(24, device=device)):
        strange = equal.clone()
        strange[0], strange[1, ::2], strange[2, 3:] = math.nan, math.nan, -math.inf
        weights, experts = triton_route.route(strange, Routing(top_k=8, bias=bias))
        assert torch.equal(experts, reference.route(strange, Routing(top_k=8, bias=bias))[1])
        assert weights[3:].isfinite().all()


@pytest.mark.one_of_each
@pytest.mark.parametrize("recount", [0, 9])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "block"), [(1, 5, 1, 16), (150, 70, 4, 16), (200, 3, 3, 64)])
def test_pairs_in_the_order_of_experts(
    tokens: int,
    experts: int,
    top_k: int,
    block: int,
    recount: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_sort, "_RECOUNT", recount)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    if tokens > 1:
        ids[ids == 1] = 2  # an expert that nobody asks for
    blocks = triton_sort.sort_pairs(Pairs(torch.empty(ids.shape), ids.to(device), experts), block)
    order, table = blocks.order.cpu(), blocks.table.cpu()
    flat, place, at = ids.flatten(), 0, 0
    for expert in range(experts):
        pairs = (flat == expert).nonzero()[:, 0]
        assert order[place : place + len(pairs)].tolist() == pairs.tolist()
        for start in range(0, len(pairs), block):
            assert table[:, at].tolist() == [expert, place + start, min(len(pairs) - start, block)]
            at += 1
        place += len(pairs)
    assert at <= blocks.count
    assert (table[0, at:] == -1).all()


def test_there_are_blocks_for_the_worst_case(device: torch.device) -> None:
    """One pair more than whole blocks for every expert."""
    ids = torch.tensor([0] * 17 + [1] * 17 + [2] * 1, dtype=torch.int32)[:, None]
    blocks = triton_sort.sort_pairs(Pairs(torch.empty(ids.shape), ids.to(device), 3), 16)
    assert blocks.table[0].tolist() == [0, 0, 1, 1, 2]


def problem(
    tokens: int, count: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """x with rows of a wider tensor, matrices, weights and experts."""
    x = random(tokens, hidden + 16)[:, :hidden] if tokens else torch.zeros(0, hidden)
    gate_up, down = random(count, 2 * inner, hidden, seed=1) / 8, random(count, hidden, inner, seed=2) / 8
    weights, experts = reference.route(random(tokens, count, seed=3), Routing(top_k=top_k))
    x, gate_up, down = (tensor.to(device, dtype) for tensor in (x, gate_up, down))
    return x, gate_up, down, weights.to(device), experts.to(device)


def run(
    x: torch.Tensor,
    gate_up: Experts,
    down: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: Activation = "silu",
    biases: Biases | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give, and the reference."""
    arguments = (x, gate_up, down, weights, experts, activation, biases)
    return moe(*arguments), moe(*arguments, by_reference=True)


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "hidden", "inner"),
    [(1, 9, 5, 123, 33), (7, 4, 2, 64, 48), (20, 3, 3, 40, 17), (40, 2, 1, 32, 16)],
)
@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, "silu"), (torch.float16, "gelu_tanh")])
def test_few_pairs(
    tokens: int,
    count: int,
    top_k: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    activation: Activation,
    device: torch.device,
) -> None:
    got, wanted = run(*problem(tokens, count, top_k, hidden, inner, dtype, device), activation)
    assert got.dtype == dtype
    assert ratio(got, wanted) < TOLERANCE


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "hidden", "inner"),
    [(33, 9, 2, 123, 33), (37, 3, 2, 64, 150), (67, 2, 1, 520, 16), (140, 1, 1, 32, 16)],
)
@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, "gelu_tanh"), (torch.float16, "silu")])
def test_many_pairs(
    tokens: int,
    count: int,
    top_k: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    activation: Activation,
    device: torch.device,
) -> None:
    got, wanted = run(*problem(tokens, count, top_k, hidden, inner, dtype, device), activation)
    assert ratio(got, wanted) < TOLERANCE


@pytest.mark.one_of_each
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("activation", ["silu", "swiglu_oai", "silu_7", "silu_10"])
def test_biases(tokens: int, activation: Activation, device: torch.device) -> None:
    """Of plain and of quantised experts; some gates are beyond the limits of gpt-oss and Step."""
    x, gate_up, down, weights, experts = problem(tokens, 4, 2, 64, 40, torch.bfloat16, device)
    biases = (random(4, 80, seed=5) * 4).to(x), (random(4, 64, seed=6) / 4).to(x)
    got, wanted = run(x * 4, gate_up, down, weights, experts, activation, biases)
    assert ratio(got, wanted) < TOLERANCE
    assert ratio(run(x * 4, gate_up, down, weights, experts, activation)[0], wanted) > 0.05
    x, gate_up, down, weights, experts = quantised(tokens, (PackedKind.Q5_0, PackedKind.Q8_0), 3, 64, 32, device)
    biases = (random(3, 64, seed=5) * 4).to(x), (random(3, 64, seed=6) / 4).to(x)
    got, wanted = run(x, gate_up, down, weights, experts, activation, biases)
    assert ratio(got, wanted) < TOLERANCE


@pytest.mark.parametrize("tokens", [6, 40])
def test_numbers_that_are_no_expert_add_nothing(tokens: int, device: torch.device) -> None:
    x, gate_up, down, weights, experts = problem(tokens, 5, 2, 64, 32, torch.bfloat16, device)
    experts[1, 0], experts[2, :], experts[3, 1] = -1, -1, 5
    weights[2, :] = torch.nan
    got, wanted = run(x, gate_up, down, weights, experts)
    assert ratio(got, wanted) < TOLERANCE
    assert not got[2].any()
    experts.fill_(-1)
    assert not run(x, gate_up, down, weights, experts)[0].any()


@pytest.mark.parametrize("tokens", [12, 40])
def test_a_row_does_not_depend_on_the_others(tokens: int, device: torch.device) -> None:
    """To the bit, whatever the others hold and wherever they go; on a GPU, however many they are too."""
    x, gate_up, down, weights, experts = problem(tokens, 5, 2, 64, 24, torch.bfloat16, device)
    whole = run(x, gate_up, down, weights, experts)[0]
    other, elsewhere = x.clone(), experts.clone()
    other[1:], elsewhere[1:] = torch.nan, torch.tensor([4, 0], device=device)
    assert torch.equal(run(other, gate_up, down, weights, elsewhere)[0][0], whole[0])
    if device.type == "cuda":
        for less in (2, 9) if tokens == 12 else (33,):
            assert torch.equal(run(x[:less], gate_up, down, weights[:less], experts[:less])[0], whole[:less])


def test_few_pairs_may_be_computed_as_many_are(device: torch.device) -> None:
    x, gate_up, down, weights, experts = problem(40, 5, 2, 64, 24, torch.bfloat16, device)
    whole = run(x, gate_up, down, weights, experts)[0]
    arguments = (x[:1], gate_up, down, weights[:1], experts[:1])
    part = moe(*arguments, invariant=True)
    assert torch.equal(part, whole[:1])


def random_bytes(kind: PackedKind, rows: int, columns: int) -> np.ndarray:
    """Blocks with random codes and small scales."""
    random_ = np.random.default_rng(rows)
    size, width = GgmlType[kind.name].block
    raw = random_.integers(0, 256, (rows, columns // size, width), dtype=np.uint8)
    floats = CONTENTS[kind.type].floats if kind.type in CONTENTS else [(0, 2)]
    for start, stop in floats:
        scale = random_.uniform(0.5, 1.5, raw.shape[:2]) / (2048 if kind.name.endswith("K") else 256)
        raw[:, :, start:stop] = scale.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(-1)


@functools.cache
def packed(kind: PackedKind, rows: int, columns: int, device: torch.device) -> GgufMatrix:
    return pack(random_bytes(kind, rows, columns), GgmlType[kind.name], rows, columns, device)


def quantised(
    tokens: int, kinds: tuple[PackedKind, PackedKind], count: int, hidden: int, inner: int, device: torch.device
) -> tuple[Any, ...]:
    """A problem with quantised matrices, whose gates are about 1."""
    x, _, _, weights, experts = problem(tokens, count, 2, hidden, inner, torch.bfloat16, device)
    gate_up = packed(kinds[0], count * 2 * inner, hidden, device)
    down = packed(kinds[1], count * hidden, inner, device)
    x = x / (dequantise(gate_up).square().mean() * hidden).sqrt()
    return x.to(torch.bfloat16), gate_up, down, weights, experts


KINDS = [PackedKind[name] for name in ("Q4_0", "Q3_K", "Q5_K", "Q6_K", "IQ2_S")]
"""One of each way to keep codes and scales: the linear kernel, which decodes by the same functions, has every form."""


@pytest.mark.one_of_each
@pytest.mark.parametrize("tokens", [2, 34])
@pytest.mark.parametrize("kind", few(OWN_FORMS, *KINDS), ids=lambda kind: kind.name)
def test_quantised_experts(kind: PackedKind, tokens: int, device: torch.device) -> None:
    """Matrices of two kinds; the second's columns fill no step."""
    x, gate_up, down, weights, experts = quantised(tokens, (kind, PackedKind.Q8_0), 2, 256, 32, device)
    got, wanted = run(x, gate_up, down, weights, experts)
    assert ratio(got, wanted) < TOLERANCE


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("kind", [None, PackedKind.Q4_K, PackedKind.Q5_0], ids=str)
@pytest.mark.usefixtures("turing")
def test_without_tensor_cores(kind: PackedKind | None, tokens: int, device: torch.device) -> None:
    """In float16: tiles of their own, for few pairs and for many."""
    if kind is None:
        x, gate_up, down, weights, experts = problem(tokens, 2, 2, 72, 40, torch.float16, device)
    else:
        x, gate_up, down, weights, experts = quantised(tokens, (kind, PackedKind.Q8_0), 2, 256, 32, device)
    got, wanted = run(x.half(), gate_up, down, weights, experts)
    assert got.dtype == torch.float16
    assert ratio(got, wanted) < TOLERANCE


@pytest.mark.parametrize("tokens", few([3, 20, 40], 3, 40))
def test_quantised_experts_with_rows_that_fill_no_tile(tokens: int, device: torch.device) -> None:
    """And with one matrix that is not quantised."""
    x, gate_up, down, weights, experts = quantised(tokens, (PackedKind.Q4_1, PackedKind.Q5_0), 3, 32, 96, device)
    got, wanted = run(x, gate_up, down, weights, experts, "gelu_tanh")
    assert ratio(got, wanted) < TOLERANCE
    plain = dequantise(down).unflatten(0, (3, -1)).to(torch.bfloat16)
    got, wanted = run(x, gate_up, plain, weights, experts)
    assert ratio(got, wanted) < TOLERANCE


def float_experts(
    x: torch.Tensor, count: int, rows: int, columns: int, span: int, numbers: Floats, seed: int
) -> GroupMatrix:
    """Random matrices whose weights are about 1 / sqrt(columns)."""
    shape, source = (count * rows, columns), torch.Generator().manual_seed(seed)
    scales = (torch.rand(shape[0], -(-columns // span), generator=source) + 0.5) / 30 * columns**-0.5
    groups = None
    if numbers == "e2m1":
        codes = torch.randint(0, 256, (shape[0], columns // 2), generator=source, dtype=torch.uint8)
        groups = torch.randint(0x40, 0x58, (shape[0], columns // 16), generator=source, dtype=torch.uint8).numpy()
    else:
        codes = (random(*shape, seed=seed) * 30).to(DTYPES[FLOAT_NAMES[numbers]]).view(torch.uint8)
    return pack_floats(ScaledCodes(numbers, codes.numpy(), scales.numpy(), span, groups), x.device)


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize(
    ("hidden", "inner", "group", "numbers"),
    [
        (160, 48, 128, "e4m3"),
        (96, 33, 32, "e4m3"),
        (123, 48, 4096, "e4m3"),
        (64, 96, 64, "e5m2"),
        (160, 48, 4096, "e2m1"),
    ],
)
def test_experts_of_small_floats(
    hidden: int, inner: int, group: int, numbers: Floats, tokens: int, device: torch.device
) -> None:
    """Blocks of columns, whole rows, rows that fill no tile."""
    x, _, _, weights, experts = problem(tokens, 3, 2, hidden, inner, torch.bfloat16, device)
    gate_up = float_experts(x, 3, 2 * inner, hidden, min(group, hidden), numbers, 1)
    down = float_experts(x, 3, hidden, inner, min(group, inner) if inner % 32 == 0 else inner, numbers, 2)
    biases = random(3, 2 * inner, seed=5).to(x), random(3, hidden, seed=6).to(x)
    got, wanted = run(x, gate_up, down, weights, experts, "gelu_tanh", None if hidden == 96 else biases)
    assert ratio(got, wanted) < TOLERANCE


@pytest.mark.parametrize("tokens", [12, 40])
def test_a_row_of_small_floats_does_not_depend_on_the_others(tokens: int, device: torch.device) -> None:
    x, _, _, weights, experts = problem(tokens, 5, 2, 64, 16, torch.bfloat16, device)
    gate_up = float_experts(x, 5, 32, 64, 32, "e4m3", 1)
    down = float_experts(x, 5, 64, 16, 16, "e4m3", 2)
    whole = run(x, gate_up, down, weights, experts)[0]
    other, elsewhere = x.clone(), experts.clone()
    other[1:], elsewhere[1:] = torch.nan, torch.tensor([4, 0], device=device)
    assert torch.equal(run(other, gate_up, down, weights, elsewhere)[0][0], whole[0])
    if tokens == 40:
        arguments = (x[:1], gate_up, down, weights[:1], experts[:1])
        assert torch.equal(moe(*arguments, invariant=True), whole[:1])


def test_no_tokens(device: torch.device) -> None:
    assert run(*problem(0, 4, 2, 64, 32, torch.bfloat16, device))[0].shape == (0, 64)
    weights, experts = triton_route.route(torch.zeros(0, 8, device=device), Routing(top_k=2))
    assert weights.shape == experts.shape == (0, 2)


def test_what_the_kernels_do_not_read_is_refused(device: torch.device) -> None:
    x, gate_up, down, weights, experts = problem(3, 4, 2, 64, 32, torch.bfloat16, device)
    for wrong in (
        (x, gate_up.half(), down, weights, experts),
        (x.T.contiguous().T, gate_up, down, weights, experts),
        (x, TensorMatrix(gate_up.flatten(0, 1).T.contiguous().T), down, weights, experts),
        (x, gate_up, down, weights, experts.T.contiguous().T),
    ):
        with pytest.raises(AssertionError):
            run(*wrong)
    with pytest.raises(AssertionError):
        triton_experts.expert_linear(
            x.float(), matrix_of(gate_up.float()), Pairs(weights, experts, 4), None, "silu", invariant=False
        )


def test_a_graph_replays_with_other_experts(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    for tokens in (4, 100):
        x, gate_up, down, weights, experts = problem(tokens, 16, 4, 256, 128, torch.bfloat16, device)
        run(x, gate_up, down, weights, experts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe(x, gate_up, down, weights, experts)
        experts.copy_(experts.flip(0).sub(1))  # other experts, some of them none
        graph.replay()
        assert ratio(out, moe(x, gate_up, down, weights, experts, by_reference=True)) < TOLERANCE
