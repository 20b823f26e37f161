"""Mixture of experts in plain torch, literal enough to check by eye: step 6, and what tests compare with."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.gguf_linear.layout import GgufMatrix
from candle_vllm.core.kernels.gguf_linear.reference import dequantise
from candle_vllm.core.kernels.group_linear import reference as group_linear
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix
from candle_vllm.core.kernels.moe.arguments import Activation, Biases, Experts, MoeSizes, Scoring

# Keeps a sum of scores from being 0 where every one of them is; nothing against any other sum.
LEAST_SUM = 1e-20


def route(
    logits: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    renormalise: bool,
    bias: torch.Tensor | None,
    groups: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract in the package; groups: how many there are, and how many are candidates."""
    wide = logits.float()
    scores = torch.softmax(wide, -1) if scoring == "softmax" else torch.sigmoid(wide)
    choice = wide if bias is None else scores + bias.float()
    choice = torch.where(choice.isnan(), -torch.inf, choice)
    candidate = torch.ones_like(choice, dtype=torch.bool)
    count, wanted = groups
    if count > 1:
        grouped = choice.unflatten(1, (count, -1))
        worth = grouped.topk(1 if bias is None else 2, -1).values.sum(-1)
        best = _best(worth, torch.ones_like(worth, dtype=torch.bool), wanted)
        chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
        candidate = chosen.repeat_interleave(grouped.shape[2], 1)
    experts = _best(choice, candidate, top_k)
    weights = scores.gather(1, experts)
    if renormalise:
        weights = weights / (weights.sum(1, keepdim=True) + LEAST_SUM)
    return weights * scale, experts.to(torch.int32)


def _best(values: torch.Tensor, candidate: torch.Tensor, count: int) -> torch.Tensor:
    """The places [T, count] of the highest candidates, falling, the lowest place first among equals."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(
        1, candidate.gather(1, order).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    )
    return order[:, :count]


def moe(
    x: torch.Tensor,
    gate_up: Experts,
    down: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    sizes: MoeSizes,
    activation: Activation,
    biases: Biases | None = None,
) -> torch.Tensor:
    """See the contract in the package; fp32 throughout, rounded once."""
    wide = x.float()
    total = torch.zeros_like(wide)
    results = torch.zeros(*experts.shape, sizes.hidden, device=x.device)
    for expert in experts.unique().tolist():
        if not 0 <= expert < sizes.experts:
            continue
        token, slot = (experts == expert).nonzero(as_tuple=True)
        both = wide[token] @ _matrix(gate_up, expert, sizes.experts).T
        gate, up = (both if biases is None else both + biases[0][expert].float()).chunk(2, -1)
        result = gated(gate, up, activation) @ _matrix(down, expert, sizes.experts).T
        results[token, slot] = result if biases is None else result + biases[1][expert].float()
    for slot in range(sizes.top_k):
        inside = (experts[:, slot] >= 0) & (experts[:, slot] < sizes.experts)
        total += torch.where(inside, weights[:, slot], 0.0)[:, None] * results[:, slot]
    return total.to(x.dtype)


def every_expert(
    x: torch.Tensor,
    gate_up: Experts,
    down: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    sizes: MoeSizes,
    activation: Activation,
    biases: Biases | None = None,
) -> torch.Tensor:
    """The same without a look at which experts are asked, so that nothing waits for a GPU; added by their numbers."""
    wide = x.float()
    total = torch.zeros_like(wide)
    for expert in range(sizes.experts):
        both = wide @ _matrix(gate_up, expert, sizes.experts).T
        gate, up = (both if biases is None else both + biases[0][expert].float()).chunk(2, -1)
        result = gated(gate, up, activation) @ _matrix(down, expert, sizes.experts).T
        result = result if biases is None else result + biases[1][expert].float()
        asked = experts == expert
        weight = torch.where(asked, weights, 0.0).sum(1, keepdim=True)
        total += torch.where(asked.any(1, keepdim=True), weight * result, 0.0)
    return total.to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up; see the contract."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _matrix(experts: Experts, expert: int, count: int) -> torch.Tensor:
    """One expert's matrix in fp32."""
    if isinstance(experts, GroupMatrix):
        return group_linear.dequantise(experts).unflatten(0, (count, -1))[expert]
    if isinstance(experts, GgufMatrix):
        return dequantise(experts).unflatten(0, (count, -1))[expert]
    return experts[expert].float()
