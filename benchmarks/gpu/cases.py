# SPDX-License-Identifier: MIT
"""What a kernel is measured on: the form of a case, and the cases of norms, rotary, gates, embedding and cache.

A `Planned` case costs nothing until `build` makes its inputs, so that hundreds can be listed and each has the memory
for itself. Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, F inner, V vocabulary, R sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import measure
import torch
from models import SHAPES, Shape

from candle_vllm.core.kernels import embedding, kv_write, rms_norm, rotary, silu_mul
from candle_vllm.core.kernels.rms_norm import reference as rms_norm_reference
from candle_vllm.core.kernels.rotary import reference as rotary_reference
from candle_vllm.core.kernels.silu_mul import reference as silu_mul_reference

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        calls: the kernel on each copy of its inputs; a call returns its result, or what it wrote.
        wanted: what the first call has to return, by the reference; None where nothing is compared.
        tolerance: most RMS(error) / RMS(reference); 0 is an exact copy.
        nbytes, flops: of a call: memory that must be read or written, and operations.
        peers: the same work by others, by name.
        before: run before the checked call; prepares what it writes to, where it does not allocate that itself.
        rows_alone: where rows are to be independent: whether a row alone has the same bits.
    """

    calls: Sequence[measure.Call]
    wanted: Callable[[], Any] | None
    nbytes: int
    flops: int = 0
    tolerance: float = 5e-3
    peers: Mapping[str, Sequence[measure.Call]] = field(default_factory=dict)
    before: measure.Call = lambda: None
    rows_alone: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Planned:
    """A case that is built when its turn comes."""

    kernel: str
    shape: str
    build: Callable[[], Case]


class Plan:
    """The cases of one device; `quick` takes toy sizes, to check the benchmark itself."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device = device
        self.quick = quick
        self.models = {"toy": SHAPES["toy"]} if quick else {"8B": SHAPES["llama-3.1-8b"], "0.6B": SHAPES["qwen3-0.6b"]}

    def copies(self, nbytes: int, make: Callable[[], Any]) -> list[Any]:
        """Inputs of `nbytes` each, as many as the cache does not hold."""
        return [make() for _ in range(measure.copies_for(nbytes, self.device))]

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        """Random numbers."""
        return torch.randn(shape, dtype=dtype, device=self.device)

    def sizes(self, *full: int) -> Sequence[int]:
        """These, or small ones instead."""
        return (1, 5) if self.quick else full


# ---- norms, rotary, gates, embedding, cache --------------------------------------------------------------------------


def small_cases(plan: Plan) -> Iterator[Planned]:
    """One token, a batch that decodes, and a long prompt; short inputs stay in the cache, as in a step."""
    for name, model in plan.models.items():
        for tokens in plan.sizes(1, 64, 8192):
            at = f"{name} T={tokens}"
            for kernel, build in _SMALL.items():
                yield Planned(kernel, at, functools.partial(build, plan, model, tokens))


def _rms_norm(plan: Plan, model: Shape, tokens: int) -> Case:
    nbytes, weight = 4 * tokens * model.hidden, torch.rand(model.hidden, device=plan.device) + 0.5
    inputs = plan.copies(nbytes, lambda: plan.normal(tokens, model.hidden))
    calls = [functools.partial(rms_norm.rms_norm, x, weight, 1e-5) for x in inputs]
    peers = {"torch": [functools.partial(torch.rms_norm, x, (model.hidden,), weight.to(BF16), 1e-5) for x in inputs]}
    return Case(calls, lambda: rms_norm_reference.rms_norm(inputs[0], weight, 1e-5), nbytes, peers=peers)


def _add_rms_norm(plan: Plan, model: Shape, tokens: int) -> Case:
    nbytes, weight = 8 * tokens * model.hidden, torch.rand(model.hidden, device=plan.device) + 0.5
    inputs = plan.copies(nbytes, lambda: (plan.normal(tokens, model.hidden), plan.normal(tokens, model.hidden)))
    calls = [functools.partial(rms_norm.add_rms_norm, x, residual, weight, 1e-5) for x, residual in inputs]
    x, residual = inputs[0]
    return Case(calls, lambda: rms_norm_reference.add_rms_norm(x, residual, weight, 1e-5), nbytes)


def _head_norm(plan: Plan, model: Shape, tokens: int) -> Case:
    """The norm of query heads where they lie, in rows of q, k and v."""
    nbytes, weight = 4 * tokens * model.heads * model.head_dim, torch.rand(model.head_dim, device=plan.device) + 0.5
    inputs = plan.copies(nbytes, lambda: _heads(plan, model, tokens)[0])
    calls = [functools.partial(rms_norm.rms_norm, x, weight, 1e-6) for x in inputs]
    return Case(calls, lambda: rms_norm_reference.rms_norm(inputs[0], weight, 1e-6), nbytes)


def _heads(plan: Plan, model: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T, K, D] as parts of one product."""
    sizes = [count * model.head_dim for count in (model.heads, model.kv_heads, model.kv_heads)]
    parts = plan.normal(tokens, sum(sizes)).split(sizes, dim=1)
    q, k, v = (part.unflatten(1, (-1, model.head_dim)) for part in parts)
    return q, k, v


