# SPDX-License-Identifier: MIT
"""Mixture of experts: route tokens to experts, compute the experts, combine their results; step 6 of a request's life.

Letters: T tokens, X experts, k experts of a token, E hidden size, F an expert's inner size.

A **pair** is a token and one of its experts: pair t * k + j is expert j of token t. Sorted by expert (stably), an
expert's pairs are consecutive; a pair's index in this order is its **place**.

`route`: logits [T, X] of any float dtype. In fp32, the scores are softmax(logits), sigmoid(logits), or sqrt(log(1 +
exp(logits))) with "sqrt_softplus". The k experts with the highest score + bias are chosen, among equals the lowest
number first. Without a bias the logits are compared, which have the same order as the scores, but are not made equal by
rounding. With groups of consecutive experts, only experts of the `top_groups` best groups are candidates; a group's
value is its highest logit, or with a bias the sum of its two highest values of score + bias. NaN counts as -infinity.
The weights are the scores without the bias, divided by their sum if `renormalise`, times `scale` and each expert's
`expert_scale`, if any. A token's experts are distinct, in the order of their choice. With "sparsemixer" (without bias
and groups) the score of a chosen logit l is its share of a softmax over l and the near logits z that were not chosen
before, for which l - z is at most 2 `jitter` max(|z|, l); on a GPU torch computes this. The experts may be given
instead (`Routing.chosen`), by token id in DeepSeek V4: their scores are then weights alone; on a GPU torch computes
them. Sources: Shazeer et al., 2017, arXiv:1701.06538; DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437; Liu
et al., 2024, arXiv:2409.12136 (sparsemixer).

`expert_linear`: a product of each pair's input with the expert's matrix [N, K]. The matrices of all experts are one
matrix [X * N, K]: a `DeviceMatrix` of bfloat16 or float16, of GGUF blocks, or of small floats in groups; or all
operands are float32. With an activation, x [T, K] has a row for each token, the matrix has each expert's gate rows
followed by its up rows, [X, 2 N, K], and the result for a pair of token t and expert e is

    act(gate[e] x[t]) * (up[e] x[t])

or another gated product of `kernels/silu_mul`: "swiglu_oai", "silu_7", "silu_16" and "silu_10" have limits. With
"relu2" the matrix has only up rows, [X, N, K], and the result is the square of max(up[e] x[t], 0); with "gelu" it is
the GELU of up[e] x[t]. Without an activation x is the result of such a call, with a row for each pair, and the result
is down[e] x. A bias [X, N] (or [X, 2 N]) is added to the products. The order of rows of results [T * k, N] is private
to these functions; results of pairs without an expert are undefined.

`combine`: y[t], in new memory, is the sum over j of weights[t, j] times the result of token t's expert j. The experts
of a token must be distinct. A number outside 0 to X - 1, as in padding rows, means no expert, which adds nothing.

Sums are fp32; act(gate) * up, an expert's result, and y are rounded to x's dtype. Results are added in the order of j.
On a GPU, up to `FEW` pairs use other kernels than more pairs. Both round GGUF blocks as `kernels/gguf_linear` does, and
small floats as `kernels/group_linear` does. y[t] depends only on token t's own row, weights and experts, and on which
kernels are used; with `invariant=True` also few pairs use the kernels for many. float32 has no kernels: torch
multiplies every token by every expert, which is slow.

Without adapters no function waits for the GPU, and launches depend on shapes alone, so CUDA graphs can capture them.
For tensors on the CPU, `reference.py` computes in fp32 up to y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.moe.arguments import FEW, MOST_EXPERTS, Activation, Pairs, Routing, Scoring, is_gated
from candle_vllm.core.kernels.recorded import ExpertWeights, Recorded, RecordedPairs, RecordedRows, Value

if TYPE_CHECKING:
    import torch

    from candle_vllm.core.kernels.lora import Place
    from candle_vllm.core.kernels.lora.reference import EagerAdapters
    from candle_vllm.core.kernels.matrices import DeviceMatrix

__all__ = [
    "FEW",
    "MOST_EXPERTS",
    "Activation",
    "Pairs",
    "Routing",
    "Scoring",
    "combine",
    "expert_linear",
    "gated_rows",
    "is_gated",
    "route",
    "weighted",
]


def route(logits: Value, routing: Routing) -> Pairs | RecordedPairs:
    """Return the pairs for logits [T, X]; X is at most `MOST_EXPERTS`."""
    if isinstance(logits, Recorded):
        return logits.route(routing)
    assert logits.dim() == 2
    experts, top_k, bias = logits.shape[1], routing.top_k, routing.bias
    groups, top_groups = routing.groups, routing.top_groups
    assert 0 < experts <= MOST_EXPERTS, f"{experts} experts; at most {MOST_EXPERTS} are supported"
    assert experts % groups == 0
    assert 0 < top_groups <= groups
    assert 0 < top_k <= experts // groups * top_groups, "top_k exceeds the number of candidate experts"
    assert bias is None or bias.shape == (experts,)
    assert bias is None or groups == 1 or experts // groups > 1, "with a bias, a group needs two experts or more"
    assert routing.scoring in get_args(Scoring)
    from candle_vllm.core.kernels.moe import reference

    if on_gpu(logits) and routing.scoring != "sparsemixer" and routing.chosen is None:
        from candle_vllm.core.kernels.moe import triton_route

        weights, chosen = triton_route.route(logits, routing)
    else:
        weights, chosen = reference.route(logits, routing)
    return Pairs(weights, chosen, experts)


def weighted(x: Value, pairs: Any) -> tuple[Value, Any]:
    """Return x [T, E] times the weight of each token's only expert, in new memory, and the pairs with weights of 1."""
    if isinstance(x, Recorded):
        return x.weighted(pairs)
    assert pairs.weights.shape[1] == 1
    return (x.float() * pairs.weights).to(x.dtype), replace(pairs, weights=pairs.weights.new_ones(pairs.weights.shape))


