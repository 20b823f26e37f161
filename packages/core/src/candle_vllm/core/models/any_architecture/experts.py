# SPDX-License-Identifier: MIT
"""This engine's matrix products for a layer's experts, which transformers stores as one tensor of all experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.moe import Pairs
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import entry, row_part, transposed
from candle_vllm.core.models.any_architecture.products import Products
from candle_vllm.core.quantization.tensors import StoredTensor


class Experts:
    """One kind of matrix of all experts of a layer.

    Attributes:
        linear: the matrices; its parts are stored under the names of `stored_part`.
        count: number of experts.
        pieces: names of the parts of a matrix [N, K], stacked along its rows.
        transposed: whether transformers' tensor is [X, K, N].
    """

    def __init__(self, module: Any, name: str, placement: Placement) -> None:
        self.count, rows, columns = getattr(module, name).shape
        if not self.count:
            raise InvalidFileError("a layer of experts has 0 experts")
        self.transposed = module.is_transposed
        rows, columns = (columns, rows) if module.is_transposed else (rows, columns)
        halves = name == "gate_up_proj" and module.is_concatenated
        self.pieces: Sequence[str] = ("gate", "up") if halves else ("all",)
        sizes: dict[str, int] = dict.fromkeys(self.pieces, rows // len(self.pieces))
        self.linear = Linear(columns, sizes, placement, bias=module.has_bias, experts=self.count)

    def multiply(self, x: torch.Tensor, experts: torch.Tensor, products: Products | None, top_k: int) -> torch.Tensor:
        """Multiply each row of x [P, K] by the matrix of its expert: [P, N]; `experts` is [P], P is T times `top_k`."""
        if products is None:
            chosen = experts.view(-1, top_k).to(torch.int32)
            return self.linear(x, Pairs(torch.ones(chosen.shape, device=x.device), chosen, self.count))
        matrices, bias = self.linear.matrices, self.linear.bias
        made = torch.zeros(len(x), sum(each[0].rows for each in matrices))
        for expert in experts.unique().tolist():
            if 0 <= expert < self.count:
                rows = (experts == expert).nonzero()[:, 0]
                of = SimpleNamespace(
                    matrices=[m[expert] for m in matrices], bias=None if bias is None else bias[expert]
                )
                made[rows] = products.multiply([of], x[rows], torch.float32)
        return made

    def split(self, name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        """Split a tensor [X, N, K] of all experts, [X, K, N] if transposed, or biases [X, N], into experts' parts."""
        for expert in range(self.count):
            yield from self._pieces_of(name, expert, entry(stored, expert))

    def whole(self, name: str, each: Sequence[Sequence[StoredTensor]]) -> Iterator[tuple[str, StoredTensor]] | None:
        """Name tensors [N, K] stored for each expert: a list for each piece, or one of whole matrices; else None."""
        if self.transposed or any(len(of) != self.count for of in each):
            return None
        if len(each) == len(self.pieces):
            stored = zip(self.pieces, each, strict=True)
            return ((f"{name}.{e}.{piece}", of[e]) for piece, of in stored for e in range(self.count))
        if len(each) == 1:
            return (part for e in range(self.count) for part in self._pieces_of(name, e, each[0][e]))
        return None

    def _pieces_of(self, name: str, expert: int, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        matrix = transposed(stored, None) if self.transposed and len(stored.shape) == 2 else stored
        for index, piece in enumerate(self.pieces):
            yield f"{name}.{expert}.{piece}", row_part(index, len(self.pieces))(matrix, None)


def stored_part(name: str, part: str) -> str:
    """The name under which `Experts` yields a part such as "gate.3.weight" of the tensor `name` of all experts."""
    piece, expert, kind = part.split(".")
    return f"{name}{'_bias' if kind == 'bias' else ''}.{expert}.{piece}"


def has_experts(module: Any) -> bool:
    """Whether a module has the parameters of transformers' interface for experts, and nothing else."""
    if not hasattr(module, "has_gate") or not hasattr(module, "_apply_gate"):
        return False
    names = {_first(module), "down_proj"}
    names |= {f"{name}_bias" for name in names} if module.has_bias else set()
    return set(module._parameters) == names and not module._buffers


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class _OwnExperts:
    """Base class put before a module's class of experts, so that this engine's matrices are used."""

    own_first: Experts
    own_down: Experts
    products: Products | None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """x [T, E] to the weighted sums [T, E] of the results of each token's k experts."""
        this: Any = self
        chosen, top_k = top_k_index.reshape(-1), top_k_index.shape[-1]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = self.own_first.multiply(x.repeat_interleave(top_k, 0), chosen, self.products, top_k).to(x.dtype)
        y = this._apply_gate(y) if this.has_gate else this.act_fn(y)
        y = self.own_down.multiply(y, chosen, self.products, top_k).to(x.dtype)
        y = this.post_expert_norm(y) if this.has_post_expert_norm else y
        y = y.view(len(x), top_k, -1) * top_k_weights.reshape(len(x), top_k, 1)
        return y.sum(1).to(x.dtype).view(hidden_states.shape)


def replace_experts(module: Any, placement: Placement, products: Products | None) -> dict[str, Experts]:
    """Replace a module's experts by this engine's matrices; return these by the names of the module's parameters."""
    first = _first(module)
    parts = {first: Experts(module, first, placement), "down_proj": Experts(module, "down_proj", placement)}
    module.__class__ = type(f"Own{type(module).__name__}", (_OwnExperts, type(module)), {})
    module.own_first, module.own_down, module.products = parts[first], parts["down_proj"], products
    module._parameters.clear()
    return parts
