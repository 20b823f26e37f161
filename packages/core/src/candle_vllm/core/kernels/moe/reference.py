# SPDX-License-Identifier: MIT
"""Mixture of experts in plain torch: the reference, which also computes where there is no kernel."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.lora import Place
from candle_vllm.core.kernels.lora.reference import EagerAdapters
from candle_vllm.core.kernels.matrices import DeviceMatrix
from candle_vllm.core.kernels.moe.arguments import LEAST_SUM, Activation, Pairs, Routing, is_gated
from candle_vllm.core.kernels.silu_mul.reference import gated_product


def route(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and experts [T, k]; see the contract in the package."""
    bias, count = routing.bias, routing.groups
    wide = logits.float()
    if routing.scoring == "sqrt_softplus":
        scores = torch.nn.functional.softplus(wide, threshold=100.0).sqrt()
    else:
        scores = torch.softmax(wide, -1) if routing.scoring == "softmax" else torch.sigmoid(wide)
    choice = wide if bias is None else scores + bias.float()
    choice = torch.where(choice.isnan(), -torch.inf, choice)
    candidate = torch.ones_like(choice, dtype=torch.bool)
    if count > 1:
        grouped = choice.unflatten(1, (count, -1))
        worth = grouped.topk(1 if bias is None else 2, -1).values.sum(-1)
        best = _best(worth, torch.ones_like(worth, dtype=torch.bool), routing.top_groups)
        chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
        candidate = chosen.repeat_interleave(grouped.shape[2], 1)
    experts = _best(choice, candidate, routing.top_k) if routing.chosen is None else routing.chosen.long()
    weights = scores.gather(1, experts)
    if routing.scoring == "sparsemixer":
        weights = _shares_of_near(choice, experts, routing.jitter)
    if routing.renormalise:
        weights = weights / (weights.sum(1, keepdim=True) + LEAST_SUM)
    weights = weights * routing.scale
    if routing.expert_scale is not None:
        weights = weights * routing.expert_scale[experts]
    return weights, experts.to(torch.int32)


def _shares_of_near(logits: torch.Tensor, experts: torch.Tensor, jitter: float) -> torch.Tensor:
    """Return the weights of sparsemixer; see the contract in the package."""
    shares: list[torch.Tensor] = []
    for chosen in experts.split(1, 1):
        top = logits.gather(1, chosen)
        far = top - logits > 2 * jitter * torch.maximum(logits.abs(), top)
        shares.append(1 / (logits - top).exp().masked_fill(far, 0).sum(1))
        logits = logits.scatter(1, chosen, -torch.inf)
    return torch.stack(shares, 1)


def _best(values: torch.Tensor, candidate: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices [T, count] of the highest candidates, highest first, among equals the lowest index first."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    ranks = candidate.gather(1, order).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, ranks)[:, :count]


def expert_linear(
    x: torch.Tensor,
    matrix: DeviceMatrix,
    pairs: Pairs,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
    *,
    joins: tuple[EagerAdapters, Place] | None = None,
    waits: bool = True,
) -> torch.Tensor:
    """See the contract in the package. The results are fp32, in the order of the pairs, including adapters.

    With `waits=False` every token is multiplied by every expert, so that the host need not wait for a GPU to read which
    experts are chosen.
    """
    rows, wide = x.float(), matrix.decoded(torch.float32).unflatten(0, (pairs.count, -1))
    if activation is None:
        rows = rows.unflatten(0, pairs.experts.shape)
    width = wide.shape[1] // (2 if is_gated(activation) else 1)
    out = torch.zeros(*pairs.experts.shape, width, device=x.device)
    for expert in pairs.experts.unique().tolist() if waits else range(pairs.count):
        if not 0 <= expert < pairs.count:
            continue
        asked = pairs.experts == expert
        token, slot = asked.nonzero(as_tuple=True) if waits else (slice(None), None)
        if activation is not None:
            own = rows[token]
        else:  # a token's experts are distinct, so a token has at most one row for each expert
            own = rows[token, slot] if waits else torch.where(asked[..., None], rows, 0.0).sum(1)
        y = own @ wide[expert].float().T
        if joins is not None:
            joins[0].add_expert(joins[1], expert, torch.arange(pairs.tokens, device=x.device)[token], own, y)
        y = y if bias is None else y + bias[expert].float()
        if activation == "relu2":
            y = torch.nn.functional.relu(y).square()
        elif activation == "gelu":
            y = torch.nn.functional.gelu(y)
        elif activation is not None:
            y = gated_product(*y.chunk(2, -1), kind=activation)
        if waits:
            out[token, slot] = y
        else:
            out = torch.where(asked[..., None], y[:, None], out)
    return out.flatten(0, 1)


def combine(results: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """See the contract in the package; the result is fp32."""
    results = results.unflatten(0, pairs.experts.shape)
    total = torch.zeros(pairs.tokens, results.shape[2], device=results.device)
    for slot in range(pairs.top_k):
        inside = (pairs.experts[:, slot] >= 0) & (pairs.experts[:, slot] < pairs.count)
        total += torch.where(inside, pairs.weights[:, slot], 0.0)[:, None] * results[:, slot]
    return total