def _rotary_pair(plan: Plan, model: Shape, tokens: int) -> Case:
    angles = torch.rand(8192, model.head_dim // 2, device=plan.device)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 8192, (tokens,), device=plan.device)
    nbytes = 4 * tokens * (model.heads + model.kv_heads) * model.head_dim + 4 * tokens * model.head_dim
    inputs = plan.copies(nbytes, lambda: _heads(plan, model, tokens)[:2])
    calls = [functools.partial(rotary.rotary_pair, q, k, positions, cos, sin) for q, k in inputs]
    wanted = lambda: tuple(rotary_reference.rotary(x, positions, cos, sin) for x in inputs[0])  # noqa: E731
    return Case(calls, wanted, nbytes)


def _silu_mul(plan: Plan, model: Shape, tokens: int) -> Case:
    nbytes = 6 * tokens * model.inner
    inputs = plan.copies(nbytes, lambda: plan.normal(tokens, 2 * model.inner))
    calls = [functools.partial(silu_mul.gate_mul, x, "silu") for x in inputs]
    return Case(calls, lambda: silu_mul_reference.gate_mul(inputs[0], "silu"), nbytes)


def _embedding(plan: Plan, model: Shape, tokens: int) -> Case:
    nbytes, table = 4 * tokens * model.hidden, plan.normal(model.vocabulary, model.hidden)
    ids = plan.copies(nbytes, lambda: torch.randint(0, model.vocabulary, (tokens,), device=plan.device))
    calls = [functools.partial(embedding.embedding, x, table) for x in ids]
    return Case(calls, lambda: table[ids[0]], nbytes, tolerance=0.0)


def _kv_write(plan: Plan, model: Shape, tokens: int) -> Case:
    nbytes = 8 * tokens * model.kv_heads * model.head_dim
    blocks = tokens // 64 + 1
    caches = [plan.normal(blocks, 64, model.kv_heads, model.head_dim) for _ in range(2)]
    slots = torch.randperm(64 * blocks, device=plan.device)[:tokens]
    inputs = plan.copies(nbytes, lambda: _heads(plan, model, tokens)[1:])

    def write(pair: tuple[torch.Tensor, torch.Tensor]) -> Any:
        kv_write.kv_write(pair[0], pair[1], caches[0], caches[1], slots)
        return [cache.flatten(0, 1) for cache in caches]

    def wanted() -> list[torch.Tensor]:
        found = [torch.zeros_like(cache).flatten(0, 1) for cache in caches]
        for cache, rows in zip(found, inputs[0], strict=True):
            cache[slots] = rows
        return found

    def before() -> None:
        for cache in caches:
            cache.zero_()

    calls = [functools.partial(write, pair) for pair in inputs]
    return Case(calls, wanted, nbytes, tolerance=0.0, before=before)


_SMALL = {
    "add_rms_norm": _add_rms_norm,
    "rms_norm": _rms_norm,
    "head_norm": _head_norm,
    "rotary_pair": _rotary_pair,
    "silu_mul": _silu_mul,
    "kv_write": _kv_write,
    "embedding": _embedding,
}
