# SPDX-License-Identifier: MIT
"""The compiled mixture of experts against the reference: every kind of matrix, odd sizes, and one order of sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import quants

from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from packages.core.tests.kernels.moe_layer import Biases, moe, route

pytest.importorskip("numba")

from candle_vllm.core.kernels import packed_linear, plain_linear, scaled_linear
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value
from candle_vllm.core.kernels.moe import Activation, Routing, reference
from candle_vllm.core.kernels.packed_linear import PackedMatrix
from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.recorded import ExpertWeights
from candle_vllm.core.kernels.scaled_linear import ScaledMatrix
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.scaled_codes import ScaledCodes
from packages.core.tests.kernels import packed_reference, plain_reference, scaled_reference
from packages.core.tests.kernels.packed_reference import quantise

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.operation import Matrix

MOST = 70
SINGLE = ("F32", "F16", "BF16")
FLOATS = ("E4M3", "E4M3 by 32", "E2M1")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def floats(kind: str, weights: torch.Tensor) -> ScaledCodes:
    """Numbers without care for how well they stand for the weights."""
    rows, columns = weights.shape
    span = 32 if kind == "E4M3 by 32" else columns
    scales = np.linspace(0.5, 1.5, rows * -(-columns // span), dtype=np.float32).reshape(rows, -1)
    if kind == "E2M1":
        bits = np.random.default_rng(rows).integers(0, 256, (rows, columns // 2), np.uint8)
        groups = (weights[:, ::16].abs() / 4).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return ScaledCodes("e2m1", bits, scales, span, groups)
    return ScaledCodes("e4m3", weights.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scales, span)


def packed(kind: str, weights: torch.Tensor) -> Matrix:
    rows, columns = weights.shape
    if kind in FLOATS:
        return scaled_linear.pack(floats(kind, weights))
    if kind in SINGLE:
        plain = weights.to(DTYPES[kind]).contiguous()
        return plain_linear.pack(plain.view(torch.uint8).numpy().reshape(-1), kind, rows, columns)
    type_ = GGMLQuantizationType[kind]
    return packed_linear.pack(quants.quantize(weights.numpy(), type_).reshape(-1), type_, rows, columns)


def decoded(matrix: Matrix) -> torch.Tensor:
    if isinstance(matrix, ScaledMatrix):
        return torch.from_numpy(scaled_reference.unpack(matrix))
    if isinstance(matrix, PackedMatrix):
        return torch.from_numpy(packed_reference.dequantise(matrix))
    return torch.from_numpy(plain_reference.unpack(matrix))


def as_read(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Activations as a matrix of the kind meets them."""
    if isinstance(matrix, ScaledMatrix):
        return x.bfloat16().float()
    if isinstance(matrix, PackedMatrix):
        q, scales, _ = quantise(x.numpy())
        return torch.from_numpy((q.reshape(*scales.shape, -1) * scales[..., None]).reshape(q.shape).astype(np.float32))
    return x.bfloat16().float() if matrix.kind is PlainKind.BF16 else x


@dataclasses.dataclass
class Problem:
    """A layer: an input of up to MOST tokens, the router's matrix, the experts'."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    kinds: tuple[str, ...] = ("F32", "F32", "F32")  # of gate, up and down; more are those of the experts in turn
    activation: Activation = "silu"
    biased: bool = False

    def __post_init__(self) -> None:
        shapes = ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))
        self.x = random(MOST, self.hidden)
        self.router = packed("F32", random(self.experts, self.hidden, seed=1) / self.hidden**0.5)
        self.matrices = [
            [
                packed(self.kinds[(part + 3 * e) % len(self.kinds)], random(*shape, seed=10 * e + part + 2) * 2 / 8)
                for e in range(self.experts)
            ]
            for part, shape in enumerate(shapes)
        ]
        self.biases: Biases | None = None
        if self.biased:
            self.biases = random(self.experts, 2 * self.inner, seed=3), random(self.experts, self.hidden, seed=4)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x @ decoded(self.router).T

    def wanted(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The contract, with activations as the matrices read them."""
        total = torch.zeros(len(x), self.hidden)
        for t in range(len(x)):
            for weight, e in zip(weights[t], experts[t].tolist()):
                gate, up, down = (matrices[e] for matrices in self.matrices)
                halves = [(as_read(x[t : t + 1], m) @ decoded(m).T) for m in (gate, up)]
                if self.biases is not None:
                    halves = [half + bias for half, bias in zip(halves, self.biases[0][e].chunk(2))]
                result = as_read(reference.gated_product(*halves, self.activation), down) @ decoded(down).T
                total[t] += weight * (result[0] if self.biases is None else result[0] + self.biases[1][e])
        return total


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["1 thread", "2 threads", "3 threads"])
def team(request: pytest.FixtureRequest) -> Iterator[ThreadTeam]:
    team = ThreadTeam(request.param)
    yield team
    team.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[ThreadTeam]:
    team = ThreadTeam(2)
    yield team
    team.close()


