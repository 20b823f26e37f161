"""Mixture of experts: which experts a token goes to, and what they make of it; step 6 of a request's life.

Letters: T tokens, X experts, k experts of a token, E hidden size, F an expert's inner size.

`route`: logits [T, X] of any float dtype. In fp32, the scores are softmax(logits) or sigmoid(logits). The k experts
with the highest score + bias are chosen, the lowest number first among equals; without a bias the logits themselves
decide, which have the scores' order and no two of which the arithmetic makes equal. With groups of experts side by
side, only those in the `top_groups` best groups are candidates; a group's worth is its highest score, or with a bias
the sum of its two highest. NaN counts as lower than every number. The weights are the scores without the bias, divided
by their sum where asked, times `scale`. The experts of a token differ and stand in the order in which they were chosen.
Source: Shazeer et al., 2017, arXiv:1701.06538; DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437.

`moe`: x [T, E], gate_up [X, 2F, E] (the gate's rows, then up's) and down [X, E, F], bfloat16 or float16, or each a
`GgufMatrix`, or a `GroupMatrix` of floats, whose rows are the experts' behind each other; or all of it float32; weights
[T, k] fp32, experts [T, k] int32. y[t], in new memory, is the sum over j, with e = experts[t, j], of

    weights[t, j] * (down[e] (act(gate[e] x[t]) * (up[e] x[t])))

`biases` are added to each of the three products. gpt-oss's "swiglu_oai" is (up + 1) * gate * sigmoid(1.702 gate), gate
at most 7 and up within [-7, 7], in the place of act(gate) * up.
The experts of a token must differ. A number outside 0 to X - 1 stands for no expert, which adds nothing: the rows that
fill up a batch need none. Sums are fp32; what is rounded to x's dtype is act(gate) * up, an expert's result, and y.
Results are added in the order of j. With up to `FEW` pairs of token and expert the kernels are others than with more,
and with GGUF's numbers they round as `kernels/gguf_linear` does, with small floats as `kernels/group_linear`. On
either side of that, y[t] depends on nothing but token t's own row, weights and experts; with `invariant=True` on both
sides alike, to the bit.

float32 has no kernels: on a GPU every expert is multiplied with every token in torch, which is slow.

Nothing here waits for the GPU, and what is launched depends on shapes alone, so that a graph may capture it. Tensors on
the CPU are computed by `reference.py`.
"""

from __future__ import annotations

from typing import get_args

import torch

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.moe import reference
from candle_vllm.core.kernels.moe.arguments import (
    FEW,
    MOST_EXPERTS,
    Activation,
    Biases,
    Experts,
    MoeSizes,
    Routing,
    Scoring,
)
from candle_vllm.core.kernels.recorded import RecordedExperts

__all__ = [
    "FEW",
    "MOST_EXPERTS",
    "Activation",
    "Biases",
    "Experts",
    "MoeSizes",
    "RecordedExperts",
    "Routing",
    "Scoring",
    "moe",
    "route",
]


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    renormalise: bool = True,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, k] fp32, experts [T, k] int32) for logits [T, X], X up to `MOST_EXPERTS`.

    Args:
        bias: [X] fp32; takes part in the choice alone (DeepSeek-V3's e_score_correction_bias).
        groups: of X / groups experts each; `top_groups` of them are candidates.
    """
    assert logits.dim() == 2
    experts = logits.shape[1]
    assert 0 < experts <= MOST_EXPERTS, f"{experts} experts; at most {MOST_EXPERTS} are supported"
    assert experts % groups == 0
    assert 0 < top_groups <= groups
    assert 0 < top_k <= experts // groups * top_groups, "more experts are asked for than are candidates"
    assert bias is None or bias.shape == (experts,)
    assert bias is None or groups == 1 or experts // groups > 1, "the worth of a group is the sum of two"
    assert scoring in ("softmax", "sigmoid")
    if on_gpu(logits):
        from candle_vllm.core.kernels.moe import triton_route

        return triton_route.route(logits, top_k, scoring, renormalise, bias, (groups, top_groups), scale)
    return reference.route(logits, top_k, scoring, renormalise, bias, (groups, top_groups), scale)


def moe(
    x: torch.Tensor,
    gate_up: Experts,
    down: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    biases: Biases | None = None,
    activation: Activation = "silu",
    invariant: bool = False,
) -> torch.Tensor:
    """The experts' weighted results [T, E]; see above. `invariant`: few pairs are computed as many are."""
    sizes = MoeSizes.of(x, gate_up, down, weights, experts, biases)
    assert activation in get_args(Activation)
    if on_gpu(x) and x.dtype == torch.float32:
        return reference.every_expert(x, gate_up, down, weights, experts, sizes, activation, biases)
    if on_gpu(x):
        from candle_vllm.core.kernels.moe import triton

        return triton.moe(x, gate_up, down, weights, experts, sizes, activation, biases, invariant)
    return reference.moe(x, gate_up, down, weights, experts, sizes, activation, biases)
