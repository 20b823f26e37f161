# SPDX-License-Identifier: MIT
"""Arguments of a mixture of experts: routing, pairs of tokens and experts, and operations' arguments.

The place of a pair is its index after the pairs are sorted by expert (`sorted_token_ids` in vLLM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from candle_vllm.core.kernels.cpu_runtime.operation import LinearArguments, slot

if TYPE_CHECKING:
    import torch

FEW = 64
"""Maximum number of pairs for the kernels for few pairs, which decoding of few sequences uses unless `invariant`."""

MOST_EXPERTS = 512
"""Maximum number of experts of a layer."""

LEAST_SUM = 1e-20
"""Added to a sum of scores, so that it is not 0 if all scores are 0; negligible for sums above 1e-12."""

Activation: TypeAlias = Literal["silu", "gelu_tanh", "swiglu_oai", "relu2", "gelu", "silu_7", "silu_16", "silu_10"]


def is_gated(activation: Activation | None) -> bool:
    """Whether the activation has a gate, so that the matrix has gate and up rows."""
    return activation not in (None, "relu2", "gelu")


Scoring: TypeAlias = Literal["softmax", "sigmoid", "sparsemixer", "sqrt_softplus"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """Rules by which a token's experts are chosen; see `route`.

    Attributes:
        top_k: k.
        scoring, renormalise, scale: how logits are converted to weights.
        bias: [X] fp32 or None, an array in recorded steps; only used to choose experts (DeepSeek-V3's
            e_score_correction_bias).
        expert_scale: [X] fp32 or None, an array in recorded steps; factor of each expert's routing weight.
        groups, top_groups: number of groups of experts, and number of groups whose experts are candidates.
        jitter: parameter of sparsemixer.
        chosen: the experts of the step's tokens, int32 [T, k], or in recorded steps those of every token id, int64
            [V, k]; None if the scores choose.
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
    chosen: Any = None


@dataclass(eq=False)
class Pairs:
    """Pairs of a token and one of its experts; pair t * k + j is expert j of token t.

    Attributes:
        weights: [T, k] fp32.
        experts: [T, k] int32; a token's experts are distinct, and a number outside 0 to X - 1 means no expert.
        count: X.
        blocks: the pairs sorted by expert, computed at the first call of the GPU's kernels for many pairs, and reused.
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
        """Return the pairs of a rank: its `count` experts from `first` on become 0, 1, ...; others mean no expert."""
        return Pairs(self.weights, self.experts - first, count)

    @property
    def tokens(self) -> int:
        """The number of tokens T."""
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        """The number of experts of a token, k."""
        return self.experts.shape[1]

    @property
    def number(self) -> int:
        """The number of pairs, T * k."""
        return self.experts.numel()


ENTRY = slot(LinearArguments, LinearArguments._fields[-1]) + 1
"""int64 elements of a matrix in `ExpertsArguments.table`, laid out as a row of a plan (`cpu_runtime/operation.py`)."""


class RouteArguments(NamedTuple):
    """Arguments of the operation `route`, which also sets `StepNumber.PAIRS`, the number of pairs.

    Attributes:
        logits, stride: address of float32 [T, X], and row stride in floats.
        num_experts: X.
        top_k: k.
        groups, top_groups: number of groups of experts, and number of groups whose experts are candidates.
        scoring, renormalise, scale, jitter: how logits are converted to weights; `scoring` is an index in `Scoring`.
        bias, expert_scale: addresses of float32 [X], or 0.
        experts, weights: addresses of the results, int64 [T, k] and float32 [T, k].
        finished: address of an int64 counter, which is 0 between operations.
        starts: address of int64 [X + 1]: expert x has places starts[x] to starts[x + 1] - 1. X scratch elements follow.
        token_of, place_of: addresses of results, int64 [T * k] each: the token of a place, and the place of a pair.
        chosen, token_ids: addresses of int64 [V, k] and [T], the experts of each token id; 0 if the scores choose.
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
    chosen: int = 0
    token_ids: int = 0


class ExpertsArguments(NamedTuple):
    """Arguments of the operation `experts`.

    Attributes:
        starts: address of `starts` of `RouteArguments`.
        table: address of int64 [X, matrices, ENTRY]: plans of linear operations; each writes a vector for each place.
        num_experts: X.
        matrices: number of matrices of an expert, whose tiles are assumed to cost the same when work is divided.
        picked: address of int64 [T * k]: the row of the activations for each place.
        ranks: table of CPU ranks, see `rank_of`.
    """

    starts: int
    table: int
    num_experts: int
    matrices: int
    picked: int
    ranks: int = 0


class CombineArguments(NamedTuple):
    """Arguments of the operation `combine`; strides are row strides in floats.

    Attributes:
        out, out_stride: address of the result, float32 [T, E].
        onto: whether the sum is added to the old value of `out`.
        columns: E.
        top_k: k.
        weights, places: addresses of float32 [T, k], and of the pairs' places int64 [T, k].
        results, result_stride: address of float32 [T * k, E], with a row for each place.
        shared, shared_stride: address of float32 [T, E], which is added with weight 1; 0 and 0 without it.
        gate, gate_stride: address of float32 [T, 1], the sigmoid of which replaces the weight 1; 0 and 0 without it.
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
