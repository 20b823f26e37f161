# SPDX-License-Identifier: MIT
"""A mixture of experts for tests, in one call: gate and up, down, and the sum."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from candle_vllm.core.kernels import moe as kernels
from candle_vllm.core.kernels.gguf_linear import GgufMatrix
from candle_vllm.core.kernels.group_linear import GroupMatrix
from candle_vllm.core.kernels.matrices import BlockMatrix, CodeMatrix, DeviceMatrix, TensorMatrix
from candle_vllm.core.kernels.moe import Activation, Pairs, Routing, reference

Experts: TypeAlias = torch.Tensor | GgufMatrix | GroupMatrix | DeviceMatrix
"""Of all experts: [X, rows, columns], or a matrix of X * rows rows."""

Biases: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Of gate and up [X, 2F], and of down [X, E]."""


def route(logits: torch.Tensor, top_k: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts."""
    pairs = kernels.route(logits, Routing(top_k=top_k, **options))
    return pairs.weights, pairs.experts


def matrix_of(experts: Experts) -> DeviceMatrix:
    if isinstance(experts, torch.Tensor):
        return TensorMatrix(experts.flatten(0, 1))
    if isinstance(experts, GgufMatrix):
        return BlockMatrix(experts)
    return CodeMatrix(experts) if isinstance(experts, GroupMatrix) else experts


def moe(
    x: torch.Tensor,
    gate_up: Experts,
    down: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: Activation = "silu",
    biases: Biases | None = None,
    *,
    invariant: bool = False,
    by_reference: bool = False,
) -> torch.Tensor:
    """The experts' weighted results [T, E]."""
    first, second = matrix_of(gate_up), matrix_of(down)
    pairs = Pairs(weights, experts, second.rows // x.shape[1])
    own = (None, None) if biases is None else biases
    if by_reference:
        inner = reference.expert_linear(x, first, pairs, own[0], activation)
        return reference.combine(reference.expert_linear(inner, second, pairs, own[1]), pairs).to(x.dtype)
    inner = kernels.expert_linear(x, [first], pairs, own[0], activation=activation, invariant=invariant)
    return kernels.combine(kernels.expert_linear(inner, [second], pairs, own[1], invariant=invariant), pairs, x.dtype)
