# SPDX-License-Identifier: MIT
"""Arguments of a mixture of experts: routing, pairs of tokens and experts, and operations' arguments; inside step 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from candle_vllm.core.kernels.cpu_runtime.operation import (
    LinearArguments,
    operation,
    slot,
)

if TYPE_CHECKING:
    import torch

FEW = 64
"""Most pairs of token and expert for which the weights of every expert that is asked are read once, as in decoding."""

MOST_EXPERTS = 512
"""Of a layer."""

LEAST_SUM = 1e-20
"""Keeps a sum of scores from being 0 where every one of them is; nothing against any other sum."""

Activation: TypeAlias = Literal["silu", "gelu_tanh", "swiglu_oai", "relu2", "gelu", "silu_7", "silu_16"]


def is_gated(activation: Activation | None) -> bool:
    """Whether the activation combines an expert's gate and up projections."""
    return activation not in (None, "relu2", "gelu")


Scoring: TypeAlias = Literal["softmax", "sigmoid", "sparsemixer"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """How a token's experts are chosen; see `route`.

    Attributes:
        top_k: k.
        scoring, renormalise, scale: how logits become weights.
        bias: [X] fp32 or None, an array in recorded steps; only used to choose experts (DeepSeek-V3's
            e_score_correction_bias).
        expert_scale: [X] fp32 or None, an array in recorded steps; factor of each expert's weights.
        groups, top_groups: number of groups of experts, and number of groups whose experts are candidates.
        jitter: of sparsemixer.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalise: bool = True
    bias: Any = None
    expert_scale: Any = None
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(eq=False)
class Pairs:
    """Pairs of a token and one of its experts; pair t * k + j is token t's jth.

    Attributes:
        weights: [T, k] fp32.
        experts: [T, k] int32; the experts of a token differ, and a number outside 0 to X - 1 is no expert.
        count: X.
        blocks: the pairs sorted by expert, which the GPU's kernels compute at their first call.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    count: int
    blocks: Any = None

    def __post_init__(self) -> None:
        import torch

        assert self.experts.dim() == 2
        assert self.weights.shape == self.experts.shape
        assert self.experts.dtype == torch.int32
        assert self.weights.dtype == torch.float32
        assert 0 < self.count <= MOST_EXPERTS

    def among(self, first: int, count: int) -> Pairs:
        """Renumber for a rank that has `count` experts from `first` on; other experts become no expert."""
        return Pairs(self.weights, self.experts - first, count)

    @property
    def tokens(self) -> int:
        """T."""
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        """k."""
        return self.experts.shape[1]

    @property
    def number(self) -> int:
        """T * k."""
        return self.experts.numel()


ENTRY = slot(LinearArguments, LinearArguments._fields[-1]) + 1
"""Numbers of a matrix in the table that `experts` reads: a whole row of a linear operation."""


class RouteArguments(NamedTuple):
    """The operation's arguments. It also sets the step's number `PAIRS`.

    Attributes:
        logits, stride: address of float32 [T, X], rows `stride` floats apart.
        num_experts: X.
        top_k: k.
        groups, top_groups: how many groups of experts there are, and how many of them are candidates.
        scoring, renormalise, scale, jitter: how scores become weights; the first is a number in `Scoring`.
        bias, expert_scale: addresses of float32 [X], or 0.
        experts, weights: addresses of the results, int64 [T, k] and float32 [T, k].
        finished: of int64, 0 between operations.
        starts: of the result int64 [X + 1]: expert x has the places starts[x] .. starts[x + 1]; X more are scratch.
        token_of, place_of: of the results int64 [T * k]: the token at a place, and the place of a pair.
    """

    logits: int
    stride: int
    num_experts: int
    top_k: int
    groups: int
    top_groups: int
    scoring: int
    renormalise: int
    bias: int
    scale: float
    experts: int
    weights: int
    finished: int
    starts: int
    token_of: int
    place_of: int
    expert_scale: int = 0
    jitter: float = 0.0


def route_operation() -> int:
    """Address of the compiled operation."""
    return operation("moe.cpu:route")


class ExpertsArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        starts: address of what `route` made.
        table: of int64 [X, matrices, ENTRY]: the rows of linear operations whose result has a row for each place.
        num_experts: X.
        matrices: of each expert; their tiles are as dear as each other.
        picked: of int64: the row of the activations for each place.
        ranks: see `rank_of`.
    """

    starts: int
    table: int
    num_experts: int
    matrices: int
    picked: int
    ranks: int = 0


def experts_operation() -> int:
    """Address of the compiled operation."""
    return operation("moe.cpu:experts")


class CombineArguments(NamedTuple):
    """The operation's arguments; strides are floats from one row to the next.

    Attributes:
        out, out_stride: address of the result, float32 [T, E].
        onto: whether it is added to what stands there.
        columns: E.
        top_k: k.
        weights, places: addresses of float32 [T, k], and of the pairs' places int64 [T, k].
        results, result_stride: of float32 [T * k, E], a row for each place.
        shared, shared_stride: of what is added with weight 1, float32 [T, E], or zeros.
        gate, gate_stride: of float32 [T, 1], whose sigmoid is the weight instead, or zeros.
    """

    out: int
    out_stride: int
    onto: int
    columns: int
    top_k: int
    weights: int
    places: int
    results: int
    result_stride: int
    shared: int = 0
    shared_stride: int = 0
    gate: int = 0
    gate_stride: int = 0


def combine_operation() -> int:
    """Address of the compiled operation."""
    return operation("moe.cpu:combine")