class Plan:
    """A recorded layer, to be run with any number of tokens."""

    def __init__(
        self, problem: Problem, routing: Routing, *, shared: bool = False, gate: bool = False, onto: bool = False
    ) -> None:
        self.recorder = recorder = Recorder(StepLimits(MOST, 1, 1, 1, 16, 1), host_isa())
        self.x, self.gate = recorder.buffer(problem.hidden), recorder.buffer(1)
        self.shared, self.out = recorder.buffer(problem.hidden), recorder.buffer(problem.hidden)
        x = self._value(self.x)
        logits = x.linear([problem.router], None)
        beside = [self._value(self.shared) if shared else None, self._value(self.gate) if gate else None]
        pairs, (first, second) = logits.route(routing), problem.biases or (None, None)
        inner = x.expert_linear(ExpertWeights(problem.matrices[:2], first), pairs, problem.activation)
        mixed = inner.expert_linear(ExpertWeights(problem.matrices[2:], second), pairs, None).combine(*beside)
        if onto:
            total = self._value(self.out) + mixed
        else:
            total = mixed
            self.out = mixed.buffer
        self.total = total
        self.plan = np.array(recorder.plan, np.int64)

    def _value(self, buffer: Any) -> Any:
        return buffer_value(self.recorder, buffer)

    def fill(self, buffer: Any, rows: torch.Tensor) -> None:
        whole = buffer.array.reshape(-1, buffer.stride)
        whole[:] = np.nan
        whole[: len(rows), : rows.shape[1]] = rows.numpy()

    def run(self, team: ThreadTeam, x: torch.Tensor) -> torch.Tensor:
        self.fill(self.x, x)
        self.recorder.arrays.numbers[StepNumber.TOKENS] = len(x)
        team.run(self.plan, self.recorder.num_rows)
        return torch.from_numpy(self.total.rows(np.arange(len(x))))


def test_plain_experts(team: ThreadTeam) -> None:
    """Rows of odd sizes; some experts are asked by nobody."""
    problem, routing = Problem(9, 3, 41, 35), Routing(top_k=3)
    plan = Plan(problem, routing)
    for tokens in (1, 2, 7, 63, MOST, 0):
        x = problem.x[:tokens]
        weights, experts = route(problem.logits(x), 3)
        got = plan.run(team, x)
        assert got.shape == (tokens, 41)
        if tokens:
            gate_up = torch.stack([torch.cat([decoded(g), decoded(u)]) for g, u in zip(*problem.matrices[:2])])
            down = torch.stack([decoded(matrix) for matrix in problem.matrices[2]])
            assert error(got, moe(x, gate_up, down, weights, experts)) < 1e-5
            assert error(got, problem.wanted(x, weights, experts)) < 1e-5


@pytest.mark.parametrize(
    "kinds",
    [
        ("Q4_0", "Q4_0", "Q8_0"),
        ("Q5_1", "F16", "BF16"),
        ("BF16", "BF16", "F16"),
        ("Q8_0", "F32", "Q5_0", "Q4_1"),
        ("E4M3 by 32", "E4M3 by 32", "E4M3"),
        ("E2M1", "BF16", "E2M1", "E4M3", "Q8_0"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("activation", "biased"), [("silu", False), ("gelu_tanh", False), ("swiglu_oai", True)])
def test_experts_of_all_kinds(kinds: tuple[str, ...], activation: Activation, biased: bool, pair: ThreadTeam) -> None:
    """Kinds of gate, up and down side by side, and of experts (the last case)."""
    problem = Problem(6, 2, 64, 96, kinds, activation, biased)
    plan = Plan(problem, Routing(top_k=2))
    for tokens in (1, 13):
        x = problem.x[:tokens]
        wanted = problem.wanted(x, *route(problem.logits(x), 2))
        # Where a number lies between two, another order of sums rounds it the other way.
        assert error(plan.run(pair, x), wanted) < (2e-3 if set(kinds) - {"F16", "F32"} else 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "sigmoid"},
        {"scoring": "softmax", "renormalise": False, "scale": 2.5},
        {"scoring": "sigmoid", "biased": True, "scale": 1.5},
        {"scoring": "softmax", "groups": 4, "top_groups": 2},
        {"scoring": "sigmoid", "biased": True, "groups": 6, "top_groups": 3},
        {"scoring": "softmax", "scaled": True},
        {"scoring": "sqrt_softplus", "biased": True, "scale": 1.5},
        {"scoring": "sparsemixer", "renormalise": False, "jitter": 0.3},
    ],
    ids=str,
)
def test_routing(options: dict[str, Any], team: ThreadTeam) -> None:
    """Biases of 3 are chosen by, and nothing is weighed with them."""
    options = dict(options)
    problem, bias = Problem(24, 5, 32, 32), random(24, seed=9) * 3 if options.pop("biased", False) else None
    scales = random(24, seed=10) if options.pop("scaled", False) else None
    plan = Plan(problem, Routing(top_k=5, bias=bias, expert_scale=scales, **options))
    for tokens in (1, 40):
        x = problem.x[:tokens]
        weights, experts = route(problem.logits(x), 5, bias=bias, **options)
        weights = weights if scales is None else weights * scales[experts.long()]
        assert error(plan.run(team, x), problem.wanted(x, weights, experts)) < 1e-5