def expert_linear(
    x: Value | RecordedRows,
    matrices: Sequence[Any],
    pairs: Any,
    bias: Value | None = None,
    *,
    activation: Activation | None = None,
    invariant: bool = False,
    place: Place | None = None,
    adapters: EagerAdapters | None = None,
) -> Any:
    """Compute the experts' results, a row for each pair; see above.

    Args:
        matrices: one matrix of all experts; in recorded steps lists of one matrix per expert, gate's and then up's.
        invariant: use the kernels for many pairs also for few pairs.
        place: the adapter site. adapters: the step's adapters; None in recorded steps.
    """
    assert activation is None or activation in get_args(Activation)
    if isinstance(x, (Recorded, RecordedRows)):
        return x.expert_linear(ExpertWeights(matrices, bias, place), pairs, activation)
    matrix: DeviceMatrix
    (matrix,) = matrices
    height = matrix.rows // pairs.count
    assert matrix.rows == height * pairs.count
    assert not is_gated(activation) or height % 2 == 0
    assert x.shape == (pairs.number if activation is None else pairs.tokens, matrix.columns)
    assert bias is None or bias.shape == (pairs.count, height)
    import torch

    if on_gpu(x) and x.dtype != torch.float32:
        from candle_vllm.core.kernels.moe import triton_experts

        return triton_experts.expert_linear(x, matrix, pairs, bias, activation, invariant)
    from candle_vllm.core.kernels.moe import reference

    joins = None if adapters is None or place is None else (adapters, place)
    return reference.expert_linear(x, matrix, pairs, bias, activation, joins=joins, waits=not on_gpu(x))


def combine(
    results: Any, pairs: Any, dtype: torch.dtype | None, shared: Value | None = None, gate: Value | None = None
) -> Value:
    """Return the weighted sums [T, N] in dtype (None in recorded steps), plus shared [T, N] * sigmoid(gate [T, 1])."""
    if isinstance(results, RecordedRows):
        return results.combine(shared, gate)
    import torch

    if on_gpu(results) and results.dtype != torch.float32:
        from candle_vllm.core.kernels.moe import triton_experts

        y = triton_experts.combine(results, pairs)
    else:
        from candle_vllm.core.kernels.moe import reference

        y = reference.combine(results, pairs).to(dtype)
    return y if shared is None else y + gated_rows(shared, gate)


def gated_rows(shared: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Return the shared expert's result [T, N], times the sigmoid of gate [T, 1] if there is a gate."""
    import torch

    return shared if gate is None else torch.sigmoid(gate.float()).to(shared.dtype) * shared