def test_one_expert_for_all_and_equal_scores(pair: ThreadTeam) -> None:
    problem = Problem(7, 2, 64, 64, ("Q4_0", "Q4_0", "Q8_0"))
    problem.router = packed("F32", torch.zeros(7, 64))  # the first of equals
    x = problem.x
    weights, experts = route(problem.logits(x), 2)
    assert experts.unique().tolist() == [0, 1]
    assert error(Plan(problem, Routing(top_k=2)).run(pair, x), problem.wanted(x, weights, experts)) < 2e-3


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_expert_whose_score_is_no_number_is_the_last(biased: bool, groups: int, pair: ThreadTeam) -> None:
    problem, bias = Problem(8, 2, 32, 32), torch.zeros(8) if biased else None
    rows = decoded(problem.router).clone()
    rows[[0, 5]] = torch.nan
    problem.router, x = packed("F32", rows), problem.x[:9]
    options: dict[str, Any] = {"scoring": "sigmoid", "bias": bias, "groups": groups, "top_groups": 1}
    weights, experts = route(problem.logits(x), 2, **options)
    assert not {0, 5} & set(experts.unique().tolist())
    got = Plan(problem, Routing(top_k=2, **options)).run(pair, x)
    assert error(got, problem.wanted(x, weights, experts)) < 1e-5


def test_a_router_without_numbers_hurts_its_token_only(team: ThreadTeam) -> None:
    problem = Problem(9, 3, 64, 32, ("Q8_0",))
    plan, x = Plan(problem, Routing(top_k=3)), problem.x[:11].clone()
    whole = plan.run(team, x)
    x[4], x[7, 3] = torch.nan, torch.inf
    got = plan.run(team, x)
    assert got[4].isnan().all()
    others = [t for t in range(11) if t not in (4, 7)]
    assert torch.equal(got[others], whole[others])


@pytest.mark.parametrize(
    "kinds", [("Q4_0", "Q4_1", "Q8_0"), ("BF16", "F32", "F16"), ("E4M3", "E4M3 by 32", "E2M1")], ids=" ".join
)
def test_nothing_around_a_token_changes_a_bit_of_it(kinds: tuple[str, ...]) -> None:
    problem = Problem(8, 3, 96, 160, kinds)
    plan, found = Plan(problem, Routing(top_k=3)), []
    for threads in (1, 2, 5):
        team = ThreadTeam(threads)
        whole = plan.run(team, problem.x)
        alone = torch.cat([plan.run(team, problem.x[t : t + 1]) for t in (0, 17, 69)])
        part = plan.run(team, problem.x[10:23])
        team.close()
        assert torch.equal(alone, whole[[0, 17, 69]])
        assert torch.equal(part, whole[10:23])
        found.append(whole)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_what_is_shared_and_what_stands_there_are_added(gate: bool, onto: bool, team: ThreadTeam) -> None:
    problem = Problem(4, 2, 45, 33)
    plan = Plan(problem, Routing(top_k=2), shared=True, gate=gate, onto=onto)
    for tokens in (1, 20):
        x, shared, scores, stands = problem.x[:tokens], *(random(tokens, n, seed=n) for n in (45, 1, 45))
        for buffer, rows in ((plan.shared, shared), (plan.gate, scores), (plan.out, stands)):
            plan.fill(buffer, rows)
        wanted = problem.wanted(x, *route(problem.logits(x), 2))
        wanted += shared * torch.sigmoid(scores) if gate else shared
        assert error(plan.run(team, x), wanted + stands if onto else wanted) < 1e-5


def test_one_token_reads_only_the_experts_it_asks(pair: ThreadTeam) -> None:
    """The others' memory is not there at all."""
    problem = Problem(5, 2, 64, 64, ("Q4_0", "Q4_0", "Q8_0"))
    x = problem.x[:1]
    wanted = problem.wanted(x, *route(problem.logits(x), 2))
    asked = route(problem.logits(x), 2)[1][0].tolist()
    plan = Plan(problem, Routing(top_k=2))
    for matrices in problem.matrices:
        for e, matrix in enumerate(matrices):
            if e not in asked:
                matrix.data[:] = 255  # scales that are NaN
    assert error(plan.run(pair, x), wanted) < 2e-3
